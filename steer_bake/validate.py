"""The certificate: does the file on disk compute what the hooks compute?

The reference is the base model with hooks. The candidate is the folder, loaded by plain transformers in a process that
never imports steer_bake (``reload_worker.py``). Compared over left-padded batches and cached greedy decoding, in legs:

* **constants** (only biases were written): the file read as float32 against hooks that use the stored, rounded values;
* **rank-one** (matrices were edited): the same plan written in float32 by the same code, against the exact hooks;
* **adapter** (instead of these two): the base read as float32 with the adapter on it, against the exact hooks, loaded
  through PeftModel, AutoPeftModelForCausalLM and AutoModelForCausalLM;
* **storage**: the published file in its own dtype, at most 1.2 x as far from the float32 hooks as hooks in that dtype
  (an adapter: 2 x; medians over three draws of the rounding noise, and what so few tokens leave
  open).

A float32 leg that is past its limit by no more than the draw of the rounding noise can be is drawn twice more, and the
median counts: an error of the file is there in every draw.

Beside them: every edited tensor against the plan, the stream's own obedience to ablation and clamp, and the effect, so
that a bake that changes nothing never passes.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import adapter, architectures, manifest, reload_worker, streaming
from .adapter import check_adapter
from .checkpoint import Checkpoint, write_edited
from .checks import Check, require
from .comparison import DRAWS, Comparison, Gap, storage_dtype, stream_probes
from .contents import acted_on
from .errors import CheckpointError
from .interventions import Intervention
from .models import load_tokenizer, require_peft
from .plan import Plan, make_plan
from .tensors import check_tensors

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
    files: Mapping[str, str] = field(default_factory=dict)  # sha256 of everything in the folder that loaders act on
    gates: tuple[Mapping[str, Any], ...] = ()  # each with the tokens on which it was open, closed and in between

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
    stream: bool = False,
    prefer: str | None = None,
    target: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare the checkpoint or adapter in ``folder`` with ``base_folder`` under hooks, on tokenised prompts ``rows``.

    Failing checks are in the report, not raised (see :meth:`Report.require`). ``prefer`` is what the plan preferred
    and ``target`` what it is for; by default, what the folder's own ``steering.json`` says. ``stream`` keeps the
    weights of both on disk (``streaming.py``): the figures are the same, memory holds one tensor of the model at a
    time, and every pass, one per batch and one per decoded token, reads the whole checkpoint. ``progress`` counts
    passes.

    Raises:
        CheckpointError: the base is missing or damaged, or cannot be streamed. (A damaged candidate is a failed check.)
    """
    base = Checkpoint.open(base_folder)
    prefer, target = prefer or manifest.preference(folder), target or manifest.target(folder)
    plan = make_plan(base, interventions, prefer, target, pad_to=manifest.padding(folder))
    if plan.target == "lora":
        require_peft()
    layout = architectures.layout(base.config)
    reason = _why_not_streamed(base, plan) if stream else None
    if reason:
        raise CheckpointError(f"{reason}: leave out --stream, on a machine whose memory holds the model in float32")
    job = {
        "batches": [list(map(list, rows[at : at + batch_size])) for at in range(0, len(rows), batch_size)],
        "decode": list(map(list, rows[:decode_prompts])),
        "decode_tokens": decode_tokens,
        "pad_id": pad_id,
        "device": device,
        "stream": stream,
        "threads": torch.get_num_threads(),
    }
    along, job["probes"] = stream_probes(plan, layout)

    checks = [*_structure(folder, base, plan)]
    files = acted_on(folder)
    with tempfile.TemporaryDirectory(prefix="steer-bake-validate-") as name:
        scratch = Path(name)
        _check_room(base, plan, sum(map(len, rows)), scratch)
        candidates = _candidates(folder, base, plan, scratch)
        passes = _Passes(candidates, job, plan, progress)
        draws = {name: range(DRAWS if name == "storage" else 1) for name in candidates}
        problems = _run_worker(candidates, draws, job, along, scratch, passes)
        checks += [
            Check(f"strict load ({name})", not found, None, None, "; ".join(found[:4]) or "every key fits")
            for name, found in problems.items()
        ]
        loaded = frozenset(name for name, found in problems.items() if not found)
        comparison = Comparison(base, plan, layout, job, along, scratch, loaded, passes.one)
        comparison.run()
        late = {name: candidates[name] for name in comparison.a_little_past_the_limit()}
        if late:
            passes.more((len(late) + 1) * (DRAWS - 1))
            _forget_logits(scratch)
            draws = dict.fromkeys(late, range(1, DRAWS))
            again = _run_worker(late, draws, job, along, scratch, passes)
            comparison.draw_again([name for name, found in again.items() if not found])
        passes.finished()
    checks += comparison.checks()
    return Report(
        str(folder), str(base_folder), plan.sha256, all(check.passed for check in checks), tuple(checks),
        comparison.effect.gap(), comparison.legs(), comparison.floor_kl(),
        tuple(comparison.described(one) for one in plan.interventions), len(rows), sum(map(len, rows)), files,
        tuple(comparison.gates()),
    )  # fmt: skip


