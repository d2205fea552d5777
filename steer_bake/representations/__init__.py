"""Exact ways to hold an intervention in a checkpoint: one file each, asked in turn by the planner.

``<name>(piece: Piece, base: Base) -> Holding | None``: what holds the piece, ``None`` where this representation is not
for such a piece, or :class:`NotFoldable` with the reason where it is but the model has no room.

``TARGETS`` in such a file names the targets that it is for; most are for ``checkpoint`` alone and do not say so.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..affine import Affine
from ..architectures import SLOTS, Block, Layout, Weight
from ..checkpoint import Checkpoint, Edit
from ..errors import NotFoldable
from ..gate import Gate
from ..sites import Site
from ..skeleton import Skeleton, changed


@dataclass(frozen=True)
class Writer:
    """A weight of a block, found in the checkpoint."""

    tensor: str  # its name on disk
    weight: Weight
    block: Block
    bias: str | None  # the bias tensor on disk, where there is one
    missing: str  # below the layer, in the class: the bias that it could have


@dataclass(frozen=True, eq=False)
class Base:
    """What a plan may look at: the config, the tensors' headers and the layout. No weights."""

    checkpoint: Checkpoint
    layout: Layout
    approximate: bool = False  # whether what is only close to an intervention is asked for

    @property
    def layers(self) -> int:
        return self.layout.layers

    def has(self, tensor: str) -> bool:
        return tensor in self.checkpoint.tensors

    # --- names

    @cached_property
    def _rename(self) -> tuple[str, str]:
        """What the names of the layout begin with, and what those of this checkpoint begin with instead."""
        return self.layout.root(self.checkpoint.tensors)

    def on_disk(self, name: str) -> str:
        """The name in this checkpoint of what the class calls ``name``: some store it without the root's name."""
        old, new = self._rename
        if old and name.startswith(old):
            return new + name.removeprefix(old)
        around = new.removesuffix(old)  # a decoder stored with its head, all of it inside a multimodal model
        return around + name if old and new.endswith(f".{old}") else name

    @cached_property
    def _by_layer(self) -> dict[int, list[str]]:
        """The names of the tensors of every decoder layer, as they are on disk."""
        stack = re.escape(self.on_disk(self.layout.architecture.stack))
        pattern = re.compile(rf"{stack}\.(\d+)\.")
        found: dict[int, list[str]] = {}
        for name in self.checkpoint.tensors:
            match = pattern.match(name)
            if match:
                found.setdefault(int(match[1]), []).append(name)
        return found

    def layer_tensors(self, layer: int) -> list[str]:
        """The tensors of a decoder layer, as they are on disk."""
        return self._by_layer.get(layer, [])

    def kinds(self, layer: int) -> list[int]:
        """One layer of every other kind that there is, by the tensors they have."""
        found = {frozenset(name.removeprefix(self.prefix(layer)) for name in self.layer_tensors(layer)): layer}
        for other in range(self.layers):
            inside = frozenset(name.removeprefix(self.prefix(other)) for name in self.layer_tensors(other))
            found.setdefault(inside, other)
        return [other for other in found.values() if other != layer]

    def prefix(self, layer: int) -> str:
        """What the names of a decoder layer's tensors begin with on disk."""
        return self.on_disk(self.layout.layer(layer)) + "."

    # --- the bake column

    def writers(self, slot: str, layer: int) -> list[Writer]:
        """The weights of a slot that the checkpoint has in this layer, in the order in which the layout names them."""
        prefix, names = self.prefix(layer), self.layer_tensors(layer)
        found = []
        for block in self.layout.architecture.blocks(slot):
            own = [one for weight in block.weights for one in self._found(block, weight, prefix, names)]
            if not own and self._has_module(f"{self.layout.layer(layer)}.{block.module}"):
                raise NotFoldable(
                    f"{prefix}{block.module} writes to the stream, but the checkpoint has none of the tensors that "
                    f"architectures/ expects there for {self.layout.model_type}; describe its tensors in that file"
                )
            found += own
            if own and block.alone:
                break
        return found

    def inner(self, writer: Writer) -> list[Writer]:
        """The weights before a norm that ends a sublayer: those that ``writer``, the norm's, multiplies."""
        prefix = writer.tensor.removesuffix(writer.weight.name)
        names = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        return [one for weight in writer.block.inner for one in self._found(writer.block, weight, prefix, names)]

    def _has_module(self, path: str) -> bool:
        """Whether the class has parameters at ``path``."""
        return any(name.startswith(f"{path}.") for name in self.skeleton)

    def _found(self, block: Block, weight: Weight, prefix: str, names: list[str]) -> list[Writer]:
        found = []
        for tensor in fnmatch.filter(names, prefix + weight.name):
            stored = tensor.removesuffix("weight").rstrip("_") + "bias"
            bias = next((one for one in (stored, prefix + weight.bias) if self.has(one)), None)
            found.append(Writer(tensor, weight, block, bias, weight.bias))
        return found

    def tables(self) -> list[Writer]:
        """The weights of the embedding: the token table, then what else is added there."""
        block = self.layout.architecture.embedding
        return [
            Writer(self.on_disk(weight.name), weight, block, bias if self.has(bias) else None, "")
            for weight in block.weights
            for bias in [self.on_disk(weight.bias)]
        ]

    # --- edits

    def edit(self, tensor: str, affine: Affine, axis: int) -> Edit:
        """``affine`` applied to a tensor that the base has."""
        known = self.checkpoint.tensors[tensor]
        return Edit(tensor, known.shape, known.dtype, affine, axis, source=tensor)

    def new(self, tensor: str, shape: tuple[int, ...], affine: Affine | None = None) -> Edit:
        """A tensor that the base has not: zeros, shifted by ``affine`` along the last axis."""
        none = Affine.identity(shape[-1] if shape else 1)
        return Edit(tensor, shape, self.checkpoint.storage_dtype, affine or none, max(0, len(shape) - 1))

    # --- what the class would want

    @cached_property
    def skeleton(self) -> Skeleton:
        return self.layout.skeleton

    def flags(self, block: Block) -> list[dict[str, Any]]:
        """Changes of config.json of which one may give ``block`` its bias: single flags first, then all together."""
        known = [flag for flag in block.unlock if hasattr(self.layout.text, flag)]
        every = {
            flag
            for slot in SLOTS
            for one in self.layout.architecture.blocks(slot)
            for flag in one.unlock
            if hasattr(self.layout.text, flag)
        }
        found = [self.layout.change({flag: True}) for flag in known]
        return [*found, self.layout.change(dict.fromkeys(sorted(every), True))] if known and len(every) > 1 else found

    def after(self, changes: Mapping[str, Any]) -> Skeleton | None:
        """What the class wants after ``changes`` of the config; None where it rejects them or lacks a tensor then."""
        try:
            after = self.layout.skeleton_of(changed(self.layout.parsed, changes))
        except Exception:  # a config class rejects a combination in its own way
            return None
        return after if after.keys() >= self.skeleton.keys() else None

    def unlocked(self, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
        """What the class wants in addition after ``changes`` of the config; None where it wants anything else anew."""
        after = self.after(changes)
        if after is None or self.grown(after):
            return None
        return {name: shape for name, shape in after.items() if name not in self.skeleton}

    def grown(self, after: Skeleton) -> Skeleton:
        """Of what the class wants already, what has another shape in ``after``."""
        return {name: after[name] for name, shape in self.skeleton.items() if after[name] != shape}


@dataclass(frozen=True, eq=False)
class Gated:
    """One gate, and what it adds where it is open rather than closed."""

    gate: Gate
    shift: Tensor  # [d], in stream units
    intervention: str  # "add at resid_post.14"


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of one write that must change.

    ``weight``, ``bias``: of a writer; ``embedding``: all that is added there; ``shift``: of the stream at a site;
    ``gates``: every gate of the model, for all layers are as wide as the one with the most.
    """

    part: str
    affine: Affine  # composed from every intervention that reaches this write, in stream units
    slots: tuple[str, ...] = ()  # whose writers it concerns; of a shift: any one of them may take it
    layer: int | None = None
    writer: Writer | None = None  # of a weight or a bias
    site: Site | None = None  # of a shift: where it enters the stream
    gates: tuple[Gated, ...] = ()
    pad_to: int = 1  # of gates: what the number of neurons shall be a multiple of


@dataclass(frozen=True)
class Constant:
    """A tensor that holds a constant of the stream, rounded: the hook that is compared with the file adds the same."""

    tensor: str
    site: Site
    scale: float = 1.0  # the stream gets this times the tensor


@dataclass(frozen=True)
class Extra:
    """A decoder layer to insert. Its tensors are edits of a ``NEW`` layer; the planner numbers it."""

    after: int  # the old layer that it follows; -1: before all
    like: int  # the old layer whose kind it is of
    moved: frozenset[str] = frozenset()  # tensors of that old layer that go over to the inserted one


#: In names of tensors: for the number of an inserted layer, and for that of the old layer where tensors went over.
NEW, KEPT = "{new}", "{kept}"


@dataclass(frozen=True, eq=False)
class Holding:
    """How a piece is held. (What else a config change makes the class want, the planner adds as zeros.)"""

    edits: tuple[Edit, ...]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    constants: tuple[Constant, ...] = ()
    extra: Extra | None = None
    bit_exact: bool = False  # in the storage dtype too, it performs the hook's own addition
    demands: int = 0  # 1: runtimes must implement a bias that this family usually has not; 2: a class of another family
    approximate: bool = False  # it is close to the intervention, and the certificate says how close
    note: str = ""  # what the plan should say of it
