"""Sparse difference of means for one category (From Refusal Tokens to Refusal Control, arXiv 2603.13359, eq. 1 to 4).

``r_c = T(mean_c) - T(mean_benign)`` with ``T`` zeroing entries below a threshold, of which the ``top_k`` largest by
absolute value are kept. The paper has ``top_k`` 200 of 4096 and threshold 0.001, and reads the activations at an
appended refusal token; for models without such tokens the last token of the prompt is the place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from . import Statistics


@dataclass(frozen=True)
class Options:
    top_k: int = 200  # entries that are kept; more than there are keeps all
    threshold: float = 0.001  # entries of the two means below it count as 0


def categorical(positive: Statistics, negative: Statistics, options: Options | None = None) -> tuple[Tensor, float]:
    """The sparse vector [d], at most ``top_k`` entries of which are not 0; the scale is its norm.

    Raises:
        RecipeError: ``top_k`` is not at least 1.
    """
    chosen = options or Options()
    if chosen.top_k < 1:
        raise RecipeError(f"top_k is {chosen.top_k}; keep at least one entry")
    means = [torch.where(side.mean.abs() >= chosen.threshold, side.mean, 0) for side in (positive, negative)]
    difference = means[0] - means[1]
    kept = difference.abs().topk(min(chosen.top_k, len(difference))).indices
    vector = torch.zeros_like(difference)
    vector[kept] = difference[kept]
    return vector, float(vector.norm())
