"""The audit: DIR is base + plan and nothing else, proven from bytes alone. No model is loaded and nothing is run.

Every tensor that the plan does not name must be the base's byte for byte, every other one the recomputed edit bit for
bit; config, headers, index and the files beside the weights must be those that base and plan give; and what the folder
says of itself must be what was found. The same arithmetic at any number of threads gives the same bits. On another kind
of machine than the one that baked, one unit in the last place is accepted, and the check says so.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import __version__, adapter, control, manifest
from .adapter import check_adapter
from .checkpoint import Checkpoint
from .checkpoint.carry import lfs_sha256
from .checkpoint.folder import CONFIG, INDEX, ONE_FILE, as_bytes
from .checks import Check, listed, require
from .contents import check_files, check_hashes, check_others, sha256
from .control import check_vector
from .errors import CheckpointError, SteerBakeError
from .manifest import Manifest
from .originals import Originals
from .plan import CHECKPOINT, Plan, make_plan
from .tensors import check_tensors, is_linked

DOSE_TOLERANCE = 1e-6  # the norm of a long vector is summed in an order that machines choose

#: The files that a target makes itself, beside what it carries along.
MADE = {"lora": (adapter.CONFIG, adapter.WEIGHTS), "gguf_vector": (control.FILE,)}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Audit:
    """What was found, ready to be written as JSON."""

    folder: str
    base: str
    plan_sha256: str | None  # recomputed; None where no plan could be made
    hashed: bool  # every file was read and compared with its recorded hash
    computed_elsewhere: str | None  # the kind of machine that baked, where one unit in the last place was accepted
    passed: bool
    checks: tuple[Check, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def require(self) -> None:
        """Raise :class:`ValidationFailed` naming every check that failed."""
        require(self.folder, self.checks)


def audit(folder: Path, base: Checkpoint, *, hash_files: bool = False, progress: Progress | None = None) -> Audit:
    """Prove that ``folder`` is ``base`` plus the plan of its own ``steering.json``.

    What fails is in the result, not raised (see :meth:`Audit.require`). A file that is a hard link to the base's is the
    base's own; only ``hash_files``, which reads every file, can tell whether both were changed through it.

    A base whose weights were left on the hub is compared by its headers and hub ids, and the folder may then lack the
    shards that are to be copied there.

    Args:
        progress: called with bytes (done, total).

    Raises:
        CheckpointError: ``folder`` is no folder, holds no ``steering.json``, or is the base itself.
    """
    if not manifest.exists(folder):
        manifest.read(folder)  # says what is missing
    if folder.resolve() == base.folder.resolve():
        raise CheckpointError(f"{folder} is the base itself; give the folder that was baked from it")
    told: Manifest | None = None
    try:
        told = manifest.read(folder, incomplete=base.remote is not None)
        plan = make_plan(base, told.interventions, told.prefer, told.target, pad_to=told.pad_to)
    except SteerBakeError as error:
        why = str(error) if told is None else f"there is no such plan for {base.folder}: {error}"
        return _report(folder, base, None, told, hash_files, [Check("manifest", False, None, None, why)])
    away = {one.name: str(one.source) for one in told.files if one.how == "remote" and not (folder / one.name).exists()}
    here = [one for one in told.files if one.name not in away]
    checks = [
        _check_manifest(folder, told, plan),
        _check_base(base, told),
        check_files(folder, base.folder, here, made=MADE.get(told.target, ())),
        check_others(folder, told.files),
    ]
    if told.target != CHECKPOINT:
        checks += _beside(folder, base, plan, told, progress)
        return _report(folder, base, plan, told, hash_files, checks)
    try:
        found = Checkpoint.open_beside(folder, base, away) if away else Checkpoint.open(folder)
    except CheckpointError as error:
        checks.append(Check("weights", False, None, None, str(error)))
        return _report(folder, base, plan, told, hash_files, checks)
    size = sum(record.size for record in here) if hash_files else 0
    count = _Counter(size + _work(found, base, plan), progress)
    checks.append(_check_headers(found, base, told))
    checks += check_tensors(found, base, plan, elsewhere=told.computed_elsewhere, advance=count.add)
    if hash_files:
        sources = {file.baked: file.name for file in told.originals.files}
        checks.append(check_hashes(found, base, here, sources, count.add))
    count.finish()
    return _report(folder, base, plan, told, hash_files, checks)


def _beside(folder: Path, base: Checkpoint, plan: Plan, told: Manifest, progress: Progress | None) -> Iterator[Check]:
    """The file that goes beside the model, against the plan. (Of such folders every file has a recorded hash.)"""
    if plan.target == "lora":
        sources = {edit.source for edit in plan.edits if edit.source}
        count = _Counter(sum(base.tensors[name].nbytes for name in sources), progress)
        yield from check_adapter(folder, base, plan, told.base, elsewhere=told.computed_elsewhere, advance=count.add)
        count.finish()
    else:
        yield check_vector(folder, plan)


def _report(
    folder: Path, base: Checkpoint, plan: Plan | None, told: Manifest | None, hashed: bool, checks: list[Check]
) -> Audit:
    return Audit(
        str(folder),
        str(base.folder),
        plan.sha256 if plan else None,
        hashed,
        told.computed_elsewhere if told else None,
        all(check.passed for check in checks),
        tuple(checks),
    )


class _Counter:
    """Bytes looked at, for a progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self._progress = max(total, 1), 0, progress

    def add(self, size: int) -> None:
        self.done = min(self.done + size, self.total)
        if self._progress is not None:
            self._progress(self.done, self.total)

    def finish(self) -> None:
        self.add(self.total)


