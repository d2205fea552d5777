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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from . import architectures, reload_worker
from .activations import collect
from .affine import Affine, compose
from .architectures import Architecture
from .checkpoint import Checkpoint, Edit, recompute, write_edited
from .errors import CheckpointError, ValidationFailed
from .interventions import Intervention
from .plan import Plan, describe, make_plan
from .prompts import Encoded
from .sites import Site
from .steering import steer

CONSTANTS_TOLERANCE = 2e-5  # max logit gap in units of std(logits), float32: rounding noise is 1e-6 to 4e-6
RANK_ONE_TOLERANCE = 5e-5  # the edited product rounds in another order than hook after product
COEFFICIENT_TOLERANCE = 1e-3
NOISE_MARGIN = 1.2
STREAM_TOLERANCE = 1e-5
LEAST_EFFECT = 1e-3  # max logit gap base to hooked, in units of std(logits); less is a bake that does nothing

_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Check:
    """One line of the certificate."""

    name: str
    passed: bool
    value: float | None  # what was measured, where it is one number
    limit: float | None
    detail: str


@dataclass(frozen=True)
class Gap:
    """How far two sets of logits are apart over all real tokens."""

    max_over_std: float  # max |difference| / std of the reference
    kl: float  # mean over tokens of KL(reference || other), nats
    top1: float  # share of tokens with the same most likely next token
    first_divergence: int | None  # first greedy token that differs, None where all are equal


@dataclass(frozen=True)
class Report:
    """The outcome, ready to be written as ``report.json``."""

    folder: str
    base: str
    passed: bool
    checks: tuple[Check, ...]
    effect: Gap | None  # base to hooked
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
    along, job["probes"] = _stream_probes(plan, architecture, base)

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
        comparison = _Comparison(base, plan, architecture, job, along, scratch, loaded)
        comparison.run()
        advance(3, 3)
    checks += comparison.checks()
    return Report(
        str(folder), str(base_folder), all(check.passed for check in checks), tuple(checks), comparison.effect.gap(),
        comparison.legs(), comparison.floor_kl(), tuple(comparison.described(one) for one in plan.interventions),
        len(rows), sum(map(len, rows)),
    )  # fmt: skip


# --- what is on disk, against the plan


def _structure(folder: Path, base: Checkpoint, plan: Plan) -> Iterator[Check]:
    try:
        found = Checkpoint.open(folder)
    except CheckpointError as error:
        yield Check("files", False, None, None, str(error))
        return
    wrong = [
        f"config.json has {key}={found.config.get(key)!r}, planned {value!r}"
        for key, value in plan.config_changes.items()
        if found.config.get(key) != value
    ]
    yield Check("config", not wrong, None, None, "; ".join(wrong) or "as planned")

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
    if stored.ndim == 1 or edit.affine.is_identity:
        # Constants and copies are what the other legs build on: nothing but the planned bits will do.
        same = torch.equal(stored, recompute(base, edit, found.tensors[edit.tensor].dtype))
        off = 0.0 if same else _misfit(stored.float(), before, planned)
        return (None if same else f"{edit.tensor} is not as planned ({_fit_text(off)})"), off
    off = _misfit(stored.float(), before, planned)
    return (f"{edit.tensor}: {_fit_text(off)}" if abs(off) > COEFFICIENT_TOLERANCE else None), abs(off)


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
    storage = _storage_dtype(base)
    found = {"float32": (folder, "float32")}
    if storage != "float32":
        found["storage"] = (folder, storage)
        if not plan.is_constant:
            exact = scratch / "exact"
            exact.mkdir()
            write_edited(base, plan.edits, exact, config_changes=plan.config_changes, dtype="F32")
            found["float32"] = (exact, "float32")
    return found


def _storage_dtype(base: Checkpoint) -> str:
    return _TORCH_NAMES.get(base.storage_dtype, "float32")