# --- what is on disk, against the plan


def _structure(folder: Path, base: Checkpoint, plan: Plan) -> Iterator[Check]:
    if plan.target == "lora":
        yield from _adapter_structure(folder, base, plan)
        return
    try:
        found = Checkpoint.open(folder)
        elsewhere = manifest.read(folder).computed_elsewhere if manifest.exists(folder) else None
    except CheckpointError as error:
        yield Check("files", False, None, None, str(error))
        return
    yield from check_tensors(found, base, plan, elsewhere=elsewhere, fitted=True)
    if plan.rehoused_from:
        yield from _tokenizer(folder, base)


def _adapter_structure(folder: Path, base: Checkpoint, plan: Plan) -> Iterator[Check]:
    try:
        told = manifest.read(folder)
    except CheckpointError as error:
        yield Check("files", False, None, None, str(error))
        return
    yield from check_adapter(folder, base, plan, told.base, elsewhere=told.computed_elsewhere)


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


# --- the candidate, in a fresh process


def _why_not_streamed(base: Checkpoint, plan: Plan) -> str | None:
    """Why the comparison cannot leave the weights on disk; None where it can."""
    if plan.target == "lora":
        return "PEFT puts an adapter on a model in memory"
    return streaming.why_not(str(base.folder))


def _check_room(base: Checkpoint, plan: Plan, tokens: int, scratch: Path) -> None:
    """Refuse to begin what would fill the disk of ``scratch``: logits, and edited matrices once more in float32."""
    vocabulary = base.config.get("vocab_size")
    logits = 4 * tokens * vocabulary if isinstance(vocabulary, int) else 0
    exact = 1 + (len(adapter.OTHER_LOADERS) if plan.target == "lora" else 0)
    # Those of the hooks are kept beside them for the storage dtype; before more are drawn all are forgotten.
    first = exact if storage_dtype(base) == "float32" else exact + 1 + DRAWS
    needed = max(first, exact * (DRAWS - 1)) * logits
    if storage_dtype(base) != "float32" and not plan.is_constant:
        needed += sum(4 * math.prod(edit.shape) for edit in plan.edits)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise CheckpointError(
            f"logits and float32 copies of edited tensors take {needed / 1e9:.1f} GB of {scratch.parent}, where "
            f"{free / 1e9:.1f} GB are free; point TMPDIR to a disk with room, or validate on fewer prompts"
        )


def _forget_logits(scratch: Path) -> None:
    """Delete what was compared already, batch by batch."""
    for path in scratch.glob("*.*.safetensors"):
        path.unlink()


def _candidates(folder: Path, base: Checkpoint, plan: Plan, scratch: Path) -> dict[str, adapter.Candidate]:
    """By name what is compared in float32, and the published file in its own dtype.

    Biases are compared in float32 from the published file itself; matrices were rounded there, so that the same plan is
    written once more in float32 by the same code (untouched shards are linked).
    """
    storage = storage_dtype(base)
    if plan.target == "lora":
        return adapter.candidates(folder, base, storage, scratch)
    found = {"float32": {"folder": str(folder), "dtype": "float32"}}
    if storage != "float32":
        found["storage"] = {"folder": str(folder), "dtype": storage}
        if not plan.is_constant:
            exact = scratch / "exact"
            exact.mkdir()
            write_edited(
                base,
                plan.edits,
                exact,
                config_changes=plan.config_changes,
                rename=plan.rename,
                drop=plan.dropped,
                dtype="F32",
            )
            found["float32"]["folder"] = str(exact)
    return found


