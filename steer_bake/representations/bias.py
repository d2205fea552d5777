"""A shift, held by the writer's bias: one it has already, or one that a config flag unlocks.

A flag is global: it makes the class create the bias in *every* layer, and those of sibling projections with it. All of
them are written, as zeros, or loaders fill them with whatever memory holds.
"""

from __future__ import annotations

from ..architectures import Write
from ..checkpoint import Edit
from ..errors import NotFoldable
from . import Base, Holding, Piece


def bias(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "bias":
        return None
    write, layer = piece.write, piece.layer
    name = (write.bias or "").format(layer=layer)
    if write.bias and base.has(name):
        return Holding((base.edit(name, piece.affine, axis=0),))
    if not write.bias or not write.unlock:
        model_type = base.config.get("model_type")
        raise NotFoldable(
            f"the {model_type} class gives {write.tensor.format(layer=layer)} no bias, and no config flag creates one: "
            "a shift has no exact home there. Ablation at 'writes' or 'writers' works, and so does 'resid_pre.0'"
        )
    zeros = [edit for each in range(base.layers) for edit in _zero_biases(write, each, base)]
    shift = piece.affine.without_linear()  # of a bias that is zero so far
    edits = [Edit(edit.tensor, edit.shape, edit.dtype, shift) if edit.tensor == name else edit for edit in zeros]
    return Holding(tuple(edits), {write.unlock: True})


def _zero_biases(write: Write, layer: int, base: Base) -> list[Edit]:
    weights = [weight.format(layer=layer) for weight in (write.tensor, *write.siblings)]
    return [base.zeros(weight.removesuffix("weight") + "bias", like=weight) for weight in weights]
