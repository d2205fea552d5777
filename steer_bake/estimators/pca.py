"""First principal component of paired differences (representation engineering, Zou et al. 2023, arXiv 2310.01405).

The differences are not centred: their mean is what a steering direction is after, and centring would take just that
away. The component is the unit vector ``v`` with the largest sum of ``(v . (positive_i - negative_i))^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError
from . import Statistics

NEEDS_ROWS = True
PAIRED = True


def pca(positive: Statistics, negative: Statistics) -> tuple[Tensor, float]:
    """The component [d], pointing to the positives; the scale is the norm of the mean difference.

    Row n of ``positive`` and row n of ``negative`` are a pair.

    Raises:
        RecipeError: the two sides have different numbers of rows, or never differ.
    """
    if positive.rows is None or negative.rows is None:
        raise ValueError("pca needs the rows of both sides")
    if positive.rows.shape != negative.rows.shape:
        raise RecipeError(
            f"pca takes pairs, and there are {positive.count} positive and {negative.count} negative prompts; "
            "give as many of each, or use mean_difference"
        )
    differences = positive.rows.double() - negative.rows.double()  # [pairs, d]
    if not differences.any():
        raise RecipeError("pca: the two sides do not differ at all there; choose other prompts or another site")
    vector = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    mean = differences.mean(0)
    if vector @ mean < 0:  # a component has no sign of its own: the positives lie on its far side
        vector = -vector
    return vector.float(), float(mean.norm())
