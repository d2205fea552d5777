"""An additional decoder layer, like an old one in kind, zero but for what is filled in."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..affine import Affine
from ..architectures import always
from ..checkpoint import Edit
from ..depth import deepened
from ..errors import NotFoldable
from ..sites import Site
from . import KEPT, NEW, Base, Constant, Extra, Holding, Piece


@dataclass(frozen=True, eq=False)
class Filled:
    """What is not zero in the layer, and where in it the vector is held."""

    tensors: dict[str, Edit]  # by name below the layer
    holds: str  # of these, the one that holds the vector
    scale: float = 1.0  # the stream gets this times that tensor
    changes: dict[str, object] = field(default_factory=dict)  # of config.json
    bit_exact: bool = False
    note: str = ""  # what the plan should say of it


@dataclass(frozen=True, eq=False)
class Inserted:
    """The layer that the additional one is like and is put behind.

    In the middle of a layer that layer is split: the first half keeps its attention, the second one its MLP.
    """

    number: int  # of the old layer
    base: Base
    site: Site  # where the vector enters the stream
    after: int  # the old layer that the new one comes after; -1: before all

    @property
    def prefix(self) -> str:
        return self.base.prefix(self.number)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor ``name`` below this layer; None where the checkpoint has none."""
        info = self.base.checkpoint.tensors.get(self.prefix + name)
        return None if info is None else info.shape

    def matching(self, pattern: str) -> list[str]:
        """The tensors below this layer that ``pattern`` names."""
        return [
            name.removeprefix(self.prefix)
            for name in fnmatch.filter(self.base.layer_tensors(self.number), self.prefix + pattern)
        ]

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

    def open_norm(self) -> dict[str, Edit]:
        """The norm before the MLP with gain 1, where the layer has one: what lets the stream through."""
        norm = f"{self.base.layout.architecture.middle}.weight"
        if self.shape(norm) != (self.base.layout.width,):
            return {}
        unit = torch.full((self.base.layout.width,), self.base.layout.architecture.unit)
        return {norm: self.base.new("", tuple(unit.shape), replace(Affine.identity(len(unit)), shift=unit))}

    @classmethod
    def behind(cls, piece: Piece, base: Base) -> Iterator[Inserted]:
        """For a shift of the stream, the kinds of layer that could be inserted, its own first; none for other pieces.

        Raises:
            NotFoldable: the architecture takes no additional layer.
        """
        first = piece.part == "embedding" and not piece.affine.is_linear
        if piece.site is None or not (first or piece.part == "shift"):
            return
        reason = base.layout.architecture.indexed
        if reason:
            raise NotFoldable(f"a {base.layout.model_type} model takes no additional layer: {reason}")
        if piece.site.point == "resid_mid" and base.layout.architecture.gains:
            raise NotFoldable(
                f"a {base.layout.model_type} layer multiplies the stream at its end: it cannot be split at {piece.site}"
            )
        own, after = (0, -1) if piece.layer is None else (piece.layer, piece.layer)
        others = [] if piece.site.point == "resid_mid" else base.kinds(own)  # half of a layer is of its own kind
        refused: list[NotFoldable] = []
        for like in (own, *others):
            try:
                _check_order(base, after, like)
            except NotFoldable as why:
                refused.append(why)
                continue
            yield cls(like, base, piece.site, after)
        if len(refused) == 1 + len(others):
            raise refused[0]

    @property
    def split(self) -> bool:
        return self.site.point == "resid_mid"

    def holding(self, filled: Filled) -> Holding:
        base, stack = self.base, self.base.on_disk(self.base.layout.architecture.stack)
        names = {name.removeprefix(self.prefix) for name in base.layer_tensors(self.number)}
        gains = {name: self._one(name) for name in base.layout.architecture.gains if name in names}
        filled = replace(filled, tensors={**gains, **filled.tensors})
        second = {name for name in names if self.split and self._of_mlp(name)}
        edits = [replace(edit, tensor=f"{stack}.{NEW}.{name}") for name, edit in filled.tensors.items()]
        for name in sorted(names - second - {*filled.tensors}):
            edits.append(base.new(f"{stack}.{NEW}.{name}", self.shape(name) or ()))
        for name in sorted(second):
            edits.append(base.new(f"{stack}.{KEPT}.{name}", self.shape(name) or ()))
        extra = Extra(self.after, self.number, frozenset(self.prefix + name for name in second))
        constant = Constant(f"{stack}.{NEW}.{filled.holds}", self.site, filled.scale)
        return Holding(
            tuple(edits),
            filled.changes,
            (constant,),
            extra,
            bit_exact=filled.bit_exact,
            demands=int(bool(filled.changes)),
            note=filled.note,
        )

    def _one(self, name: str) -> Edit:
        shape = self.shape(name) or (1,)
        ones = replace(Affine.identity(shape[-1]), shift=torch.ones(shape[-1]))
        return self.base.new("", shape, ones)

    def _of_mlp(self, name: str) -> bool:
        """Whether a tensor belongs to the half of the layer that reads resid_mid."""
        architecture = self.base.layout.architecture
        blocks = [block.module for block in architecture.mlp] + [
            one.name for block in architecture.mlp for one in (*block.weights, *block.inner)
        ]
        heads = {architecture.middle, *(path.partition(".")[0] for path in blocks)} - {""}
        return name.partition(".")[0] in heads


def _check_order(base: Base, after: int, like: int) -> None:
    """Raises NotFoldable where the class makes no layer of the kind of ``like`` behind the layer ``after``."""
    architecture, layers = base.layout.architecture, range(base.layers)
    if not architecture.bystander(base.layout.text, like) or (after < 0 and architecture.bystander is not always):
        raise NotFoldable(
            f"an additional layer of the kind of layer {like} of this {base.layout.model_type} model would change what "
            "later layers read beside the stream"
        )
    deepened(base.layout, [*layers[: after + 1], like, *layers[after + 1 :]])
