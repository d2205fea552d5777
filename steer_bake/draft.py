"""What the holdings chosen so far amount to: edits by tensor, config changes, inserted layers; numbered at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

from .checkpoint import Edit
from .depth import deepened
from .errors import NotFoldable
from .representations import KEPT, NEW, Base, Constant, Extra, Holding
from .skeleton import Skeleton

#: Edits, config changes, constants, new names, and for every old layer the new numbers of its halves.
Numbered = tuple[tuple[Edit, ...], dict[str, Any], tuple[Constant, ...], dict[str, str], tuple[tuple[int, int], ...]]


@dataclass
class Draft:
    """What the holdings chosen so far amount to."""

    base: Base
    edits: dict[str, Edit] = field(default_factory=dict)
    config_changes: dict[str, Any] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    extras: list[tuple[Extra, str]] = field(default_factory=list)  # and what its number is written as so far

    def size(self, holding: Holding) -> int:
        """How many parameters ``holding`` would add to the model."""
        known, already = self.base.checkpoint.tensors, _created(self.base, self.config_changes)
        new = {edit.tensor: edit.shape for edit in holding.edits if edit.tensor not in known}
        for name, shape in _created(self.base, holding.config_changes).items():
            new.setdefault(self.base.on_disk(name), shape)
        there = {*self.edits, *map(self.base.on_disk, already)}
        kept = [edit for edit in holding.edits if edit.tensor in known]
        longer = sum(math.prod(edit.shape) - math.prod(known[edit.tensor].shape) for edit in kept)
        return longer + sum(math.prod(shape) for name, shape in new.items() if name not in there)

    def add(self, holding: Holding) -> None:
        mark = f"+{len(self.extras)}"
        if holding.extra is not None:
            self.extras.append((holding.extra, mark))
        merge(self.config_changes, holding.config_changes)

        def named(name: str) -> str:
            return name.replace(NEW, mark).replace(KEPT, f"{mark}-")

        self.constants += [replace(one, tensor=named(one.tensor)) for one in holding.constants]
        for edit in holding.edits:
            name = named(edit.tensor)
            before = self.edits.get(name)
            self.edits[name] = replace(edit if before is None else _both(before, edit), tensor=name)

    def complete(self) -> None:
        """Write what else the class wants after the config changes, in old and inserted layers: zeros.

        Raises:
            NotFoldable: together the changes make the class want something else than additional tensors.
        """
        base = self.base
        after = base.after(self.config_changes)
        grown = {} if after is None else base.grown(after)
        if after is None or any(self._shape(base.on_disk(name)) != shape for name, shape in grown.items()):
            raise NotFoldable(
                f"the {base.layout.model_type} class does not take these config changes together: "
                f"{self.config_changes}; bake fewer sites, or sites of one kind"
            )
        for name, shape in after.items():
            if name not in base.skeleton:
                for one in (base.on_disk(name), *self._inserted(name)):
                    self.edits.setdefault(one, base.new(one, shape))
        if grown and any(extra.moved for extra, _ in self.extras):
            raise NotFoldable("a layer that is split does not go together with gates; steer at 'resid_post' instead")
        for name, shape in grown.items():
            for one in self._inserted(name):
                self.edits[one] = _longer(self.edits[one], shape, base)

    def _shape(self, tensor: str) -> tuple[int, ...]:
        return self.edits[tensor].shape if tensor in self.edits else ()

    def _inserted(self, name: str) -> Iterator[str]:
        """The names, so far, of the tensors of inserted layers that are what ``name`` is in the layer they are like."""
        base = self.base
        for extra, mark in self.extras:
            start = f"{base.layout.layer(extra.like)}."
            if name.startswith(start):
                yield f"{base.on_disk(base.layout.architecture.stack)}.{mark}.{name.removeprefix(start)}"

    def numbered(self) -> Numbered:
        """Edits, config changes and constants under the final numbers of the layers, the new names, and those numbers.

        The last: for every old layer the new numbers of its first and its last half, where layers were inserted.
        """
        base = self.base
        if not self.extras:
            return tuple(self.edits.values()), self.config_changes, tuple(self.constants), {}, ()
        order: list[int] = []
        numbers: dict[str, int] = {}  # by how a layer is written so far
        for old in range(-1, base.layers):
            if old >= 0:
                numbers[str(old)] = len(order)
                order.append(old)
            here = [(extra, mark) for extra, mark in self.extras if extra.after == old]
            for extra, mark in sorted(here, key=lambda one: not one[0].moved):  # the second half of a layer comes first
                numbers[mark], numbers[f"{mark}-"] = len(order), numbers.get(str(old), 0)
                order.append(extra.like)
        stack = base.on_disk(base.layout.architecture.stack)
        gone = {name: mark for extra, mark in self.extras for name in extra.moved}

        def final(name: str) -> str:
            if not name.startswith(f"{stack}."):
                return name
            written, _, rest = name.removeprefix(f"{stack}.").partition(".")
            return f"{stack}.{numbers[gone.get(name, written)]}.{rest}"

        renamed = {name: final(name) for old in range(base.layers) for name in base.layer_tensors(old)}
        rename = {old: new for old, new in renamed.items() if old != new}
        edits = tuple(replace(edit, tensor=final(edit.tensor)) for edit in self.edits.values())
        constants = tuple(replace(one, tensor=final(one.tensor)) for one in self.constants)
        merge(self.config_changes, deepened(base.layout, order))
        halves = {extra.like: numbers[mark] for extra, mark in self.extras if extra.moved}
        moved = tuple((numbers[str(old)], halves.get(old, numbers[str(old)])) for old in range(base.layers))
        return edits, self.config_changes, constants, rename, moved


def _both(one: Edit, other: Edit) -> Edit:
    """``one`` and then ``other``, of the same tensor."""
    last = one if other.affine.is_identity else other
    grown = one if other.appended is None else other
    return replace(
        other, affine=one.affine.then(other.affine), axis=last.axis, shape=grown.shape, appended=grown.appended
    )


def _longer(edit: Edit, shape: tuple[int, ...], base: Base) -> Edit:
    """A tensor of an inserted layer in a model with more neurons: zeros behind what it holds."""
    if edit.affine.is_identity and not edit.diagonals and edit.source is None:
        return base.new(edit.tensor, shape)
    if edit.source is not None or edit.shape == shape or shape[edit.axis] != edit.shape[edit.axis]:
        raise NotFoldable(f"an inserted layer whose {edit.tensor} is filled does not go together with gates")
    return replace(edit, shape=shape)


#: What config changes create, by base: plans ask it of the same few changes for every piece.
_known: WeakKeyDictionary[Base, dict[str, Skeleton]] = WeakKeyDictionary()


def _created(base: Base, changes: Mapping[str, Any]) -> Skeleton:
    known = _known.setdefault(base, {})
    key = json.dumps(changes, sort_keys=True)
    if key not in known:
        after = base.after(changes) if changes else None
        known[key] = {name: shape for name, shape in (after or {}).items() if name not in base.skeleton}
    return known[key]


def merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value
