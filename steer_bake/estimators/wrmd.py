"""Weighted ridge-regularised mean difference (Refusal Steering, arXiv 2512.16602, equations 3 to 5).

``m = sum w (h - o) / sum w`` over each side with ``w = |c(x)|`` and ``o`` the neutral mean, ``Sigma_N =
sum w (h~ - m_N) (h~ - m_N)^T / sum w`` over the negatives, ``v = (Sigma_N + lambda I)^-1 (m_P - m_N)``.

Equation 4 as printed takes ``h`` uncentred against ``m_N`` centred, which would add ``o o^T`` to the covariance and
suppress the direction of the neutral mean itself; ``h~ = h - o`` is what is built. With that reading ``o`` cancels from
both terms, so that neutral prompts take part by their place between the sides only: in the scores, and in the offset
of a clamp.
"""

from __future__ import annotations

from torch import Tensor

from . import Statistics
from .rmd import Options, rmd

__all__ = ["NEEDS_COVARIANCE", "USES_SCORES", "Options", "wrmd"]

NEEDS_COVARIANCE = ("negative",)
USES_SCORES = True


def wrmd(positive: Statistics, negative: Statistics, options: Options | None = None) -> tuple[Tensor, float]:
    """The vector [d] and the distance of the weighted means along it (options and errors as of ``rmd``).

    It is ``rmd`` of weighted moments: what differs is what was collected.
    """
    return rmd(positive, negative, options)
