"""A shift, held by the writer's bias: one it has already, or one that a config flag unlocks.

A flag is global: it makes the class create the bias in *every* layer, and those of sibling projections with it. All of
them are written, as zeros, or loaders fill them with whatever memory holds.
"""

from __future__ import annotations

from ..errors import NotFoldable
from . import Base, Constant, Holding, Piece, Writer


def bias(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "shift" or piece.layer is None or piece.site is None:
        return None
    homes = [w for slot in piece.slots for w in base.writers(slot, piece.layer) if w.weight.whole]
    for writer in homes:
        if writer.bias is not None:
            scale = writer.weight.scale(base.layout.text)
            edit = base.edit(writer.bias, piece.affine.divided_by(scale), axis=-1)
            return Holding((edit,), constants=(Constant(writer.bias, piece.site, scale),))
    for writer in homes:
        holding = _unlocked(writer, piece, base)
        if holding is not None:
            return holding
    raise NotFoldable(
        f"a writer of {piece.site} that could take the vector has no bias in the {base.layout.model_type} class, and "
        "no config flag creates one"
    )


def _unlocked(writer: Writer, piece: Piece, base: Base) -> Holding | None:
    """All biases that the flag creates, zero but for the writer's own."""
    assert piece.layer is not None
    assert piece.site is not None
    wanted = f"{base.layout.layer(piece.layer)}.{writer.weight.bias}"
    flags = [flag for flag in writer.block.unlock if hasattr(base.layout.text, flag)]
    for flag in flags:
        changes = base.layout.change({flag: True})
        created = base.unlocked(changes)
        if created is None or wanted not in created:
            continue
        scale = writer.weight.scale(base.layout.text)
        shift = piece.affine.divided_by(scale)
        edits = tuple(
            base.new(base.on_disk(name), shape, shift if name == wanted else None) for name, shape in created.items()
        )
        return Holding(edits, changes, (Constant(base.on_disk(wanted), piece.site, scale),))
    return None