def _work(found: Checkpoint, base: Checkpoint, plan: Plan) -> int:
    """Bytes that comparing will look at."""
    edited = {edit.tensor for edit in plan.edits}
    return sum(
        info.nbytes
        for name, info in base.tensors.items()
        if name in edited or (name in found.tensors and not is_linked(base, found, info, found.tensors[name]))
    )


# --- what the folder says of itself


def _check_manifest(folder: Path, told: Manifest, plan: Plan) -> Check:
    content, problems = told.content, []
    recorded = content["plan"]
    if hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest() != content["plan_sha256"]:
        problems.append("the recorded plan does not have the recorded hash")
    problems += _differences(recorded, plan.as_json(), forgiving=told.computed_elsewhere is not None)
    if sha256(folder / manifest.VECTORS_FILE) != content["vectors_sha256"]:
        problems.append(f"{manifest.VECTORS_FILE} is not the file that was written (another sha256)")
    version = content["tool"]["version"]
    other = "" if version == __version__ else f" (audited with {__version__})"
    good = f"the recomputed plan is the recorded one, {plan.sha256[:12]}; baked with steer-bake {version}{other}"
    return Check.of("manifest", problems, good)


def _differences(recorded: Any, planned: Any, *, forgiving: bool, where: str = "plan") -> Iterator[str]:
    """Where two plans part. ``forgiving``: hashes of composed maps may differ in the last bit between machines."""
    if isinstance(recorded, dict) and isinstance(planned, dict) and recorded.keys() == planned.keys():
        for key in planned:
            if not (forgiving and where.startswith("plan.edits") and key in ("sha256", "change")):
                yield from _differences(recorded[key], planned[key], forgiving=forgiving, where=f"{where}.{key}")
    elif isinstance(recorded, list) and isinstance(planned, list) and len(recorded) == len(planned):
        for index, (old, new) in enumerate(zip(recorded, planned, strict=True)):
            yield from _differences(old, new, forgiving=forgiving, where=f"{where}.{index}")
    elif where.endswith(".dose") and isinstance(recorded, float) and isinstance(planned, float):
        if not math.isclose(recorded, planned, rel_tol=DOSE_TOLERANCE):
            yield f"{where} is recorded as {recorded!r}, it is {planned!r}"
    elif json.dumps(recorded, sort_keys=True) != json.dumps(planned, sort_keys=True):
        yield f"{where} is recorded as {_short(recorded)}, it is {_short(planned)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_base(base: Checkpoint, told: Manifest) -> Check:
    """Is this the base that was baked, as far as headers and hub ids tell, and was it baked itself?"""
    problems, known, files = [], 0, told.originals.files
    if tuple(file.name for file in files) != base.files:
        problems.append(f"it has the weight files {_short(base.files)}, recorded are {_short([f.name for f in files])}")
    for file in files:
        if file.name not in base.headers:
            continue
        if base.header_hash(file.name) != file.header_hash:
            problems.append(f"the header of {file.name} is not the recorded one")
        blob = base.remote.lfs_sha256.get(file.name) if base.remote else lfs_sha256(base.folder / file.name)
        known += blob is not None and blob == file.lfs_sha256
        if blob is not None and file.lfs_sha256 is not None and blob != file.lfs_sha256:
            problems.append(f"{file.name} has another hub id than the recorded one")
    problems += _kept_problems(base, told.originals)
    stacked, layer = told.content["stacked_on"], _layer(base)
    if stacked is None and layer is not None:
        problems.append("it was baked before, and steering.json does not say so (stacked_on)")
    if stacked is not None and (not isinstance(stacked, dict) or layer != {**stacked, "recipe": None}):
        problems.append("steering.json says that it was baked before (stacked_on), and this base was not, or otherwise")
    good = f"headers of {len(files)} weight files as recorded"
    good += f", hub ids of {known}" if known else ""
    good += f"; baked before: audit {base.folder} too" if stacked is not None else ""
    return Check.of("base", problems, good)


