"""Add a constant vector: ``h -> h + amount r``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..affine import Affine


def add(direction: Tensor, amount: float) -> Affine:
    """``direction`` [d] is a unit vector; ``amount`` is the length of what is added, in stream units."""
    return replace(Affine.identity(direction.shape[0]), shift=amount * direction)
