"""The certificate: does the file on disk compute what the hooks compute?

The reference is the base model with hooks. The candidate is the folder, loaded by plain transformers in a process that
never imports steer_bake (``reload_worker.py``). Compared over left-padded batches and cached greedy decoding, in legs:

* **constants** (only biases were written): the file read as float32 against hooks that use the stored, rounded values;
* **rank-one** (matrices were edited): the same plan written in float32 by the same code, against the exact hooks;
* **storage**: the published file in its own dtype, at most 1.2 x as far from the float32 hooks as hooks in that dtype.

Beside them: every edited tensor against the plan, the stream's own obedience to ablation and clamp, and the effect, so
that a bake that changes nothing never passes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import architectures, manifest, reload_worker
from .checkpoint import Checkpoint, Edit, recompute, write_edited
from .comparison import Check, Comparison, Gap, storage_dtype, stream_probes
from .errors import CheckpointError, ValidationFailed
from .interventions import Intervention
from .models import load_tokenizer
from .plan import Plan, make_plan

COEFFICIENT_TOLERANCE = 1e-3  # of the planned change in the change found, per edited matrix

#: What tokenizers disagree about: leading and repeated spaces, digits, accents, scripts, symbols.
_TEXT = " Hello  world!\n\tdef f(x_1): return 3.14159 # 1234567\n\nDon't: naïve Straße İ, 你好, नमस्ते, 🙂 A\u0301 "

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """The outcome, ready to be written as ``report.json``."""

    folder: str
    base: str
    plan_sha256: str  # of the plan that was compared: a report belongs to the folder with this plan in its manifest
    passed: bool
    checks: tuple[Check, ...]
    effect: Gap  # base to hooked
    legs: Mapping[str, Gap]  # hooked to candidate, by leg
    noise_floor_kl: float | None  # KL(hooks in float32 || hooks in the storage dtype)
    interventions: tuple[Mapping[str, Any], ...]
    prompts: int
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def require(self) -> None:
        """Raise :class:`ValidationFailed` naming every check that failed."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        if failed:
            raise ValidationFailed(f"{self.folder} is not its base plus the plan. " + "; ".join(failed))