class _Passes:
    """Counts passes over a model, in the worker and here; how many there will be is known but for the norms."""

    def __init__(
        self, candidates: Mapping[str, Any], job: Mapping[str, Any], plan: Plan, progress: Progress | None
    ) -> None:
        batches, sides = len(job["batches"]), 2 * len(candidates)  # every candidate has its hooks beside it
        self._batches = batches
        whole = job["decode_tokens"] + bool(job["probes"])
        if plan.target == "lora":  # loaded in other ways too, with the hooks that the first one has
            sides -= len(adapter.OTHER_LOADERS)
        redrawn = 2 * (DRAWS - 1) * ("storage" in candidates)
        self._total = (sides + 1 + plan.is_constant + redrawn) * batches + 2 * whole
        self._done = 0
        self._progress = progress or (lambda _done, _total: None)
        self._progress(0, self._total)

    def one(self) -> None:
        self._set(self._done + 1)

    def more(self, times: int) -> None:
        """As many more passes over all batches."""
        self._total = self._done + times * self._batches

    def finished(self) -> None:
        self._set(self._total)

    def follow(self, process: subprocess.Popen[bytes], passes: Path) -> None:
        """Wait for the worker, whose count is the length of the file ``passes``."""
        before = self._done
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
                if passes.exists():
                    self._set(before + passes.stat().st_size)
                if process.returncode is not None:
                    return
        except BaseException:
            process.kill()
            process.wait()
            raise

    def _set(self, done: int) -> None:
        if done != self._done:
            self._done = done
            self._progress(min(done, self._total), self._total)


def start_worker(job: Path, said: IO[str]) -> subprocess.Popen[bytes]:
    """A fresh process of plain transformers on ``job``, its stderr in the file ``said``."""
    command = [sys.executable, reload_worker.__file__, str(job)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, cwd=job.parent
    )  # fmt: skip


def _run_worker(
    candidates: Mapping[str, adapter.Candidate],
    draws: Mapping[str, Sequence[int]],
    job: Mapping[str, Any],
    along: Tensor,
    scratch: Path,
    passes: _Passes,
) -> dict[str, list[str]]:
    """Keys that did not load, by candidate. What the candidates computed lies in ``scratch`` afterwards."""
    save_file({"along": along}, scratch / "along.safetensors")
    listed = [{"name": name, "draws": list(draws[name]), **candidate} for name, candidate in candidates.items()]
    whole = {**job, "candidates": listed, "out": str(scratch), "along": str(scratch / "along.safetensors")}
    (scratch / "job.json").write_text(json.dumps(whole))
    (scratch / "passes").unlink(missing_ok=True)
    with open(scratch / "stderr", "w+", encoding="utf-8", errors="replace") as said:
        done = start_worker(scratch / "job.json", said)
        passes.follow(done, scratch / "passes")
        said.seek(0)
        stderr = said.read()
    if "No space left on device" in stderr:
        raise CheckpointError(f"the disk of {scratch.parent} is full; point TMPDIR to one with room for the logits")
    if done.returncode < 0 or "out of memory" in stderr.lower():
        raise CheckpointError(
            f"the process that reloads the model was stopped (exit status {done.returncode}), probably for lack of "
            "memory; nothing was found about the model itself. Free memory, or validate on fewer and shorter prompts"
        )
    if done.returncode:
        reason = (stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        loaders = "PEFT" if any("adapter" in one for one in candidates.values()) else "plain transformers"
        return {name: [f"{loaders} cannot load or run it: {reason}"] for name in candidates}
    problems: dict[str, list[str]] = json.loads((scratch / "problems.json").read_text())
    return problems
