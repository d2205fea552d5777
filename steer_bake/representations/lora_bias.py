"""A shift, held by an adapter: the bias of ``lora_B`` at a writer, whether or not the class has a bias there."""

from __future__ import annotations

from dataclasses import replace

from ..errors import NotFoldable
from ..wrapping import places
from . import Base, Holding, Piece

TARGETS = ("lora",)
NOTE = "no merge where the base has no bias there; vLLM and llama.cpp's converter refuse such adapters"


def lora_bias(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "shift" or piece.layer is None:
        return None
    for writer in [one for slot in piece.slots for one in base.writers(slot, piece.layer)]:
        place = places(base.checkpoint).get(writer.tensor)
        if not writer.weight.whole or place is None or place.kind not in ("linear", "conv1d"):
            continue
        affine = piece.affine.divided_by(writer.weight.scale(base.layout.text))
        name = writer.tensor.removesuffix("weight") + "bias"
        if base.has(name):
            return Holding((base.edit(name, affine, axis=-1),))
        new = replace(base.new(name, (base.layout.width,), affine), dtype="F32")
        return Holding((new,), note=NOTE)
    raise NotFoldable(
        f"no writer of {piece.site} is a plain linear layer whose output reaches the {base.layout.model_type} stream "
        "as it is, and an adapter holds a vector as the bias of such a layer only; bake a checkpoint instead (target "
        "checkpoint)"
    )
