"""Re-housing: the same function under another model class that has the slots which the model's own class lacks.

Each file is a host. ``<name>(config) -> House | None``: how a model with this config is said in the host's words, or
``None`` where the host is not for its type. A rule may claim too much: before any edit ``proof`` compares both
classes on the real config, shrunk in sizes only, and refuses where they differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import registry
from ..affine import Affine
from ..architectures import Layout, layout, parse
from ..checkpoint import Checkpoint, Edit, TensorInfo
from ..errors import CheckpointError, NotFoldable
from ..representations import Base
from ..skeleton import Skeleton, skeleton

#: Fields of every config class that say what the file is, not what the model computes.
_OWN = ("architectures", "model_type", "transformers_version", "name_or_path", "auto_map")


@dataclass(frozen=True)
class House:
    """A model in the words of another class. Names of tensors by how they end."""

    model_type: str
    values: Mapping[str, Any] = field(default_factory=dict)  # of the config, where the two classes say it differently
    rename: Mapping[str, str] = field(default_factory=dict)
    fill: Mapping[str, float] = field(default_factory=dict)  # what new tensors hold; others hold zeros
    offset: Mapping[str, float] = field(default_factory=dict)  # what is added to tensors that the model has
    split: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # by the tensor: what its rows are there
    same_bits: bool = True  # in bfloat16 too; the proof holds it to that


def head_dim(config: PretrainedConfig) -> int:
    """How many components a head has."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


Rule = Callable[[PretrainedConfig], "House | None"]


@dataclass(frozen=True, eq=False)
class Housed:
    """A checkpoint as the host's class sees it."""

    source: Layout
    rule: Rule
    house: House
    base: Checkpoint  # the host's config and names; tensors that are not there yet have no file
    names: Mapping[str, str]  # by the host's name: the tensor in the source
    config_changes: Mapping[str, Any]
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # by the host's name: the rows of that tensor

    @property
    def dropped(self) -> tuple[str, ...]:
        """Tensors of the source that the host's class has in parts only."""
        return tuple(dict.fromkeys(self.names[name] for name in self.parts))

    @property
    def added(self) -> int:
        """How many parameters the host's class has and the model's own has not."""
        return sum(math.prod(info.shape) for name, info in self.base.tensors.items() if name not in self.names)

    @property
    def restated(self) -> tuple[str, ...]:
        """Tensors of the source, by the host's name, whose values change."""
        return tuple(name for name in self.names if _ending(name, self.house.offset))

    def rename(self, planned: Mapping[str, str]) -> dict[str, str]:
        """New names of the source's tensors, given the names that a plan gives those of ``base``."""
        whole = {name: old for name, old in self.names.items() if name not in self.parts}
        found = {old: planned.get(name, name) for name, old in whole.items()}
        return {old: new for old, new in found.items() if old != new}

    def edits(self, planned: Sequence[Edit], renamed: Mapping[str, str]) -> tuple[Edit, ...]:
        """Edits of ``base`` as edits of the source, and with them what the host's class wants besides."""
        found = {edit.tensor: self._of_source(edit) for edit in planned}
        for name in self.base.tensors:
            start, final = self._start(name), renamed.get(name, name)
            if start is not None and final not in found:
                found[final] = replace(start, tensor=final)
        return tuple(found.values())

    def _of_source(self, edit: Edit) -> Edit:
        if edit.source is None:  # of an inserted layer: what is filled in old layers is filled in that one
            fill = _ending(edit.tensor, self.house.fill)
            return replace(edit, affine=_constant(edit, fill)) if fill and edit.affine.is_identity else edit
        start = self._start(edit.source)
        if start is None:
            return replace(edit, source=self.names[edit.source])
        affine = edit.affine if start.affine.is_identity else start.affine.then(edit.affine)
        affine = affine.without_linear() if start.source is None else affine
        return replace(edit, source=start.source, affine=affine, part=start.part)

    def _start(self, name: str) -> Edit | None:
        """What makes a tensor of ``base`` that is not one of the source as it is."""
        info, old = self.base.tensors[name], self.names.get(name)
        amount = _ending(name, self.house.fill if old is None else self.house.offset)
        part = self.parts.get(name)
        if old is not None and not amount and part is None:
            return None
        identity = Affine.identity(info.shape[-1])
        made = Edit(name, info.shape, info.dtype, identity, len(info.shape) - 1, source=old, part=part)
        return replace(made, affine=_constant(made, amount))


def _constant(edit: Edit, amount: float) -> Affine:
    return replace(edit.affine, shift=torch.full((edit.affine.width,), amount))


def _ending(name: str, values: Mapping[str, float]) -> float:
    return next((value for ending, value in values.items() if name.endswith(ending)), 0.0)