def validate(
    folder: Path,
    base_folder: Path,
    interventions: Sequence[Intervention],
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: str = "cpu",
    batch_size: int = 8,
    decode_prompts: int = 6,
    decode_tokens: int = 24,
    prefer: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare the checkpoint in ``folder`` with ``base_folder`` under hooks, on tokenised prompts ``rows``.

    Failing checks are in the report, not raised (see :meth:`Report.require`). ``prefer`` is what the plan preferred; by
    default, what the folder's own ``steering.json`` says.

    Raises:
        CheckpointError: the base is missing or damaged. (A damaged candidate is a failed check.)
    """
    advance = progress or (lambda _done, _total: None)
    base = Checkpoint.open(base_folder)
    plan = make_plan(base, interventions, prefer or manifest.preference(folder))
    layout = architectures.layout(base.config)
    job = {
        "batches": [list(map(list, rows[at : at + batch_size])) for at in range(0, len(rows), batch_size)],
        "decode": list(map(list, rows[:decode_prompts])),
        "decode_tokens": decode_tokens,
        "pad_id": pad_id,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    along, job["probes"] = stream_probes(plan, layout)

    checks = [*_structure(folder, base, plan)]
    with tempfile.TemporaryDirectory(prefix="steer-bake-validate-") as name:
        scratch = Path(name)
        candidates = _candidates(folder, base, plan, scratch)
        advance(1, 3)
        problems = _run_worker(candidates, job, along, scratch)
        checks += [
            Check(f"strict load ({name})", not found, None, None, "; ".join(found[:4]) or "every key fits")
            for name, found in problems.items()
        ]
        advance(2, 3)
        loaded = frozenset(name for name, found in problems.items() if not found)
        comparison = Comparison(base, plan, layout, job, along, scratch, loaded)
        comparison.run()
        advance(3, 3)
    checks += comparison.checks()
    return Report(
        str(folder), str(base_folder), plan.sha256, all(check.passed for check in checks), tuple(checks),
        comparison.effect.gap(), comparison.legs(), comparison.floor_kl(),
        tuple(comparison.described(one) for one in plan.interventions), len(rows), sum(map(len, rows)),
    )  # fmt: skip


# --- what is on disk, against the plan


def _structure(folder: Path, base: Checkpoint, plan: Plan) -> Iterator[Check]:
    try:
        found = Checkpoint.open(folder)
    except CheckpointError as error:
        yield Check("files", False, None, None, str(error))
        return
    planned = {**base.config, **plan.config_changes}
    wrong = [
        f"config.json has {key}={found.config.get(key)!r}, planned {planned.get(key)!r}"
        for key in sorted({*planned, *found.config})
        if found.config.get(key) != planned.get(key)
    ]
    yield Check("config", not wrong, None, None, "; ".join(wrong[:4]) or "the base's own and as planned")

    edited = {edit.tensor for edit in plan.edits}
    kept = {plan.rename.get(name, name) for name in base.tensors}
    wrong = [f"{name} is in neither base nor plan" for name in sorted({*found.tensors} - kept - edited)]
    wrong += [
        f"{name} is not the base's"
        for name in base.tensors
        if plan.rename.get(name, name) not in edited and not _same_bytes(base, found, name, plan.rename.get(name, name))
    ]
    yield Check("untouched tensors", not wrong, None, None, "; ".join(wrong[:4]) or "the bytes of the base")

    if plan.rehoused_from:
        yield from _tokenizer(folder, base)

    wrong, worst = [], 0.0
    for edit in plan.edits:
        problem, off = _tensor_problem(edit, base, found)
        worst = max(worst, off)
        wrong += [problem] if problem else []
    more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
    yield Check(
        "tensors", not wrong, worst, COEFFICIENT_TOLERANCE,
        "; ".join(wrong[:4]) + more or f"{len(plan.edits)} as planned, fitted coefficients within {worst:.1e}",
    )  # fmt: skip


def _tokenizer(folder: Path, base: Checkpoint) -> Iterator[Check]:
    """Whether the same text becomes the same tokens: which tokenizer class is loaded depends on the model type too."""
    if not (base.folder / "tokenizer_config.json").exists():
        return
    before = load_tokenizer(base.folder)
    text = _TEXT + "".join(before.all_special_tokens)
    try:
        after = load_tokenizer(folder)
        same = before(text)["input_ids"] == after(text)["input_ids"] and before.pad_token_id == after.pad_token_id
    except CheckpointError as error:
        yield Check("tokenizer", False, None, None, str(error))
        return
    kinds = f"{type(before).__name__} of the base, {type(after).__name__} of the other class"
    verdict = "the same tokens" if same else "other tokens; use the base's tokenizer, or bake with keep_class"
    yield Check("tokenizer", same, None, None, f"{kinds}: {verdict}")


def _same_bytes(base: Checkpoint, found: Checkpoint, name: str, new_name: str) -> bool:
    old, new = base.tensors[name], found.tensors.get(new_name)
    if new is None or (new.dtype, new.shape) != (old.dtype, old.shape):
        return False
    if new.start == old.start and (found.folder / new.file).samefile(base.folder / old.file):
        return True
    before, after = base.read(name), found.read(new_name)
    return torch.equal(before.reshape(-1).view(torch.uint8), after.reshape(-1).view(torch.uint8))


def _tensor_problem(edit: Edit, base: Checkpoint, found: Checkpoint) -> tuple[str | None, float]:
    """What is wrong with one edited tensor, and how far its fitted coefficient is from the plan's.

    The coefficient is that of the planned change in the change found: ``<W' - W, D> / <D, D>`` with ``D`` the planned
    change. For an ablation it equals ``(1 - <r^T W', r^T W> / |r^T W|^2) / lambda``.
    """
    if edit.tensor not in found.tensors:
        return f"{edit.tensor} is missing", 1.0
    stored = found.read(edit.tensor)
    before = base.read(edit.source).float() if edit.source else torch.zeros(edit.shape)
    if stored.shape != before.shape:
        return f"{edit.tensor} has shape {list(stored.shape)}, planned {list(before.shape)}", 1.0
    planned = edit.affine(before, edit.axis)
    if stored.ndim == 1 or edit.source is None or edit.affine.is_identity:
        # Constants and copies are what the other legs build on: nothing but the planned bits will do.
        same = torch.equal(stored, recompute(base, edit, found.tensors[edit.tensor].dtype))
        off = 0.0 if same else _misfit(stored.float(), before, planned)
        return (None if same else f"{edit.tensor} is not as planned ({_fit_text(off)})"), off
    off = _misfit(stored.float(), before, planned)
    if abs(off) > COEFFICIENT_TOLERANCE:
        return f"{edit.tensor}: {_fit_text(off)}", abs(off)
    # A fitted coefficient does not see what was added across the planned change; the bits do.
    same = found.tensors[edit.tensor].dtype == edit.dtype and torch.equal(stored, recompute(base, edit))
    return (None if same else f"{edit.tensor} carries the planned change and something else"), abs(off)


def _misfit(stored: Tensor, before: Tensor, planned: Tensor) -> float:
    """Found over planned coefficient, minus one; where no change is planned, the size of the one found."""
    change, found = (planned - before).double(), (stored - before).double()
    size = float((change * change).sum())
    return float((found * change).sum()) / size - 1 if size else float(found.norm())


def _fit_text(off: float) -> str:
    return f"it carries {1 + off:.4g} of the planned change"


# --- the candidate, in a fresh process


def _candidates(folder: Path, base: Checkpoint, plan: Plan, scratch: Path) -> dict[str, tuple[Path, str]]:
    """Name to (folder, dtype): what is compared in float32, and the published file in its own dtype.

    Biases are compared in float32 from the published file itself; matrices were rounded there, so that the same plan is
    written once more in float32 by the same code (untouched shards are linked).
    """
    storage = storage_dtype(base)
    found = {"float32": (folder, "float32")}
    if storage != "float32":
        found["storage"] = (folder, storage)
        if not plan.is_constant:
            exact = scratch / "exact"
            exact.mkdir()
            write_edited(base, plan.edits, exact, config_changes=plan.config_changes, dtype="F32", rename=plan.rename)
            found["float32"] = (exact, "float32")
    return found


def _run_worker(
    candidates: Mapping[str, tuple[Path, str]], job: Mapping[str, Any], along: Tensor, scratch: Path
) -> dict[str, list[str]]:
    """Keys that did not load, by candidate. What the candidates computed lies in ``scratch`` afterwards."""
    save_file({"along": along}, scratch / "along.safetensors")
    listed = [{"name": name, "folder": str(path), "dtype": dtype} for name, (path, dtype) in candidates.items()]
    whole = {**job, "candidates": listed, "out": str(scratch), "along": str(scratch / "along.safetensors")}
    (scratch / "job.json").write_text(json.dumps(whole))
    command = [sys.executable, reload_worker.__file__, str(scratch / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, stdin=subprocess.DEVNULL)
    if "No space left on device" in done.stderr:
        raise CheckpointError(f"the disk of {scratch.parent} is full; point TMPDIR to one with room for the logits")
    if done.returncode < 0 or "out of memory" in done.stderr.lower():
        raise CheckpointError(
            f"the process that reloads the model was stopped (exit status {done.returncode}), probably for lack of "
            "memory; nothing was found about the model itself. Free memory, or validate on fewer and shorter prompts"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {name: [f"plain transformers cannot load or run it: {reason}"] for name in candidates}
    problems: dict[str, list[str]] = json.loads((scratch / "problems.json").read_text())
    return problems