def _kept_problems(base: Checkpoint, kept: Originals) -> Iterator[str]:
    """What ``unbake`` would give back without asking the base."""
    for name in (CONFIG, INDEX):
        if name in kept.texts and not (
            (base.folder / name).is_file() and (base.folder / name).read_bytes() == kept.texts[name]
        ):
            yield f"the {name} that is kept to undo the bake is not the base's"
    for name, vector in kept.vectors.items():
        info = base.tensors.get(name)
        if info is None or info.nbytes != vector.nbytes or as_bytes(base.read(name)) != as_bytes(vector):
            yield f"the {name} that is kept to undo the bake is not the base's"


def _layer(base: Checkpoint) -> dict[str, Any] | None:
    """The base's own ``steering.json`` without its recipe, whose text may be brought up to date."""
    if not manifest.exists(base.folder):
        return None
    found: dict[str, Any] = {**manifest.read(base.folder).content, "recipe": None}
    return found


# --- headers and index


def _check_headers(found: Checkpoint, base: Checkpoint, told: Manifest) -> Check:
    """Metadata and layout: loaders read both, and no tensor check sees them."""
    problems = []
    recorded = {one.name: one.header_hash for one in told.files if one.header_hash is not None}
    if set(recorded) != set(found.files):
        problems.append(
            f"the weights are read from {_short(sorted(found.files))}, recorded are {_short(sorted(recorded))}"
        )
    problems += [
        f"the header of {name} is not the recorded one"
        for name in found.files
        if name in recorded and found.header_hash(name) != recorded[name]
    ]
    for file in told.originals.files:
        if file.baked in found.headers and file.name in base.headers:
            before, now = base.headers[file.name].metadata, found.headers[file.baked].metadata
            if dict(before) != dict(now):
                problems.append(
                    f"the metadata of {file.baked} is {_short(dict(now))}, in the base {_short(dict(before))}"
                )
    ours = set(found.files) - {file.baked for file in told.originals.files}
    for name in sorted(ours):
        if dict(found.headers[name].metadata) != {"format": "pt"}:
            problems.append(
                f"the metadata of {name} is {_short(dict(found.headers[name].metadata))}, not that of a bake"
            )
    problems += _index_problems(found, base)
    return Check.of("headers", problems, f"{len(found.files)} headers and the index as recorded, metadata the base's")


def _index_problems(found: Checkpoint, base: Checkpoint) -> Iterator[str]:
    if found.files == (ONE_FILE,):
        return
    weight_map = json.loads((found.folder / INDEX).read_text())["weight_map"]
    wrong = sorted(name for name, info in found.tensors.items() if weight_map.get(name) != info.file)
    if wrong:
        yield f"{INDEX} does not lead to {listed(wrong)}"
    size = sum(info.nbytes for info in found.tensors.values())
    if found.index_metadata.get("total_size") != size:
        yield f"{INDEX} says {found.index_metadata.get('total_size')!r} bytes, there are {size}"
    counted = ("total_size", "total_parameters")
    before = {key: value for key, value in base.index_metadata.items() if key not in counted}
    now = {key: value for key, value in found.index_metadata.items() if key not in counted}
    if before != now:
        yield f"the metadata of {INDEX} is {_short(now)}, in the base {_short(before)}"
