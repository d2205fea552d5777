"""Clamp (affine concept editing): set the component along ``r`` to a fixed value, ``h -> h - r (r^T h) + amount r``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..affine import Affine


def clamp(direction: Tensor, amount: float) -> Affine:
    """``direction`` [d] is a unit vector; ``amount`` is the value of ``r^T h`` afterwards, in stream units."""
    column = direction.unsqueeze(1)  # [d, 1]
    return replace(Affine.identity(direction.shape[0]), left=-column, right=column, shift=amount * direction)
