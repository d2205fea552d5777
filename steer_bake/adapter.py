"""A plan as a PEFT adapter: every edit as a product of two thin matrices, and both files of the adapter's folder.

``W + L (R^T W)`` is ``W + B A`` with ``B = L`` and ``A = R^T W``: a LoRA whose rank is that of the intervention, scaled
by 1, holds exactly the edit. A shift is the bias of B; on an embedding it is one more rank, with a row of ones in A.
All of it is float32, summed in an order that depends on nothing but the lengths: a plan is the same bytes everywhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .affine import Affine
from .checkpoint import Checkpoint, Edit
from .checks import Check, listed
from .errors import NotFoldable
from .models import ADAPTER_CONFIG
from .plan import Plan
from .tensors import units_apart
from .wrapping import Place, places

CONFIG, WEIGHTS = ADAPTER_CONFIG, "adapter_model.safetensors"
#: What PEFT puts before the class's own names.
PREFIX = "base_model.model."

#: Elements of a matrix that are projected at a time, in float64.
_PIECE = 1 << 21

Advance = Callable[[int], None]  # called with the bytes that were read since the last call


@dataclass(frozen=True, eq=False)
class _Part:
    """What the plan does at one place."""

    place: Place
    weight: Edit | None = None  # of any of its sources: one write is edited by one map
    bias: Edit | None = None

    @property
    def rank(self) -> int:
        if self.weight is None:
            return 1
        shifted = self.place.kind == "embedding" and self.weight.affine.has_shift
        return self.weight.affine.left.shape[1] + int(shifted)


def parts(plan: Plan, base: Checkpoint) -> list[_Part]:
    """The plan's edits, put together by what PEFT wraps.

    Raises:
        NotFoldable: PEFT cannot reach one of the tensors, or cannot hold these edits in one adapter.
    """
    known = places(base)
    found: dict[str, _Part] = {}
    edited = {edit.tensor: edit for edit in plan.edits}
    for edit in plan.edits:
        place = known.get(edit.tensor)
        is_bias = (place is None and edit.source is None) or (place is not None and place.kind == "bias")
        if is_bias:
            place = known.get(edit.tensor.removesuffix("bias") + "weight")
        if place is None or (is_bias and place.kind not in ("linear", "conv1d")):
            raise NotFoldable(
                f"{edit.tensor} is edited, and no adapter can be put on it in a {plan.model_type} model: it is neither "
                "a linear layer nor an embedding nor a matrix or a stack of them. Bake a checkpoint (target checkpoint)"
            )
        missing = [source for source in place.sources if source not in edited]
        if not is_bias and missing:
            raise NotFoldable(f"{edit.tensor} is edited and {missing[0]} is not, though the class holds them as one")
        before = found.get(place.path)
        if is_bias:
            found[place.path] = _Part(place, before.weight if before else None, edit)
        elif before is None or before.weight is None:
            found[place.path] = _Part(place, edit, before.bias if before else None)
    _check_together(list(found.values()))
    return [found[path] for path in sorted(found)]


def _check_together(found: list[_Part]) -> None:
    biased = next((one for one in found if one.bias is not None), None)
    other = next((one for one in found if one.place.kind not in ("linear", "conv1d")), None)
    if biased is None or other is None:
        return
    if other.place.kind == "embedding":
        what, advice = "an adapted embedding", "'writers' instead of 'writes' leaves the embedding alone"
    else:
        what, advice = "adapted experts or other bare parameters", "steer other layers, or only with a projection"
    raise NotFoldable(
        f"one adapter cannot hold a bias (at {biased.place.path}) beside {what} ({other.place.path}): PEFT has "
        f"lora_bias for all of an adapter, and not for these. {advice}; or bake a checkpoint (target checkpoint)"
    )


def tensors(plan: Plan, base: Checkpoint, advance: Advance = lambda _: None) -> dict[str, Tensor]:
    """Everything in ``adapter_model.safetensors``, by PEFT's names, float32."""
    found = parts(plan, base)
    rank = max(part.rank for part in found)
    biased = any(part.bias is not None for part in found)
    out: dict[str, Tensor] = {}
    for part in found:
        a, b = _factors(part, base, rank, advance)
        name = _stored_name(part.place, [one.place for one in found])
        if part.place.kind == "embedding":
            out |= {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
            continue
        out |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if biased:
            out[f"{name}.lora_B.bias"] = _bias(part, base, b.shape[0])
    return {name: out[name].contiguous() for name in sorted(out)}


def config(plan: Plan, base: Checkpoint, name: str, revision: str | None) -> dict[str, Any]:
    """``adapter_config.json``: full names only, for of regular expressions PEFT keeps the last name on sparse models.

    ``name``: hub id or folder of the base, ``revision``: its commit.
    """
    found = parts(plan, base)
    modules = sorted(part.place.path for part in found if part.place.kind != "parameter")
    parameters = sorted(part.place.path for part in found if part.place.kind == "parameter")
    rank = max(part.rank for part in found)
    return {
        "base_model_name_or_path": name,
        "revision": revision,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # the scale is their quotient
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(part.place.kind == "conv1d" for part in found),
        "target_modules": modules,
        **({"target_parameters": parameters} if parameters else {}),
        **({"lora_bias": True} if any(part.bias is not None for part in found) else {}),
    }


def exists(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter."""
    return (folder / CONFIG).is_file()


def check_adapter(
    folder: Path,
    base: Checkpoint,
    plan: Plan,
    recorded: Mapping[str, Any],
    *,
    elsewhere: str | None = None,
    advance: Advance = lambda _: None,
) -> Iterator[Check]:
    """The folder's two files against base and plan: the config as planned, every tensor bit for bit.

    ``recorded``: the base as ``steering.json`` names it. ``elsewhere``: what kind of machine the tensors were computed
    on, where that is not this one; one unit in the last place is accepted then.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        stored = load_file(folder / WEIGHTS)
        name, revision = found["base_model_name_or_path"], found["revision"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        yield Check("adapter", False, None, None, f"{CONFIG} or {WEIGHTS} cannot be read: {error}")
        return
    planned = config(plan, base, name, revision)
    wrong = [
        f"{CONFIG} has {key}={found.get(key)!r}, planned {planned.get(key)!r}"
        for key in sorted({*planned, *found})
        if json.dumps(found.get(key)) != json.dumps(planned.get(key))
    ]
    if (name, revision) != (recorded["hub_id"], recorded["revision"]) and revision is not None:
        wrong.append(f"{CONFIG} names the base {name!r} at {revision!r}, which is not what was baked")
    if revision is None and not Path(str(name)).is_absolute():
        wrong.append(f"{CONFIG} names the base {name!r} without a commit")
    yield Check.of("adapter config", wrong, f"as planned; its base is {name}" + (f" at {revision}" if revision else ""))
    yield _check_tensors(stored, tensors(plan, base, advance), elsewhere)


def _check_tensors(stored: Mapping[str, Tensor], planned: Mapping[str, Tensor], elsewhere: str | None) -> Check:
    wrong = [f"{name} is missing" for name in planned if name not in stored]
    wrong += [f"{name} is not of the plan" for name in stored if name not in planned]
    inexact = 0
    for name in sorted({*stored} & {*planned}):
        now, then = stored[name], planned[name]
        if (now.dtype, now.shape) != (then.dtype, then.shape):
            wrong.append(f"{name} is {now.dtype} {list(now.shape)}, planned {then.dtype} {list(then.shape)}")
            continue
        apart = units_apart(now.contiguous(), then)
        inexact += apart == 1
        if apart > 1 or (apart == 1 and elsewhere is None):
            wrong.append(f"{name} is not as planned")
    good = f"{len(planned)} as planned, bit for bit"
    if inexact:
        good = f"{len(planned)} as planned, {inexact} within one unit in the last place: computed on {elsewhere}"
    return Check("tensors", not wrong, None, None, listed(wrong) or good)


#: Beside PeftModel, to which the base is given: what finds the base by the name in the adapter's config.
OTHER_LOADERS = ("AutoPeftModelForCausalLM", "AutoModelForCausalLM")

Candidate = dict[str, str]  # "folder" and "dtype"; of an adapter, whose folder is the base, "adapter" and "through"


def candidates(folder: Path, base: Checkpoint, storage: str, scratch: Path) -> dict[str, Candidate]:
    """The adapter on its base, loaded in three ways, and in the ``storage`` dtype.

    Two of them look for the base themselves, by the name in the adapter's config. Which name leads to which bytes is
    another question (that of the bake, and of the audit): here a copy of the config names the base that is at hand.
    """
    copy = scratch / "adapter"
    copy.mkdir()
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content |= {"base_model_name_or_path": str(base.folder.resolve()), "revision": None}
    except (OSError, ValueError, TypeError):  # the loaders say so
        content = {}
    (copy / CONFIG).write_text(json.dumps(content))
    if (folder / WEIGHTS).is_file():
        shutil.copy(folder / WEIGHTS, copy)
    whole = {"folder": str(base.folder.resolve()), "dtype": "float32", "through": "PeftModel", "adapter": str(folder)}
    found = {"float32": whole}
    for route in OTHER_LOADERS:
        found[route] = {**whole, "through": route, "adapter": str(copy)}
    if storage != "float32":
        found["storage"] = {**whole, "dtype": storage}
    return found


# --- the two factors


def _factors(part: _Part, base: Checkpoint, rank: int, advance: Advance) -> tuple[Tensor, Tensor]:
    """lora_A [rank, in] and lora_B [out, rank] (experts stacked in the first axis of A and the last of B), zeros behind
    the ranks that the edit has."""
    place, edit = part.place, part.weight
    out, inside = place.shape[place.out], place.shape[_across(place)]
    experts = place.shape[0] if len(place.shape) == 3 else 1
    a, b = torch.zeros(experts, rank, inside), torch.zeros(out, rank, experts)
    if edit is not None:
        for first, matrix, axis in _matrices(place, edit, base, advance):
            ranks = edit.affine.left.shape[1]
            along = projected(matrix, edit.affine.right, axis)  # R^T W: what the edit reads
            if axis == place.out - (len(place.shape) - 2):
                a[first, :ranks], b[:, :ranks, first] = along, edit.affine.left
            else:  # PEFT takes the residual axis for the input
                a[first, :ranks], b[:, :ranks, first] = edit.affine.left.T, along.T
        if edit.affine.has_shift:  # of an embedding: every row gets it
            a[0, part.rank - 1], b[:, part.rank - 1, 0] = 1.0, edit.affine.shift
    return a.reshape(experts * rank, inside), b.reshape(out, rank * experts)


def _across(place: Place) -> int:
    return len(place.shape) - 1 - place.out if len(place.shape) == 2 else 3 - place.out


def _matrices(place: Place, edit: Edit, base: Checkpoint, advance: Advance) -> Iterator[tuple[int, Tensor, int]]:
    """Every matrix of a place: which expert's it is, its values, and its residual axis."""
    for number, source in enumerate(place.sources):
        values = base.read(source)
        advance(base.tensors[source].nbytes)
        if values.ndim == 2:
            yield number, values, edit.axis % 2
            continue
        for expert, matrix in enumerate(values):
            yield expert, matrix, edit.axis % values.ndim - 1


def projected(matrix: Tensor, right: Tensor, axis: int) -> Tensor:
    """``R^T W`` along the residual axis of ``matrix`` (2-D), [k, other] float32 for ``right`` [d, k].

    Summed in float64, in an order that depends on d alone.
    """
    columns = matrix if axis == 0 else matrix.T
    if right.shape[1] == 0:
        return torch.zeros(0, columns.shape[1])
    wide, pieces = right.double(), []
    for piece in torch.split(columns, max(1, _PIECE // len(columns)), dim=1):
        values = piece.double()
        pieces.append(torch.stack([_sum(values * weights[:, None]) for weights in wide.T]).float())
    return torch.cat(pieces, dim=1)


def _sum(terms: Tensor) -> Tensor:
    """Over the first axis, pairwise."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = torch.cat([terms[:half] + terms[half : 2 * half], terms[2 * half :]])
    return terms[0]


def _bias(part: _Part, base: Checkpoint, width: int) -> Tensor:
    """What the edit adds to the bias: ``L (R^T b) + shift``."""
    edit = part.bias
    if edit is None:
        return torch.zeros(width)
    if edit.source is None:
        return edit.affine.shift
    affine: Affine = edit.affine
    moved = affine.shift.double()
    if affine.is_linear:
        read = projected(base.read(edit.source)[:, None], affine.right, 0).double()  # [k, 1]
        moved = moved + _sum(affine.left.double().T * read)
    return moved.float()


def _stored_name(place: Place, others: list[Place]) -> str:
    """Where PEFT's tensors lie: a module with several wrapped parameters is wrapped once for each, the last outside."""
    around = [one for one in others if one.kind == "parameter" and one.module == place.module]
    deep = sum(one.order > place.order for one in around) if place.kind == "parameter" else 0
    return PREFIX + place.module + ".base_layer" * deep
