"""Whitened mean difference, and the eraser that goes with it (LEACE, Belrose et al. 2023, arXiv 2306.03819).

``v = Sigma^-1 (mean_P - mean_N)``, ``Sigma`` the covariance within both sides pooled, shrunk by a ridge: what tells the
sides apart per unit of the stream's own variation. Where both sides spread alike this is Fisher's discriminant. (LEACE
itself takes the total covariance; for two sides that changes the length of the vector and not its direction.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..affine import Affine
from ..errors import RecipeError
from . import Statistics
from ._covariance import pooled_solve

NEEDS_COVARIANCE = ("positive", "negative")


@dataclass(frozen=True)
class Options:
    ridge: float = 0.01  # lambda as a multiple of trace / d


def leace(positive: Statistics, negative: Statistics, options: Options | None = None) -> tuple[Tensor, float]:
    """The vector [d]; the scale is the distance of the means along it.

    Raises:
        RecipeError: the ridge is not positive, or the prompts of each side are all alike.
    """
    moved = positive.centre - negative.centre
    vector = pooled_solve(positive, negative, moved, (options or Options()).ridge, relative=True)
    length = float(vector.norm())
    return vector.float(), float(moved @ vector) / length if length else 0.0


def eraser(positive: Statistics, negative: Statistics, options: Options | None = None) -> Affine:
    """``h -> h - delta w^T (h - middle) / (w^T delta)`` with ``w = Sigma^-1 delta``: no linear probe tells the sides
    apart afterwards, and of all linear maps with that property this moves the activations least (without the ridge).

    ``delta`` is the difference of the means and ``middle`` lies half-way between them.

    Raises:
        RecipeError: the means are equal: there is nothing to erase.
    """
    moved = positive.centre - negative.centre
    weight = pooled_solve(positive, negative, moved, (options or Options()).ridge, relative=True)
    along = float(weight @ moved)
    if along == 0:
        raise RecipeError("leace: the two sides have the same mean; there is nothing to erase")
    middle = (positive.centre + negative.centre) / 2
    return replace(
        Affine.identity(len(moved)),
        left=(-moved / along)[:, None],
        right=weight[:, None],
        shift=moved * float(weight @ middle) / along,
    )
