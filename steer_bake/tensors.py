"""Config and tensors of a folder against base and plan: untouched ones byte for byte, edited ones bit for bit.

A part of the audit and of the certificate alike. Untouched tensors are compared a piece at a time, edited ones one at a
time: memory is bounded by the largest edited tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .affine import Affine
from .checkpoint import Checkpoint, Edit, TensorInfo, recompute
from .checks import Check, listed
from .contents import Advance, same_bytes
from .plan import Plan

COEFFICIENT_TOLERANCE = 1e-3  # of the planned change in the change found, per edited matrix

#: Elements that are compared at a time, in float64.
BLOCK = 1 << 22


def check_tensors(
    found: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    *,
    elsewhere: str | None = None,
    fitted: bool = False,
    advance: Advance = lambda _: None,
) -> Iterator[Check]:
    """Config, untouched tensors and edited tensors of ``found`` against ``base`` and ``plan``.

    Args:
        elsewhere: what kind of machine the edits were computed on, where that is not this one.
        fitted: also demand that the planned change survived rounding, by the coefficient fitted to each matrix.
    """
    planned = _merged(base.config, plan.config_changes)
    wrong = [
        f"config.json has {key}={found.config.get(key)!r}, planned {planned.get(key)!r}"
        for key in sorted({*planned, *found.config})
        # as JSON: to Python 1 is True and 1.0
        if (key in planned) != (key in found.config) or json.dumps(found.config[key]) != json.dumps(planned[key])
    ]
    yield Check.of("config", wrong, "the base's own and as planned")
    yield _check_untouched(found, base, plan, advance)
    yield _check_edited(found, base, plan, elsewhere, fitted, advance)


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As the bake merges: tables within tables too."""
    both = {key for key in changes if isinstance(changes[key], Mapping) and isinstance(old.get(key), dict)}
    return {**old, **changes, **{key: _merged(old[key], changes[key]) for key in both}}


def _check_untouched(found: Checkpoint, base: Checkpoint, plan: Plan, advance: Advance) -> Check:
    edited = {edit.tensor for edit in plan.edits}
    names = {name: plan.rename.get(name, name) for name in base.tensors if name not in plan.dropped}
    unknown = {*found.tensors} - {*names.values()} - edited
    wrong = [f"{name} is in neither base nor plan" for name in sorted(unknown)]
    read, linked = 0, set()
    for old, name in names.items():
        if name in edited:
            continue
        info = base.tensors[old]
        now = found.tensors.get(name)
        if now is None or (now.dtype, now.shape) != (info.dtype, info.shape):
            wrong.append(f"{name} is not the base's ({'missing' if now is None else f'{now.dtype} {list(now.shape)}'})")
        elif is_linked(base, found, info, now):
            linked.add(now.file)
        else:
            span = [(now.start, info.start, info.nbytes)]
            read += 1
            if not same_bytes(found.folder / now.file, base.folder / info.file, span, advance):
                wrong.append(f"{name} is not the base's (other bytes)")
    good = f"the bytes of the base ({read} tensors compared)"
    if linked:
        good += f"; {listed(sorted(linked), 2)} {'is the same file' if len(linked) == 1 else 'are the same files'}"
        away = linked <= {*found.away}
        good += " as the base's: "
        good += "not here, to be copied on the hub" if away else "what was changed through the link changed both"
    return Check.of("untouched tensors", wrong, good)


def is_linked(base: Checkpoint, found: Checkpoint, before: TensorInfo, now: TensorInfo) -> bool:
    """Whether both tensors are the same bytes of one file: linked, or not here at all and to be copied on the hub."""
    if now.file in found.away:
        return now.start == before.start and found.away[now.file] == before.file
    return now.start == before.start and (found.folder / now.file).samefile(base.folder / before.file)


def _check_edited(
    found: Checkpoint, base: Checkpoint, plan: Plan, elsewhere: str | None, fitted: bool, advance: Advance
) -> Check:
    wrong, worst, inexact = [], 0.0, 0
    for edit in plan.edits:
        problem, off, same = _edited(edit, base, found, elsewhere is not None, fitted)
        worst = max(worst, off)
        wrong += [problem] if problem else []
        inexact += not same
        advance(base.tensors[edit.source].nbytes if edit.source in base.tensors else 0)
    good = f"{len(plan.edits)} as planned, bit for bit"
    if inexact:
        good = (
            f"{len(plan.edits)} as planned, {inexact} of them within one unit in the last place and not bit for bit, "
            f"which is accepted because steering.json says that they were computed on {elsewhere}"
        )
    if fitted or inexact:
        good += f"; fitted coefficients within {worst:.1e}"
    value, limit = (worst, COEFFICIENT_TOLERANCE) if wrong or fitted or inexact else (None, None)
    return Check("tensors", not wrong, value, limit, listed(wrong) or good)


