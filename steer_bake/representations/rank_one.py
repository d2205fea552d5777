"""The linear part of an intervention, folded into the writer's weight: ``W <- W + L (R^T W)``. Exact everywhere."""

from __future__ import annotations

from ..errors import CheckpointError
from . import Base, Holding, Piece


def rank_one(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "weight":
        return None
    name = piece.write.tensor.format(layer=piece.layer)
    if not base.has(name):
        raise CheckpointError(f"the checkpoint has no tensor {name!r}, which its config promises; is it complete?")
    return Holding((base.edit(name, piece.affine.without_shift(), piece.write.axis),))
