"""Weighted mean difference (Cyberey and Evans 2025, arXiv 2504.17130; the WMD of Refusal Steering, arXiv 2512.16602).

``v = m_P / |m_P| - m_N / |m_N|`` with ``m = sum w (h - o) / sum w`` over each side, ``w = |c(x)|`` and ``o`` the mean
of the neutral prompts. Each side counts by the direction in which it lies from ``o``, not by how far.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import RecipeError
from . import Statistics

USES_NEUTRAL = True
USES_SCORES = True


def wmd(positive: Statistics, negative: Statistics, neutral: Statistics | None = None) -> tuple[Tensor, float]:
    """The difference of the two unit vectors [d]; the scale is the distance of the weighted means along it.

    Without neutral prompts ``o`` is half-way between the weighted means, and the result is their difference.

    Raises:
        RecipeError: a side's mean is the neutral one, so that it lies in no direction from there.
    """
    moved = positive.centre - negative.centre
    origin = (positive.centre + negative.centre) / 2 if neutral is None else neutral.mean.double()
    sides = [side.centre - origin for side in (positive, negative)]
    lengths = [float(side.norm()) for side in sides]
    if not all(lengths):
        raise RecipeError("wmd: a side has the same mean as the neutral prompts; choose other prompts or another site")
    vector = sides[0] / lengths[0] - sides[1] / lengths[1]
    return vector.float(), abs(float(moved @ vector)) / float(vector.norm())