def _run_worker(
    candidates: Mapping[str, tuple[Path, str]], job: Mapping[str, Any], along: Tensor, scratch: Path
) -> dict[str, list[str]]:
    """Keys that did not load, by candidate. What the candidates computed lies in ``scratch`` afterwards."""
    save_file({"along": along}, scratch / "along.safetensors")
    listed = [{"name": name, "folder": str(path), "dtype": dtype} for name, (path, dtype) in candidates.items()]
    whole = {**job, "candidates": listed, "out": str(scratch), "along": str(scratch / "along.safetensors")}
    (scratch / "job.json").write_text(json.dumps(whole))
    command = [sys.executable, reload_worker.__file__, str(scratch / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {name: [f"plain transformers cannot load or run it: {reason}"] for name in candidates}
    problems: dict[str, list[str]] = json.loads((scratch / "problems.json").read_text())
    return problems


# --- the reference, with hooks, against the candidate


@dataclass
class _Distance:
    """Running difference of two sets of logits, batch by batch."""

    greatest: float = 0.0
    kl: float = 0.0
    same: int = 0
    tokens: int = 0
    numbers: int = 0
    total: float = 0.0
    squares: float = 0.0
    first_divergence: int | None = None

    def update(self, reference: Tensor, other: Tensor) -> None:
        """Add a batch, both [tokens, vocab] float32."""
        self.greatest = max(self.greatest, float((reference - other).abs().max()))
        self.same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.tokens += len(reference)
        self.numbers += reference.numel()
        self.total += float(reference.sum(dtype=torch.float64))
        self.squares += float(reference.square().sum(dtype=torch.float64))
        p, q = reference.log_softmax(-1), other.log_softmax(-1)
        self.kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))

    def compare_decoding(self, reference: Tensor, other: Tensor) -> None:
        """Greedy tokens, both [batch, tokens]: where do they part?"""
        width = min(reference.shape[1], other.shape[1])
        differs = (reference[:, :width] != other[:, :width]).any(0).nonzero().flatten()
        if len(differs):
            self.first_divergence = int(differs[0])
        elif reference.shape != other.shape:
            self.first_divergence = width

    def gap(self) -> Gap:
        std = (self.squares / self.numbers - (self.total / self.numbers) ** 2) ** 0.5
        # Float32 log-probabilities leave about 1e-8 of noise in a KL that is zero.
        kl = max(0.0, self.kl / self.tokens)
        return Gap(self.greatest / std, kl, self.same / self.tokens, self.first_divergence)


@dataclass
class _Comparison:
    """Base, hooks and what the worker left in ``scratch``, one batch in memory at a time."""

    base: Checkpoint
    plan: Plan
    architecture: Architecture
    job: dict[str, Any]
    along: Tensor
    scratch: Path
    loaded: frozenset[str]  # the candidates that were loaded and measured
    effect: _Distance = field(default_factory=_Distance)  # base to hooks
    exact: _Distance = field(default_factory=_Distance)  # hooks to the candidate, float32
    storage: _Distance = field(default_factory=_Distance)  # float32 hooks to the published file in its own dtype
    floor: _Distance = field(default_factory=_Distance)  # float32 hooks to hooks in that dtype
    readings: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[Site, float] = field(default_factory=dict)  # mean |h| of the base where something is added

    def run(self) -> None:
        with self._model("float32") as model:
            self._measure_norms(model)
            self._float32(model)
        if "storage" in self.loaded:
            with self._model(_storage_dtype(self.base)) as model, steer(model, self.plan.interventions):
                for index, rows in enumerate(self.job["batches"]):
                    hooked = load_file(self.scratch / f"hooked.{index}.safetensors")["logits"]
                    self.floor.update(hooked, reload_worker.logits(model, rows, self.job["pad_id"]))

    def _float32(self, model: PreTrainedModel) -> None:
        hooks = list(self.plan.interventions)
        stored = [*hooks, *_rounding(self.base, self.plan, self.architecture)] if self.plan.is_constant else hooks
        pad_id = self.job["pad_id"]
        for index, rows in enumerate(self.job["batches"]):
            plain = reload_worker.logits(model, rows, pad_id)
            with steer(model, hooks):
                hooked = reload_worker.logits(model, rows, pad_id)
            self.effect.update(plain, hooked)
            if "float32" in self.loaded:
                with steer(model, stored):
                    reference = reload_worker.logits(model, rows, pad_id) if stored != hooks else hooked
                self.exact.update(reference, self._candidate("float32", index))
            if "storage" in self.loaded:
                self.storage.update(hooked, self._candidate("storage", index))
                save_file({"logits": hooked}, self.scratch / f"hooked.{index}.safetensors")
        if "float32" not in self.loaded:
            return
        found = load_file(self.scratch / "float32.safetensors")
        with steer(model, stored):
            decoded = reload_worker.greedy(model, self.job["decode"], pad_id, self.job["decode_tokens"])
            if self.job["probes"]:
                rows = self.job["batches"][0]
                self.readings["hooks"] = reload_worker.readings(model, rows, pad_id, self.job["probes"], self.along)
                self.readings["reloaded file"] = found["readings"]
        self.exact.compare_decoding(decoded, found["greedy"])

    def _candidate(self, name: str, index: int) -> Tensor:
        return load_file(self.scratch / f"{name}.{index}.safetensors")["logits"]

    @contextmanager
    def _model(self, dtype: str) -> Iterator[PreTrainedModel]:
        model, problems = reload_worker.load_strict(str(self.base.folder), dtype)
        if problems:
            raise CheckpointError(f"the base {self.base.folder} does not load cleanly: {'; '.join(problems[:4])}")
        yield model.to(self.job["device"])

    def _measure_norms(self, model: PreTrainedModel) -> None:
        sites = {one.site for one in self.plan.interventions if one.site.layer is not None and one.affine.has_shift}
        ends = [Encoded(tuple(row), len(row) - 1, len(row)) for batch in self.job["batches"] for row in batch]
        if sites:
            ordered = sorted(sites, key=lambda site: site.order)
            found = collect(model, self.architecture, ends, ["all"] * len(ends), ordered)
            self.norms = {site: statistics["all"].norm for site, statistics in found.items()}

    def described(self, intervention: Intervention) -> Mapping[str, Any]:
        """The intervention with its dose: the length added over the mean |h| at the prompts' last tokens."""
        norm = self.norms.get(intervention.site)
        return describe(replace(intervention, stream_norm=norm or intervention.stream_norm))

    # --- what came out

    @property
    def _exact_leg(self) -> tuple[str, float]:
        return ("constants", CONSTANTS_TOLERANCE) if self.plan.is_constant else ("rank_one", RANK_ONE_TOLERANCE)

    def legs(self) -> dict[str, Gap]:
        found = {self._exact_leg[0]: self.exact.gap()} if "float32" in self.loaded else {}
        return found | ({"storage": self.storage.gap()} if "storage" in self.loaded else {})

    def floor_kl(self) -> float | None:
        return self.floor.gap().kl if "storage" in self.loaded else None

    def checks(self) -> Iterator[Check]:
        if "float32" in self.loaded:
            leg, limit = self._exact_leg
            gap = self.exact.gap()
            decoding = "identical" if gap.first_divergence is None else f"differs from token {gap.first_divergence} on"
            yield Check(
                f"function, {leg} (float32)", gap.max_over_std <= limit and gap.first_divergence is None,
                gap.max_over_std, limit, f"max gap {gap.max_over_std:.1e} std, greedy decoding {decoding}",
            )  # fmt: skip
        if "storage" in self.loaded:
            kl, floor = self.storage.gap().kl, self.floor.gap().kl
            yield Check(
                "function, storage dtype", kl <= NOISE_MARGIN * floor, kl, NOISE_MARGIN * floor,
                f"KL(hooks || file) {kl:.2e}, noise floor {floor:.2e} (ratio {kl / floor:.2f})",
            )  # fmt: skip
        for what, found in self.readings.items():
            value, probe = float(found.max()), self.job["probes"][int(found.amax(1).argmax())]
            yield Check(
                f"stream ({what})", value <= STREAM_TOLERANCE, value, STREAM_TOLERANCE,
                f"|r.h - expected| / |h| is {value:.1e} at worst, at the {probe['side']} of {probe['module']}",
            )  # fmt: skip
        effect = self.effect.gap()
        felt = effect.max_over_std >= LEAST_EFFECT
        yield Check(
            "effect", felt, effect.max_over_std, LEAST_EFFECT,
            f"hooks move the logits by {effect.max_over_std:.3g} std, KL {effect.kl:.3g}"
            + ("" if felt else ": this recipe changes nothing; raise the coefficient"),
        )  # fmt: skip


