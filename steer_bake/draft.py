"""What the holdings chosen so far amount to: edits by tensor, config changes, inserted layers; numbered at the end."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
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
        known = self.base.checkpoint.tensors
        new = {edit.tensor: edit.shape for edit in holding.edits if edit.tensor not in known}
        for name, shape in _created(self.base, holding.config_changes).items():
            new.setdefault(self.base.on_disk(name), shape)
        return sum(math.prod(shape) for name, shape in new.items() if name not in self.edits)

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
            affine = edit.affine if before is None else before.affine.then(edit.affine)
            self.edits[name] = replace(edit, tensor=name, affine=affine)

    def complete(self) -> None:
        """Write what else the class wants after the config changes, in old and inserted layers: zeros.

        Raises:
            NotFoldable: together the changes make the class want something else than additional tensors.
        """
        base = self.base
        created = base.unlocked(self.config_changes)
        if created is None:
            raise NotFoldable(
                f"the {base.layout.model_type} class does not take these config changes together: "
                f"{self.config_changes}; bake fewer sites, or sites of one kind"
            )
        stack = base.layout.architecture.stack
        for name, shape in created.items():
            names = [base.on_disk(name)]
            for extra, mark in self.extras:
                if name.startswith(f"{base.layout.layer(extra.like)}."):
                    inside = name.removeprefix(f"{base.layout.layer(extra.like)}.")
                    names.append(f"{base.on_disk(stack)}.{mark}.{inside}")
            for one in names:
                self.edits.setdefault(one, base.new(one, shape))

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


#: What config changes create, by base: plans ask it of the same few changes for every piece.
_known: WeakKeyDictionary[Base, dict[str, Skeleton]] = WeakKeyDictionary()


def _created(base: Base, changes: Mapping[str, Any]) -> Skeleton:
    known = _known.setdefault(base, {})
    key = json.dumps(changes, sort_keys=True)
    if key not in known:
        known[key] = (base.unlocked(changes) or {}) if changes else {}
    return known[key]


def merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value
