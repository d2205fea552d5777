"""Ridge-regularised mean difference (Refusal Steering, arXiv 2512.16602, equation 2): one-sided discriminant analysis.

``v = (Sigma_N + lambda I)^-1 (mean_P - mean_N)``, ``Sigma_N`` the covariance of the negative side only. Directions in
which the negatives vary anyway count less. The paper's lambda is 0.01, absolute: in streams whose entries are larger
than 1 that is nearly none, and with fewer prompts than dimensions the result then is the part of the difference that
lies outside the negatives' span. ``relative: true`` makes lambda a multiple of ``trace(Sigma_N) / d`` instead, which
means the same in every model.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import Statistics
from ._covariance import ridge_solve

NEEDS_COVARIANCE = ("negative",)


@dataclass(frozen=True)
class Options:
    ridge: float = 0.01  # lambda
    relative: bool = False  # lambda as a multiple of trace / d


def rmd(positive: Statistics, negative: Statistics, options: Options | None = None) -> tuple[Tensor, float]:
    """The vector [d]; the scale is the distance of the means along it: coefficient 1 moves one to the other there.

    Raises:
        RecipeError: the ridge is not positive.
    """
    chosen = options or Options()
    moved = positive.centre - negative.centre
    vector = ridge_solve(negative, moved, chosen.ridge, chosen.relative)
    return _with_scale(vector, moved)


def _with_scale(vector: Tensor, moved: Tensor) -> tuple[Tensor, float]:
    length = float(vector.norm())
    return vector.float(), float(moved @ vector) / length if length else 0.0
