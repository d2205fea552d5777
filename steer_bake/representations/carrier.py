"""A shift, held by one more decoder layer that adds exactly the vector and nothing else.

Everything in it is zero but the bias of one of its writers; or the bias of its value projection, which every position
attends to alike, and one column behind it; or, where a norm ends the sublayer, the weight of that norm, which makes
ones of a constant. The layer performs the hook's own addition.

In the middle of a layer the layer is split: the first half keeps its attention, the second its MLP and adds the vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..affine import Affine
from ..architectures import Weight, gates
from ..errors import NotFoldable
from . import Base, Holding, Piece, Writer
from ._inserted import Filled, Inserted

#: What a norm is given to make ones of: so large that its epsilon does not show.
_LOUD = 64.0


def carrier(piece: Piece, base: Base) -> Holding | None:
    layers = list(Inserted.behind(piece, base))
    if not layers:
        return None
    for layer in layers:
        slots = ("attention",) if layer.split else ("attention", "mlp")
        for writer in [one for slot in slots for one in base.writers(slot, layer.number)]:
            for filled in _constants(writer, piece.affine, layer):
                return layer.holding(filled)
    raise NotFoldable(
        f"no writer of a {base.layout.model_type} layer could hold the vector in an additional layer: none has a bias, "
        "and no config flag creates one"
    )


def _constants(writer: Writer, affine: Affine, layer: Inserted) -> Iterator[Filled]:
    """Ways to make ``writer``'s sublayer put out the shift of ``affine`` whatever it reads."""
    if writer.block.inner:
        yield from _behind_norm(writer, affine, layer)
        return
    if not writer.weight.whole:
        return
    scale = writer.weight.scale(layer.base.layout.text)
    own = affine.divided_by(scale)
    bias = layer.bias((writer.bias or "").removeprefix(layer.prefix), writer.missing)
    if bias is not None:
        name, shape, changes = bias
        yield Filled({name: layer.base.new("", shape, own)}, name, scale, changes, bit_exact=scale == 1.0)
    yield from _through_values(writer, own, scale, layer)


def _through_values(writer: Writer, affine: Affine, scale: float, layer: Inserted) -> Iterator[Filled]:
    """Attention weights sum to 1: a value that is everywhere 1 is 1 after attention, and one column carries on."""
    value, name = layer.base.layout.architecture.value, writer.weight.name
    inside, shape = layer.shape(f"{value}.weight"), layer.shape(name)
    if not value or inside is None or shape is None or value.partition(".")[0] != name.partition(".")[0]:
        return
    bias = layer.bias(f"{value}.bias", f"{value}.bias")
    if bias is not None:
        first = torch.zeros(inside[0])
        first[0] = 1.0
        one = layer.base.new("", inside[:1], replace(Affine.identity(inside[0]), shift=first))
        column = replace(layer.base.new("", shape, affine), axis=writer.weight.axis, only=(0, 1))
        yield Filled({bias[0]: one, name: column}, name, scale, bias[2], bit_exact=scale == 1.0)


def _behind_norm(writer: Writer, affine: Affine, layer: Inserted) -> Iterator[Filled]:
    """The norm at the sublayer's end turns any constant times ones into ones, and multiplies by its weight."""
    width = layer.base.layout.width
    ones = replace(Affine.identity(width), shift=torch.full((width,), _LOUD))
    offset = torch.full((width,), writer.weight.offset)
    norm = layer.base.new("", (width,), replace(affine, shift=affine.shift - offset))
    for inner in writer.block.inner:
        if layer.shape(inner.name) is None:
            continue
        stored = layer.prefix + inner.bias
        behind = Writer(
            layer.prefix + inner.name,
            inner,
            replace(writer.block, inner=()),
            stored if layer.base.has(stored) else None,
            inner.bias,
        )
        loud = [*_constants(behind, ones, layer), *_positive(inner, ones, layer)]
        for found in loud:
            held = writer.weight
            tensors = {**found.tensors, held.name: norm}
            yield Filled(tensors, held.name, 1.0, found.changes, bit_exact=held.offset == 0.0)


def _positive(inner: Weight, ones: Affine, layer: Inserted) -> Iterator[Filled]:
    """A gated MLP whose gate and up are the same puts out a sum of ``t act(t)``, which is never negative."""
    shape = layer.shape(inner.name)
    for names in gates(inner.name):
        inside = layer.shape(names[0])
        if shape is None or inside is None or len(names) != 2 or layer.shape(names[1]) != inside:
            continue
        same = layer.base.edit(layer.prefix + names[0], Affine.identity(inside[1]), 1)
        down = replace(layer.base.new("", shape, ones), axis=inner.axis)
        yield Filled({**dict.fromkeys(names, same), inner.name: down, **layer.open_norm()}, inner.name)
