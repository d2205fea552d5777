"""A shift, held by the writer's bias: one it has already, or one that a config flag unlocks.

A flag is global: it makes the class create the bias in *every* layer, and those of sibling projections with it. The
planner writes all of them, as zeros, or loaders would fill them with whatever memory holds.
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
    assert piece.layer is not None
    assert piece.site is not None
    wanted = f"{base.layout.layer(piece.layer)}.{writer.missing}"
    for changes in base.flags(writer.block):
        created = base.unlocked(changes)
        if created is None or wanted not in created:
            continue
        scale = writer.weight.scale(base.layout.text)
        name = base.on_disk(wanted)
        edit = base.new(name, created[wanted], piece.affine.divided_by(scale))
        return Holding((edit,), changes, (Constant(name, piece.site, scale),), demands=1)
    return None
