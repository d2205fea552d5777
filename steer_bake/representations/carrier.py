"""A shift, held by one more decoder layer that adds exactly the vector and nothing else.

Everything in it is zero but the bias of one of its writers, or, where a norm ends the sublayer, the weight of that
norm: it normalises a constant to ones and multiplies. The layer performs the hook's own addition.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..affine import Affine
from ..checkpoint import Edit
from ..errors import NotFoldable
from . import NEW, Base, Constant, Extra, Holding, Piece, Writer

#: What a norm is given to make ones of: so large that its epsilon does not show.
_LOUD = 64.0


def carrier(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "shift" or piece.site is None or piece.layer is None:
        return None
    if piece.site.point != "resid_post":
        raise NotFoldable(f"an additional layer adds its vector after a layer, not at {piece.site}")
    reason = base.layout.architecture.indexed
    if reason:
        raise NotFoldable(f"a {base.layout.model_type} model takes no additional layer: {reason}")
    writers = [one for slot in ("attention", "mlp") for one in base.writers(slot, piece.layer)]
    for writer in writers:
        found = _normed(writer, piece, base) if writer.block.inner else _plain(writer, piece, base)
        if found is not None:
            return found
    raise NotFoldable(
        f"no writer of a {base.layout.model_type} layer could hold the vector in an additional layer: none has a bias, "
        "and no config flag creates one"
    )


def _plain(writer: Writer, piece: Piece, base: Base) -> Holding | None:
    """The vector is the bias of a writer."""
    if not writer.weight.whole:
        return None
    scale = writer.weight.scale(base.layout.text)
    return _with_bias(writer, writer.weight.bias, piece.affine.divided_by(scale), piece, base, scale)


def _normed(writer: Writer, piece: Piece, base: Base) -> Holding | None:
    """The vector is the weight of a norm, whose input is a constant: the bias of a writer before it."""
    ones = replace(Affine.identity(base.layout.width), shift=torch.full((base.layout.width,), _LOUD))
    for inner in writer.block.inner:
        found = _with_bias(writer, inner.bias, ones, piece, base, 1.0)
        if found is None:
            continue
        name = _new(writer.tensor, base.prefix(piece.layer or 0), base)
        offset = torch.full((base.layout.width,), writer.weight.offset)
        weight = replace(piece.affine, shift=piece.affine.shift - offset)
        edits = tuple(replace(edit, affine=weight) if edit.tensor == name else edit for edit in found.edits)
        assert piece.site is not None
        return replace(found, edits=edits, constants=(Constant(name, piece.site),))
    return None


def _with_bias(writer: Writer, bias: str, value: Affine, piece: Piece, base: Base, scale: float) -> Holding | None:
    """A layer of zeros but for the tensor ``bias``; a config flag creates it where the class can have it."""
    assert piece.layer is not None
    assert piece.site is not None
    prefix, path = base.prefix(piece.layer), base.layout.layer(piece.layer)
    extra = Extra(piece.layer, piece.layer)
    wanted = _new(prefix + bias, prefix, base)
    layer = {_new(name, prefix, base): base.checkpoint.tensors[name].shape for name in base.layer_tensors(piece.layer)}
    if base.has(prefix + bias):
        return Holding(_zeros(layer, wanted, value, base), {}, (Constant(wanted, piece.site, scale),), extra)
    for flag in writer.block.unlock:
        if not hasattr(base.layout.text, flag):
            continue
        changes = base.layout.change({flag: True})
        created = base.unlocked(changes)
        if created is None or f"{path}.{bias}" not in created:
            continue
        elsewhere = tuple(base.new(base.on_disk(name), shape) for name, shape in created.items())
        own = {
            _new(base.on_disk(name), prefix, base): shape
            for name, shape in created.items()
            if name.startswith(f"{path}.")
        }
        edits = (*_zeros({**layer, **own}, wanted, value, base), *elsewhere)
        return Holding(edits, changes, (Constant(wanted, piece.site, scale),), extra)
    return None


def _zeros(layer: dict[str, tuple[int, ...]], wanted: str, value: Affine, base: Base) -> tuple[Edit, ...]:
    return tuple(base.new(name, shape, value if name == wanted else None) for name, shape in layer.items())


def _new(name: str, prefix: str, base: Base) -> str:
    """The name of the same tensor in the inserted layer."""
    return f"{base.on_disk(base.layout.architecture.stack)}.{NEW}.{name.removeprefix(prefix)}"