def hosts(base: Checkpoint, host: str = "") -> list[Rule]:
    """The rules that claim ``base``; of these the one for the type ``host`` only, where one is given.

    Raises:
        NotFoldable: none does.
        RecipeError: no host is called so.
    """
    source = layout(base.config)
    rules = [registry.load("houses", host)] if host else list(registry.load_all("houses").values())
    found = [] if source.path else [rule for rule in rules if rule(source.parsed) is not None]
    if not found:
        whose = f"the {host} class is no house" if host else "no file in houses/ has another class"
        raise NotFoldable(f"{whose} for a {source.parsed.model_type} model")
    return found


def housed(base: Checkpoint, rule: Rule) -> Housed:
    """``base`` in the words of another class: config and headers only.

    Raises:
        NotFoldable: the host's class is not for this model: it rejects its config, or has no place for a tensor.
    """
    source = Base(base, layout(base.config))
    house = rule(source.layout.parsed)
    if house is None:
        raise NotFoldable(f"the class asked for is no house for a {source.layout.model_type} model")
    try:
        changes = _config_changes(source.layout.parsed, house, base.config)
        wanted = skeleton(parse({**base.config, **changes}))
    except CheckpointError as error:
        raise NotFoldable(f"the {house.model_type} class is no house for this model: {error}") from error
    missing = _missing(source.skeleton, wanted, house, source.layout)
    parts = {name: part for old in base.tensors for name, part in _parts(old, base.tensors[old].shape, house, wanted)}
    names = {one: name for name in base.tensors for one in _renamed(name, house)}
    tensors = {name: replace(base.tensors[old], name=name) for name, old in names.items()}
    for name, (first, stop) in parts.items():
        tensors[name] = replace(tensors[name], shape=(stop - first, *tensors[name].shape[1:]))
    for name, shape in missing.items():
        stored = source.on_disk(name)
        tensors.setdefault(stored, TensorInfo(stored, base.storage_dtype, shape, "", 0, 0))
    seen = replace(base, config={**base.config, **changes}, tensors=tensors)
    return Housed(source.layout, rule, house, seen, names, changes, parts)


def _renamed(name: str, house: House) -> tuple[str, ...]:
    """What a tensor is called in the host's class; several names where it is in parts there."""
    for old, several in house.split.items():
        if name.endswith(old):
            return tuple(name.removesuffix(old) + new for new in several)
    for old, new in house.rename.items():
        if name.endswith(old):
            return (name.removesuffix(old) + new,)
    return (name,)


def _parts(name: str, shape: tuple[int, ...], house: House, wanted: Skeleton) -> Iterator[tuple[str, tuple[int, int]]]:
    """The rows of a tensor that the host's class has as tensors of their own.

    Raises:
        NotFoldable: they are not all of it.
    """
    several, first = _renamed(name, house), 0
    if len(several) == 1:
        return
    for one in several:
        rows = wanted[one][0] if one in wanted else 0
        yield one, (first, first + rows)
        first += rows
    if first != shape[0]:
        raise NotFoldable(
            f"{name} has {shape[0]} rows, and {', '.join(several)} of the {house.model_type} class have {first}"
        )


def _missing(before: Skeleton, after: Skeleton, house: House, source: Layout) -> Skeleton:
    """What the host's class wants and the model's own does not have."""
    kept = {
        one: (wanted[1] - wanted[0], *shape[1:]) if wanted else shape
        for name, shape in before.items()
        for parts in [dict(_parts(name, shape, house, after))]
        for one in _renamed(name, house)
        for wanted in [parts.get(one)]
    }
    homeless = next((name for name, shape in kept.items() if after.get(name) != shape), None)
    if homeless is not None:
        there = f"which is {list(after[homeless])} there" if homeless in after else "which is not there"
        raise NotFoldable(
            f"a {source.model_type} model has no place in the {house.model_type} class: it has {homeless} "
            f"{list(kept[homeless])}, {there}"
        )
    return {name: shape for name, shape in after.items() if name not in kept}


def _config_changes(source: PretrainedConfig, house: House, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of config.json: what both classes call alike stays, and defaults that differ are written out.

    What only the source's class reads would mislead a reader of the file; a merge cannot remove a key, so it is null.
    """
    kind = CONFIG_MAPPING[house.model_type]
    fields = {one.name for one in dataclasses.fields(kind)}
    key = kind.attribute_map.get
    only_there = {one.name for one in dataclasses.fields(source)} | {*source.attribute_map}
    changes: dict[str, Any] = dict.fromkeys([one for one in raw if one in only_there - fields - {*kind.attribute_map}])
    if "auto_map" in raw:
        changes["auto_map"] = {}  # loaders look for names in it
    changes |= {"model_type": house.model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[house.model_type]]}
    changes |= {key(name, name): value for name, value in house.values.items()}
    own = {name: getattr(source, name) for name in fields - {*_OWN, *house.values} if hasattr(source, name)}
    parsed = parse({**raw, **changes})
    for name, value in sorted(own.items()):
        if getattr(parsed, name, None) != value:
            changes[key(name, name)] = value
    return changes
