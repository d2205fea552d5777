"""What a model can hold and how: site by operation by representation, with what each costs and where it loads.

Computed from config.json alone, or from the headers where there are any. The vector is a made-up one: nothing that is
shown depends on it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from . import architectures
from .architectures import SLOTS, Layout
from .checkpoint import Checkpoint, TensorInfo
from .direction import Direction
from .draft import Draft
from .errors import CheckpointError, NotFoldable, RecipeError, UnknownArchitecture
from .gate import Gate
from .houses import House, Rule, housed, rules
from .interventions import Intervention, intervene
from .models import open_base, read_config
from .plan import PREFERENCES, Offer, choose, offers
from .representations import Base
from .runtimes import runtimes
from .sites import READ_POINTS, Site, parse_sites
from .skeleton import stored

OPERATIONS = ("add", "ablate", "clamp")
GATE = "gate"  # an addition behind a probe of what is read at the site
#: Of a model type that no file in architectures/ claims.
NEVER_BAKED = "not described: can be read and steered with hooks, is never baked"

_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}


@dataclass(frozen=True)
class Option:
    """One exact way to hold an intervention, and its price."""

    representation: str  # several are joined by " + ": an ablation is a rank-one edit here and embedding rows there
    preferred_by: tuple[str, ...]  # the values of ``prefer`` that choose it
    parameters: int  # that it adds to the model
    share: float  # of the model's parameters
    layers: int  # that it adds
    bit_exact: bool  # in the storage dtype too, it performs the hook's own addition
    demands: int  # as of a Holding
    config_changes: Mapping[str, Any]
    needs: tuple[str, ...]  # features that a loader must have beyond the base's
    loads: Mapping[str, bool | None]  # by runtime; None is unknown
    note: str = ""

    @property
    def is_default(self) -> bool:
        return "smallest" in self.preferred_by

    def as_json(self) -> dict[str, Any]:
        return {
            "representation": self.representation,
            "default": self.is_default,
            "preferred_by": list(self.preferred_by),
            "parameters": self.parameters,
            "share": self.share,
            "layers": self.layers,
            "bit_exact": self.bit_exact,
            "demands": self.demands,
            "config_changes": dict(self.config_changes),
            "needs": list(self.needs),
            "loads": dict(self.loads),
            "note": self.note,
        }


@dataclass(frozen=True)
class Row:
    """One operation at one site (or at all layers): the ways to hold it, or why there is none."""

    sites: str  # "resid_post.14"; "resid_post" for every layer
    operation: str
    options: tuple[Option, ...]
    refused: Mapping[str, str] = field(default_factory=dict)  # by representation; "" is for all of them


@dataclass(frozen=True)
class Claim:
    """Another model class that a file in houses/ says is the same function. It is proven before a bake, not here."""

    model_type: str
    sites: str  # what is held there, as an example: that of the first row
    operation: str
    same_bits: bool  # in bfloat16 too
    option: Option | None  # the smallest there; its parameters are with those that the class itself adds
    refused: str = ""  # why there is none

    def as_json(self) -> dict[str, Any]:
        return {
            "model_type": self.model_type,
            "proven": "before a bake",
            "sites": self.sites,
            "operation": self.operation,
            "same_bits": self.same_bits,
            "option": None if self.option is None else self.option.as_json(),
            "refused": self.refused,
        }


@dataclass(frozen=True)
class Explanation:
    """Everything :func:`explain` found."""

    model: str
    model_type: str
    read: str  # "headers" or "config": what the names and shapes of the tensors are from
    described: bool
    parameters: int
    layers: int
    width: int
    layout: Mapping[str, Any]  # what of the stream is known: the stack, the blocks, whether they are parallel
    rows: tuple[Row, ...]
    note: str = ""
    houses: tuple[Claim, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_type": self.model_type,
            "read": self.read,
            "described": self.described,
            "parameters": self.parameters,
            "layers": self.layers,
            "width": self.width,
            "layout": dict(self.layout),
            "note": self.note,
            "rows": [
                {
                    "sites": row.sites,
                    "operation": row.operation,
                    "options": [one.as_json() for one in row.options],
                    "refused": dict(row.refused),
                }
                for row in self.rows
            ],
            "houses": [one.as_json() for one in self.houses],
        }


def explain(
    model: str, sites: Sequence[str] = (), *, progress: Callable[[int, int], None] | None = None
) -> Explanation:
    """What can be held by ``model``: a hub id, a folder, a packaged name, or a bare model type such as ``gemma2``.

    Where its tensors' headers are to be had they say what is there; otherwise the class does, asked with the config.
    ``sites`` are like those of a recipe (``resid_post.14``, ``writes``); by default the middle of the model and more.

    Raises:
        CheckpointError: there is no such model or type, or its class rejects the config.
        RecipeError: a site that the model has not.
    """
    name, base, read = _opened(model)
    try:
        layout = architectures.layout(base.config)
    except UnknownArchitecture:
        return _undescribed(name, base, read)
    view, total = Base(base, layout), _total(base)
    asked = [
        (label, operation, places)
        for label, places in _places(sites, layout.layers)
        for operation in _operations(places[0])
    ]
    rows = []
    for done, (label, operation, places) in enumerate(asked):
        rows.append(_row(label, operation, places, view, total))
        if progress is not None:
            progress(done + 1, len(asked))
    houses = _houses(asked[0], view, total) if asked else ()
    for one, row in zip(asked[1:], rows[1:], strict=True):
        if row.operation == GATE and not row.options:
            houses += _houses(one, view, total)
    return Explanation(
        name,
        layout.model_type,
        read,
        True,
        total,
        layout.layers,
        layout.width,
        _described(layout),
        tuple(rows),
        houses=houses,
    )


# --- the base


def _opened(model: str) -> tuple[str, Checkpoint, str]:
    if model in CONFIG_MAPPING and not Path(model).is_dir():
        return model, _from_config(model, {"model_type": model}), "config"
    try:
        ref, base = open_base(model, weights=False)
        return ref.name, base, "headers"
    except CheckpointError:
        damaged = any(Path(model).expanduser().glob("*.safetensors"))
        config = None if damaged else read_config(model)
        if config is None:
            raise
    return model, _from_config(model, config), "config"


def _from_config(name: str, config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint with the names and shapes that the class of ``config`` would save, and without weights."""
    parsed = architectures.parse(config)
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch."), "BF16")
    tensors = {
        name: TensorInfo(name, dtype, shape, "", 0, math.prod(shape) * _BITS[dtype] // 8)
        for name, shape in stored(parsed).items()
    }
    return Checkpoint(Path(name), {**parsed.to_dict(), **config}, tensors, (), {}, {})


def _undescribed(name: str, base: Checkpoint, read: str) -> Explanation:
    """What shows of a model that is never baked."""
    parsed = architectures.parse(base.config)
    text = parsed.get_text_config(decoder=True)
    try:
        layout, note = _described(architectures.layout_tried(parsed)), NEVER_BAKED
        if not any(layout[slot] for slot in SLOTS):
            note += "; what its layers write apart does not show, so that resid_pre and resid_post are the sites"
    except UnknownArchitecture as error:
        layout, note = {}, f"{NEVER_BAKED}, if at all ({error})"
    layers, width = int(text.num_hidden_layers), int(text.hidden_size)
    return Explanation(name, parsed.model_type, read, False, _total(base), layers, width, layout, (), note)


def _total(base: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in base.tensors.values())


def _described(layout: Layout) -> dict[str, Any]:
    architecture = layout.architecture
    return {
        "stack": architecture.stack,
        **{slot: [block.module for block in architecture.blocks(slot)] for slot in SLOTS},
        "parallel": layout.parallel,
    }


# --- rows


def _places(sites: Sequence[str], layers: int) -> list[tuple[str, list[Site]]]:
    """What is asked, as it is shown, and the sites that it means."""
    middle = layers // 2
    wanted = sites or (
        f"resid_post.{middle}",
        "resid_post",
        f"resid_mid.{middle}",
        f"attn_out.{middle}",
        f"mlp_out.{middle}",
        f"mlp_in.{middle}",
        "resid_pre.0",
        "writers",
        "writes",
    )
    return [(text, parse_sites(text, layers)) for text in wanted]


def _operations(site: Site) -> Sequence[str]:
    if site.point in READ_POINTS:
        return (GATE,)
    return OPERATIONS if site.layer is not None else tuple(one for one in OPERATIONS if one != "add")


def _row(label: str, operation: str, places: Sequence[Site], base: Base, total: int) -> Row:
    try:
        found = offers(base, [made_up(operation, site, base.layout.width) for site in places])
    except (NotFoldable, RecipeError) as reason:
        return Row(label, operation, (), {"": str(reason)})
    names = {name for offer in found if len(offer.options) > 1 for name in offer.options}
    chosen: dict[tuple[str, ...], list[str]] = {}
    for prefer in PREFERENCES:
        decided = tuple(one.representation for one in choose(found, base, prefer)[1])
        chosen.setdefault(decided, []).append(prefer)
    for name in sorted(names):
        chosen.setdefault(tuple(one.representation for one in choose(found, base, "smallest", name)[1]), [])
    options = []
    refused = {name: reason for offer in found for name, reason in offer.refused.items()}
    for decided, preferred_by in chosen.items():
        shown = " + ".join(dict.fromkeys(decided))
        try:
            options.append(_option(shown, tuple(preferred_by), found, decided, base, total))
        except NotFoldable as reason:
            refused[shown] = str(reason)
    return Row(label, operation, tuple(options), refused)


def made_up(operation: str, site: Site, width: int) -> Intervention:
    """An example of ``operation`` at ``site``; of a gate, one that opens what the MLP there writes."""
    vector = torch.zeros(width)
    vector[0] = 1.0
    if operation != GATE:
        return intervene(operation, Direction(vector, site), site)
    opened = Site("mlp_out", site.layer)
    return replace(intervene("add", Direction(vector, opened), opened), gate=Gate(site, vector, 0.0))


def _option(
    shown: str,
    preferred_by: tuple[str, ...],
    found: Sequence[Offer],
    decided: Sequence[str],
    base: Base,
    total: int,
    added: frozenset[str] = frozenset(),
) -> Option:
    draft = Draft(base)
    holdings = [offer.options[name] for offer, name in zip(found, decided, strict=True)]
    for holding in holdings:
        draft.add(holding)
    draft.complete()
    needs = tuple(sorted(set(_needs(draft, base, added))))
    known = base.checkpoint.tensors
    new = sum(
        math.prod(edit.shape) - (math.prod(known[name].shape) if name in known else 0)
        for name, edit in draft.edits.items()
    )
    _, config_changes, *_ = draft.numbered()
    host = base.layout.parsed.model_type  # a decoder inside a wrapper is another class to a loader
    return Option(
        shown,
        preferred_by,
        new,
        new / total,
        len(draft.extras),
        all(holding.bit_exact for holding in holdings),
        max(holding.demands for holding in holdings),
        config_changes,
        needs,
        {one.name: one.loads(host, needs) for one in runtimes()},
        "; ".join(dict.fromkeys(holding.note for holding in holdings if holding.note)),
    )


# --- other classes


def _houses(asked: tuple[str, str, Sequence[Site]], base: Base, total: int) -> tuple[Claim, ...]:
    """What every house that claims the model would make of what is ``asked``."""
    label, operation, places = asked
    wanted = [made_up(operation, site, base.layout.width) for site in places]
    found = []
    for rule in rules(base.layout):
        house = rule(base.layout.parsed)
        if house is None:
            continue
        option, refused = None, ""
        try:
            option = _housed(rule, house, wanted, base, total)
        except (NotFoldable, RecipeError) as reason:
            refused = str(reason)
        found.append(Claim(house.model_type, label, operation, house.same_bits, option, refused))
    return tuple(found)


def _housed(rule: Rule, house: House, wanted: Sequence[Intervention], base: Base, total: int) -> Option:
    claim = housed(base.checkpoint, rule)
    host = Base(claim.base, architectures.layout(claim.base.config))
    found = offers(host, wanted)
    decided = tuple(one.representation for one in choose(found, host, "smallest")[1])
    shown = " + ".join(dict.fromkeys(decided))
    added = frozenset(name for name in claim.base.tensors if name not in claim.names)
    option = _option(shown, (f"rehouse:{house.model_type}",), found, decided, host, total, added)
    new = option.parameters + claim.added
    needs = tuple(sorted({*option.needs, *house.needs}))
    return replace(
        option,
        parameters=new,
        share=new / total,
        config_changes={**claim.config_changes, **option.config_changes},
        needs=needs,
        loads={one.name: one.loads(house.model_type, needs) for one in runtimes()},
    )


def _needs(draft: Draft, base: Base, added: frozenset[str] = frozenset()) -> Iterable[str]:
    """What a loader must have for the tensors that the base has not, and those of its own that are ``added``."""
    stack = base.on_disk(base.layout.architecture.stack) + "."
    if draft.extras:
        yield "layers"
    every = [(base.prefix(layer), name) for layer in range(base.layers) for name in base.layer_tensors(layer)]
    kinds = {name.removeprefix(prefix) for prefix, name in every if name not in added}
    blocks = {slot: base.layout.architecture.blocks(slot) for slot in SLOTS}
    writing = {
        slot: {weight.bias for block in found for weight in (*block.weights, *block.inner)}
        for slot, found in blocks.items()
    }
    heads = {slot: {name.partition(".")[0] for name in names} for slot, names in writing.items()}
    for name in (*draft.edits, *sorted(one for one in added if one.endswith(".bias"))):
        inside = name.removeprefix(stack).partition(".")[2]
        if not name.startswith(stack):
            if not base.has(name) or name in added:
                yield "untied_head"
        elif inside not in kinds:
            slot = "attention" if inside.partition(".")[0] in heads["attention"] else "mlp"
            writes = any(fnmatch.fnmatchcase(inside, bias) for bias in writing[slot])
            yield f"{slot}_{'output' if writes else 'input'}_bias"
