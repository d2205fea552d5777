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
from .checkpoint import Checkpoint, write_edited
from .checks import Check, require
from .comparison import Comparison, Gap, storage_dtype, stream_probes
from .errors import CheckpointError
from .interventions import Intervention
from .plan import Plan, make_plan
from .tensors import check_tensors

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
        require(self.folder, self.checks)


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
    progress: Progress | None = None,
) -> Report:
    """Compare the checkpoint in ``folder`` with ``base_folder`` under hooks, on tokenised prompts ``rows``.

    Failing checks are in the report, not raised (see :meth:`Report.require`).

    Raises:
        CheckpointError: the base is missing or damaged. (A damaged candidate is a failed check.)
    """
    advance = progress or (lambda _done, _total: None)
    base = Checkpoint.open(base_folder)
    plan = make_plan(base, interventions)
    architecture = architectures.for_config(base.config)
    job = {
        "batches": [list(map(list, rows[at : at + batch_size])) for at in range(0, len(rows), batch_size)],
        "decode": list(map(list, rows[:decode_prompts])),
        "decode_tokens": decode_tokens,
        "pad_id": pad_id,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    along, job["probes"] = stream_probes(plan, architecture, base)

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
        comparison = Comparison(base, plan, architecture, job, along, scratch, loaded)
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
        elsewhere = manifest.read(folder).computed_elsewhere if manifest.exists(folder) else None
    except CheckpointError as error:
        yield Check("files", False, None, None, str(error))
        return
    yield from check_tensors(found, base, plan, elsewhere=elsewhere, fitted=True)


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
            write_edited(base, plan.edits, exact, config_changes=plan.config_changes, dtype="F32")
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
