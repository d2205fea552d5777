"""Directional ablation: ``h -> h - amount r (r^T h)``, which for ``amount`` 1 removes the component along ``r``."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..affine import Affine


def ablate(direction: Tensor, amount: float) -> Affine:
    """``direction`` [d] is a unit vector; ``amount`` is lambda in ``W - lambda r r^T W``."""
    column = direction.unsqueeze(1)  # [d, 1]
    return replace(Affine.identity(direction.shape[0]), left=-amount * column, right=column)
