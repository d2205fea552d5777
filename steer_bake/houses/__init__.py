"""Re-housing: the same function under another model class that has the slots which the model's own class lacks.

Each file is a host. ``<name>(config) -> House | None``: how a model with this config is said in the host's words, or
``None`` where the host is not for its type. A rule may claim too much: before any edit ``proof`` compares both
classes on the real config, shrunk in sizes only, and refuses where they differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import registry
from ..affine import Affine
from ..architectures import Layout, layout, parse
from ..checkpoint import Checkpoint, Edit, Rows, TensorInfo
from ..errors import CheckpointError, NotFoldable
from ..representations import Base
from ..skeleton import Skeleton, skeleton

#: Fields of every config class that say what the file is, not what the model computes.
_OWN = ("architectures", "model_type", "transformers_version", "name_or_path", "auto_map")
_ROPE = ("rope_theta", "rope_scaling", "partial_rotary_factor")


@dataclass(frozen=True)
class Part:
    """A module of the host whose weight and bias are rows of those of another one, or these times a number."""

    of: str  # the source's module; how its name ends
    rows: Rows | None = None  # None: all of them
    scale: float = 1.0


@dataclass(frozen=True)
class House:
    """A model in the words of another class. Names of tensors by how they end, those of modules too."""

    model_type: str
    values: Mapping[str, Any] = field(default_factory=dict)  # of the config, where the two classes say it differently
    rename: Mapping[str, str] = field(default_factory=dict)  # in names, wherever it stands in them
    parts: Mapping[str, Part] = field(default_factory=dict)  # by the host's module
    fill: Mapping[str, float] = field(default_factory=dict)  # what new tensors hold; others hold zeros
    offset: Mapping[str, float] = field(default_factory=dict)  # what is added to tensors that the model has
    same_bits: bool = True  # in bfloat16 too; the proof holds it to that
    needs: tuple[str, ...] = ()  # what a loader must have beyond the class itself, in the words of runtimes.yaml


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
    names: Mapping[str, str]  # by the host's name: the tensor in the source that it is made of
    parts: Mapping[str, Part]  # by the host's name: what of that tensor it is, where it is not all of it
    config_changes: Mapping[str, Any]
    added: int  # how many parameters the host's class has more than the model's own
    unused: tuple[str, ...] = ()  # tensors of the source that nothing is made of

    @property
    def restated(self) -> tuple[str, ...]:
        """Tensors of the source, by the host's name, whose values change."""
        scaled = {name for name, part in self.parts.items() if part.scale != 1}
        return tuple(name for name in self.names if _ending(name, self.house.offset) or name in scaled)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Tensors of the source that the host has in other parts, if at all."""
        whole = {old for name, old in self.names.items() if self._keeps_its_place(name)}
        return tuple(one for one in dict.fromkeys([*self.names.values(), *self.unused]) if one not in whole)

    def rename(self, planned: Mapping[str, str]) -> dict[str, str]:
        """New names of the source's tensors, given the names that a plan gives those of ``base``."""
        stay = {name: old for name, old in self.names.items() if self._keeps_its_place(name)}
        found = {old: planned.get(name, name) for name, old in stay.items()}
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
        if start.source is None:
            affine = affine.without_linear()
        return replace(edit, source=start.source, affine=affine, rows=start.rows, scale=start.scale)

    def _start(self, name: str) -> Edit | None:
        """What makes a tensor of ``base`` that is not one of the source as it is."""
        info, old, part = self.base.tensors[name], self.names.get(name), self.parts.get(name)
        amount = _ending(name, self.house.fill if old is None else self.house.offset)
        if old is not None and part is None and not amount:
            return None
        made = Edit(name, info.shape, info.dtype, Affine.identity(info.shape[-1]), len(info.shape) - 1, source=old)
        if part is not None:
            made = replace(made, rows=part.rows, scale=part.scale)
        return replace(made, affine=_constant(made, amount))

    def _keeps_its_place(self, name: str) -> bool:
        """Whether a tensor of the host is one of the source: under its name or another, edited or not."""
        part = self.parts.get(name)
        return part is None or name == _renamed(self.names[name], self.house)


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
    found = rules(source, host)
    if not found:
        whose = f"the {host} class is no house" if host else "no file in houses/ has another class"
        raise NotFoldable(f"{whose} for a {source.parsed.model_type} model")
    return found


def rules(source: Layout, host: str = "") -> list[Rule]:
    """As :func:`hosts`, and none where there is none. A decoder inside a wrapper has no other class."""
    known = [registry.load("houses", host)] if host else list(registry.load_all("houses").values())
    return [] if source.path else [rule for rule in known if rule(source.parsed) is not None]


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
    names, parts = _names(base.tensors, house)
    tensors = {name: replace(base.tensors[old], name=name) for name, old in names.items()}
    for name, part in parts.items():
        info = base.tensors[names[name]]
        tensors[name] = TensorInfo(name, info.dtype, _shape(info.shape, part), "", 0, 0)
    for name in _names(source.skeleton, house)[1]:
        if source.on_disk(name) not in parts:
            raise NotFoldable(
                f"the {house.model_type} class is no house for this model: its {name} is made of a tensor that the "
                "checkpoint stores under another name"
            )
    for name, shape in missing.items():
        stored = source.on_disk(name)
        tensors.setdefault(stored, TensorInfo(stored, base.storage_dtype, shape, "", 0, 0))
    seen = replace(base, config={**base.config, **changes}, tensors=tensors)
    unused = tuple(name for name in base.tensors if name not in names.values())
    added = _count(seen) - _count(base)
    return Housed(source.layout, rule, house, seen, names, parts, changes, added, unused)


def _count(base: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in base.tensors.values())


def _renamed(name: str, house: House) -> str:
    for old, new in house.rename.items():
        name = name.replace(old, new)
    return name


def _names(tensors: Iterable[str], house: House) -> tuple[dict[str, str], dict[str, Part]]:
    """By the host's name: the source's tensor, and what of it is meant where it is not all of it."""
    names, parts = {}, {}
    for old in tensors:
        module, _, leaf = _renamed(old, house).rpartition(".")
        made = {new: part for new, part in house.parts.items() if f".{module}".endswith(f".{part.of}")}
        for new, part in made.items():
            name = f"{module.removesuffix(part.of)}{new}.{leaf}"
            names[name], parts[name] = old, part
        if not made:
            names.setdefault(f"{module}.{leaf}" if module else leaf, old)
    return names, parts


def _shape(shape: tuple[int, ...], part: Part | None) -> tuple[int, ...]:
    return shape if part is None or part.rows is None else (part.rows.stop - part.rows.start, *shape[1:])


def _missing(before: Skeleton, after: Skeleton, house: House, source: Layout) -> Skeleton:
    """What the host's class wants and the model's own does not have."""
    names, parts = _names(before, house)
    kept = {name: _shape(before[old], parts.get(name)) for name, old in names.items()}
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
    if "rope_parameters" in house.values:  # older files say it outside of that table
        changes |= dict.fromkeys([name for name in _ROPE if name in raw])
    changes |= {"model_type": house.model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[house.model_type]]}
    changes |= {key(name, name): value for name, value in house.values.items()}
    own = {name: getattr(source, name) for name in fields - {*_OWN, *house.values} if hasattr(source, name)}
    parsed = parse({**raw, **changes})
    for name, value in sorted(own.items()):
        if getattr(parsed, name, None) != value:
            changes[key(name, name)] = value
    return changes
