"""A shift, held by one more decoder layer that adds exactly the vector and nothing else.

Everything in it is zero but the bias of one of its writers; or the bias of its value projection, which every position
attends to alike, and one column behind it; or, where a norm ends the sublayer, the weight of that norm, which makes
ones of a constant. The layer performs the hook's own addition.

In the middle of a layer the layer is split: the first half keeps its attention, the second its MLP and adds the vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..affine import Affine
from ..checkpoint import Edit
from ..errors import NotFoldable
from . import KEPT, NEW, Base, Constant, Extra, Holding, Piece, Writer

#: What a norm is given to make ones of: so large that its epsilon does not show.
_LOUD = 64.0


def carrier(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "shift" or piece.site is None or piece.layer is None:
        return None
    reason = base.layout.architecture.indexed
    if reason:
        raise NotFoldable(f"a {base.layout.model_type} model takes no additional layer: {reason}")
    here = _Layer(piece.layer, base, split=piece.site.point == "resid_mid")
    slots = ("attention",) if here.split else ("attention", "mlp")
    for writer in [one for slot in slots for one in base.writers(slot, piece.layer)]:
        for constant in _constants(writer, piece.affine, here):
            return here.holding(constant, replace(constant.constant, site=piece.site))
    raise NotFoldable(
        f"no writer of a {base.layout.model_type} layer could hold the vector in an additional layer: none has a bias, "
        "and no config flag creates one"
    )


@dataclass(frozen=True, eq=False)
class _Filled:
    """What is not zero in the additional layer, by name below it, and what its class must be told."""

    tensors: dict[str, Edit]
    changes: dict[str, object]
    constant: Constant  # its tensor: a name below the layer


@dataclass(frozen=True, eq=False)
class _Layer:
    """The layer that the additional one is like, and is put behind."""

    number: int
    base: Base
    split: bool

    @property
    def prefix(self) -> str:
        return self.base.prefix(self.number)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor ``name`` below this layer; None where the checkpoint has none."""
        info = self.base.checkpoint.tensors.get(self.prefix + name)
        return None if info is None else info.shape

    def bias(self, stored: str, missing: str) -> tuple[str, tuple[int, ...], dict[str, object]] | None:
        """The name below the layer, the shape and the config changes of a bias that the checkpoint or a flag has."""
        found = self.shape(stored)
        if found is not None:
            return stored, found, {}
        for block in [one for slot in ("attention", "mlp") for one in self.base.layout.architecture.blocks(slot)]:
            for changes in self.base.flags(block):
                created = self.base.unlocked(changes) or {}
                wanted = f"{self.base.layout.layer(self.number)}.{missing}"
                if wanted in created:
                    return missing, created[wanted], changes
        return None

    def holding(self, filled: _Filled, constant: Constant) -> Holding:
        base, stack = self.base, self.base.on_disk(self.base.layout.architecture.stack)
        names = {name.removeprefix(self.prefix) for name in base.layer_tensors(self.number)}
        second = {name for name in names if self.split and self._of_mlp(name)}
        edits = [replace(edit, tensor=f"{stack}.{NEW}.{name}") for name, edit in filled.tensors.items()]
        for name in sorted(names - second - {*filled.tensors}):
            edits.append(base.new(f"{stack}.{NEW}.{name}", self.shape(name) or ()))
        for name in sorted(second):
            edits.append(base.new(f"{stack}.{KEPT}.{name}", self.shape(name) or ()))
        moved = frozenset(self.prefix + name for name in second)
        extra = Extra(self.number, self.number, moved)
        held = replace(constant, tensor=f"{stack}.{NEW}.{constant.tensor}")
        return Holding(tuple(edits), filled.changes, (held,), extra)

    def _of_mlp(self, name: str) -> bool:
        """Whether a tensor belongs to the half of the layer that reads resid_mid."""
        architecture = self.base.layout.architecture
        blocks = [block.module for block in architecture.mlp] + [
            one.name for block in architecture.mlp for one in (*block.weights, *block.inner)
        ]
        heads = {architecture.middle, *(path.partition(".")[0] for path in blocks)} - {""}
        return name.partition(".")[0] in heads


def _constants(writer: Writer, affine: Affine, layer: _Layer) -> Iterator[_Filled]:
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
        yield _Filled({name: layer.base.new("", shape, own)}, changes, _at(name, scale))
    yield from _through_values(writer, own, scale, layer)


def _through_values(writer: Writer, affine: Affine, scale: float, layer: _Layer) -> Iterator[_Filled]:
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
        yield _Filled({bias[0]: one, name: column}, bias[2], _at(name, scale))


def _behind_norm(writer: Writer, affine: Affine, layer: _Layer) -> Iterator[_Filled]:
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
        for found in _constants(behind, ones, layer):
            yield replace(
                found, tensors={**found.tensors, writer.weight.name: norm}, constant=_at(writer.weight.name, 1.0)
            )


def _at(name: str, scale: float) -> Constant:
    from ..sites import Site

    return Constant(name, Site("resid_post", 0), scale)
