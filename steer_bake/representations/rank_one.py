"""The linear part of an intervention, folded into the writer's weight: ``W <- W + L (R^T W)``. Exact everywhere."""

from __future__ import annotations

from ..errors import NotFoldable
from . import Base, Holding, Piece

TARGETS = ("checkpoint", "lora")


def rank_one(piece: Piece, base: Base) -> Holding | None:
    writer = piece.writer
    if piece.part not in ("weight", "bias") or writer is None:
        return None
    if writer.block.rigid:
        close = ", and --prefer approximate comes close and measures how close" if writer.block.inner else ""
        raise NotFoldable(
            f"a projection at {writer.tensor} is no edit of any tensor of a {base.layout.model_type} model: "
            f"{writer.block.rigid}. Adding a vector works{close}"
        )
    linear = piece.affine.without_shift()
    if piece.part == "weight":
        return Holding((base.edit(writer.tensor, linear, writer.weight.axis),))
    assert writer.bias is not None
    return Holding((base.edit(writer.bias, linear, axis=-1),))