def _rounding(base: Checkpoint, plan: Plan, architecture: Architecture) -> Iterator[Intervention]:
    """What rounding each bias to its storage dtype adds to the stream: at most a unit in the last place."""
    edits = {edit.tensor: edit for edit in plan.edits}
    for layer in range(architectures.layer_count(architecture, base.config)):
        for point, write in (("attn_out", architecture.attention), ("mlp_out", architecture.mlp)):
            edit = edits.get((write.bias or "").format(layer=layer))
            if edit is None:
                continue
            exact = edit.affine(base.read(edit.source).float() if edit.source else torch.zeros(edit.shape))
            off = recompute(base, edit).float() - exact
            shift = replace(Affine.identity(len(off)), shift=off * write.scale(base.config))
            yield Intervention(Site(point, layer), shift, name="rounding")


def _stream_probes(plan: Plan, architecture: Architecture, base: Checkpoint) -> tuple[Tensor, list[dict[str, Any]]]:
    """What ablation and clamp at ``writes`` promise of the stream itself, at every residual site.

    The components that the writes can no longer produce, [d, m], and per site what they must be: only what the plan's
    own shifts have put there so far.
    """
    width = int(base.config[architecture.width])
    at_writes = compose((one.affine for one in plan.interventions if one.site.point == "writes"), width)
    along = at_writes.fixed_functionals()
    elsewhere = [one for one in plan.interventions if one.site.point != "writes"]
    if along.shape[1] == 0 or any(one.affine.is_linear for one in elsewhere):
        return along[:, :0], []

    def expected(point: str, layer: int) -> list[float]:
        passed = [one.affine.shift for one in elsewhere if one.site.order <= Site(point, layer).order]
        total = sum(passed, at_writes.shift)
        return [float(value) for value in along.double().T @ total.double()]

    probes = []
    layers = architectures.layer_count(architecture, base.config)
    for layer in range(layers):
        module, middle = architecture.layer.format(layer=layer), architecture.mid_norm.format(layer=layer)
        probes.append({"module": module, "side": "input", "expected": expected("resid_pre", layer)})
        probes.append({"module": middle, "side": "input", "expected": expected("resid_mid", layer)})
    last = architecture.layer.format(layer=layers - 1)
    probes.append({"module": last, "side": "output", "expected": expected("resid_post", layers - 1)})
    return along, probes