def _edited(
    edit: Edit, base: Checkpoint, found: Checkpoint, elsewhere: bool, fitted: bool
) -> tuple[str | None, float, bool]:
    """What is wrong with one edited tensor, how far its fitted coefficient is from the plan's, and whether it has the
    planned bits.

    The coefficient is that of the planned change in the change found: ``<W' - W, D> / <D, D>`` with ``D`` the planned
    change. For an ablation it equals ``(1 - <r^T W', r^T W> / |r^T W|^2) / lambda``. It is measured for ``fitted``, and
    where bits differ.
    """
    if edit.tensor not in found.tensors:
        return f"{edit.tensor} is missing", 1.0, False
    now = found.tensors[edit.tensor]
    if now.shape != edit.shape:
        return f"{edit.tensor} has shape {list(now.shape)}, planned {list(edit.shape)}", 1.0, False
    if now.dtype != edit.dtype:
        return f"{edit.tensor} is stored as {now.dtype}, planned {edit.dtype}", 1.0, False
    stored = found.read(edit.tensor)
    apart = units_apart(stored, recompute(base, edit))
    accepted = apart == 0 or (elsewhere and apart == 1)
    # Of a constant or a copy a coefficient would measure nothing but rounding: the bits are all there is to say.
    whole = stored.ndim == 1 or edit.source is None or edit.affine.is_identity
    if accepted and (whole or (apart == 0 and not fitted)):
        return None, 0.0, apart == 0
    off = _misfit(stored, edit, base)
    if whole:
        return f"{edit.tensor} is not as planned ({_fit_text(off)})", abs(off), False
    if not abs(off) <= COEFFICIENT_TOLERANCE:
        return f"{edit.tensor}: {_fit_text(off)}", abs(off), apart == 0
    # A fitted coefficient does not see what was added across the planned change; the bits do.
    return (None if accepted else f"{edit.tensor} carries the planned change and something else"), abs(off), apart == 0


def units_apart(one: Tensor, other: Tensor) -> int:
    """How far apart two tensors of one dtype are: 0 bit for bit, 1 one unit in the last place at most, 2 more."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    least, worst = torch.iinfo(integer).min, 0
    for left, right in zip(_pieces(one.reshape(-1), BLOCK), _pieces(other.reshape(-1), BLOCK), strict=True):
        if torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            continue
        # The bits of floats count up away from zero; negative ones are turned round, so that neighbours differ by one.
        places = [part.view(integer).to(torch.int64) for part in (left, right)]
        first, second = (torch.where(part < 0, least - part, part) for part in places)
        far = ((first - second).abs() > 1) | left.isnan() | right.isnan()
        worst = max(worst, 2 if bool(far.any()) else 1)
    return worst


def _misfit(stored: Tensor, edit: Edit, base: Checkpoint) -> float:
    """Found over planned coefficient, minus one; where no change is planned, the size of the one found."""
    before = torch.zeros(1).expand(edit.old_shape) if edit.source is None else _before(edit, base)
    for axis, kept in enumerate(edit.old_shape):  # what was appended is no change of what was there
        stored = stored.narrow(axis, 0, kept)
    size = overlap = length = 0.0
    for old, new in zip(_vectors(before, edit.axis), _vectors(stored, edit.axis), strict=True):
        was = old.float()
        change, found = (edit.affine(was) - was).double(), (new.float() - was).double()
        size += float((change * change).sum())
        overlap += float((found * change).sum())
        length += float((found * found).sum())
    return overlap / size - 1 if size else length**0.5


def _before(edit: Edit, base: Checkpoint) -> Tensor:
    """What the map of an edit applies to."""
    dtype = base.info(str(edit.source)).dtype if edit.scale == 1 else "F32"
    identity = Affine.identity(edit.affine.width)
    return recompute(base, replace(edit, affine=identity, shape=edit.old_shape, appended=None), dtype)


def _vectors(tensor: Tensor, axis: int) -> Iterator[Tensor]:
    """The vectors of the stream in ``tensor``, some at a time: [n, d]."""
    moved = tensor.movedim(axis, -1)
    rows = moved.reshape(-1, moved.shape[-1]) if moved.ndim != 2 else moved
    yield from _pieces(rows, max(1, BLOCK // max(1, moved.shape[-1])))


def _pieces(rows: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _fit_text(off: float) -> str:
    return f"it carries {1 + off:.4g} of the planned change"
