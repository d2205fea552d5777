"""Difference of the means of two prompt sets (Marks and Tegmark 2023, arXiv 2310.06824)."""

from __future__ import annotations

from torch import Tensor

from . import Statistics


def mean_difference(positive: Statistics, negative: Statistics) -> tuple[Tensor, float]:
    """``mean(positive) - mean(negative)`` [d]; the scale is its norm: coefficient 1 moves one mean to the other."""
    vector = positive.mean - negative.mean
    return vector, float(vector.norm())
