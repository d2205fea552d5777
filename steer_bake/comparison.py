"""The hooked reference against a candidate's logits: distances, noise floor, decoding and the stream itself.

``validate`` runs the candidate first, in a fresh process; here the base runs with and without hooks and is compared
batch by batch with what the candidate left on disk, so that memory holds one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import reload_worker
from .activations import collect
from .affine import Affine, compose
from .architectures import Layout, submodule
from .checkpoint import Checkpoint, recompute
from .checks import Check
from .errors import CheckpointError
from .interventions import Intervention
from .plan import Plan, describe
from .prompts import Encoded
from .representations.squares import missing
from .sites import Site
from .steering import steer, watch

ADAPTER_TOLERANCE = 2e-5  # products of thin matrices, added to what the untouched matrix gives
CONSTANTS_TOLERANCE = 2e-5  # max logit gap in units of std(logits), float32: rounding noise is 1e-6 to 4e-6
RANK_ONE_TOLERANCE = 5e-5  # the edited product rounds in another order than hook after product
NOISE_MARGIN = 1.2
#: Of adapters: their product joins an output that was rounded before, while a hook sees what rounding did. And to
#: stacked experts PEFT adds it in their own dtype, rounded to nearest.
ADAPTER_MARGIN = 2.0
#: Of the rounding noise: how it falls out is a property of the whole model, in one of five draws or so twice as much as
#: in the others, however many tokens are read. Medians over so many are compared.
DRAWS = 3
#: A first draw that is past the limit of float32 by at most this factor may be one of those; the others then decide.
ONE_DRAW = 3.0
SAMPLING_ERRORS = 2.0  # standard errors of the two mean divergences, of storage dtype and of the noise floor
STREAM_TOLERANCE = 1e-5
ROWS_AT_ONCE = 64  # a difference of logits takes several times their memory
APPROXIMATE_SHARE = 0.25  # an approximation's max logit gap to the hooks, of the gap that the hooks make
LEAST_EFFECT = 1e-3  # max logit gap base to hooked, in units of std(logits); less is a bake that does nothing

_TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Gap:
    """How far two sets of logits are apart over all real tokens."""

    max_over_std: float  # max |difference| / std of the reference
    kl: float  # mean over tokens of KL(reference || other), nats
    top1: float  # share of tokens with the same most likely next token
    first_divergence: int | None  # first greedy token that differs, None where all are equal


def storage_dtype(base: Checkpoint) -> str:
    return _TORCH_NAMES.get(base.storage_dtype, "float32")


@dataclass
class Distance:
    """Running difference of two sets of logits, batch by batch."""

    greatest: float = 0.0
    kl: float = 0.0
    kl_squares: float = 0.0
    same: int = 0
    tokens: int = 0
    numbers: int = 0
    total: float = 0.0
    squares: float = 0.0
    first_divergence: int | None = None

    def update(self, reference: Tensor, other: Tensor) -> None:
        """Add a batch, both [tokens, vocab] float32."""
        for some, others in zip(torch.split(reference, ROWS_AT_ONCE), torch.split(other, ROWS_AT_ONCE), strict=True):
            self._update(some, others)

    def _update(self, reference: Tensor, other: Tensor) -> None:
        off = float((reference - other).abs().max())
        # NaN is kept, whichever batch it came from, and then fails every limit.
        self.greatest = max(self.greatest, off) if math.isfinite(self.greatest + off) else math.nan
        self.same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.tokens += len(reference)
        self.numbers += reference.numel()
        self.total += float(reference.sum(dtype=torch.float64))
        self.squares += float(reference.square().sum(dtype=torch.float64))
        p, q = reference.log_softmax(-1), other.log_softmax(-1)
        each = (p.exp() * (p - q)).sum(-1, dtype=torch.float64)
        self.kl += float(each.sum())
        self.kl_squares += float(each.square().sum())

    def compare_decoding(self, reference: Tensor, other: Tensor) -> None:
        """Greedy tokens, both [batch, tokens]: where do they part?"""
        width = min(reference.shape[1], other.shape[1])
        differs = (reference[:, :width] != other[:, :width]).any(0).nonzero().flatten()
        if len(differs):
            self.first_divergence = int(differs[0])
        elif reference.shape != other.shape:
            self.first_divergence = width

    def kl_error(self) -> float:
        """Standard error of the mean KL over these tokens."""
        mean = self.kl / self.tokens
        return math.sqrt(max(0.0, self.kl_squares / self.tokens - mean * mean) / self.tokens)

    def gap(self) -> Gap:
        std = (self.squares / self.numbers - (self.total / self.numbers) ** 2) ** 0.5
        # Float32 log-probabilities leave about 1e-8 of noise in a KL that is zero.
        kl = 0.0 if self.kl < 0 else self.kl / self.tokens
        return Gap(self.greatest / std, kl, self.same / self.tokens, self.first_divergence)


@dataclass
class Openings:
    """On how many tokens a gate was open, closed, and in between."""

    open: int = 0
    closed: int = 0
    tokens: int = 0

    def add(self, found: Tensor) -> None:
        """Count ``g(x)`` of some tokens, [tokens]."""
        self.open += int((found > 0.95).sum())
        self.closed += int((found < 0.05).sum())
        self.tokens += found.numel()

    def as_json(self) -> dict[str, int]:
        return {"open": self.open, "closed": self.closed, "tokens": self.tokens}


@dataclass
class Comparison:
    """Base, hooks and what the worker left in ``scratch``, one batch in memory at a time."""

    base: Checkpoint
    plan: Plan
    layout: Layout
    job: dict[str, Any]
    along: Tensor
    scratch: Path
    loaded: frozenset[str]  # the candidates that were loaded and measured
    advance: Callable[[], object] = lambda: None  # called for every pass over the model
    effect: Distance = field(default_factory=Distance)  # base to hooks
    exact: dict[str, list[Distance]] = field(default_factory=dict)  # hooks to each candidate read as float32, by draw
    storage: list[Distance] = field(default_factory=lambda: _draws())  # float32 hooks to the file in its own dtype
    floor: list[Distance] = field(default_factory=lambda: _draws())  # float32 hooks to hooks in that dtype
    readings: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[Site, float] = field(default_factory=dict)  # mean |h| of the base where something is added
    missing: dict[int, float] = field(default_factory=dict)  # by layer: what squares lack of the vector, at worst
    openings: dict[int, Openings] = field(default_factory=dict)  # by number among the plan's gates

    def run(self) -> None:
        with self._model("float32") as model:
            self._measure_norms(model)
            self._measure_squares(model)
            self._float32(model)
        if "storage" in self.loaded:
            with self._model(storage_dtype(self.base)) as model, steer(model, self.plan.interventions):
                for draw, index, found in reload_worker.drawn(model, self.job, range(DRAWS)):
                    hooked = load_file(self.scratch / f"hooked.{index}.safetensors")["logits"]
                    self.floor[draw].update(hooked, found)

    def a_little_past_the_limit(self) -> list[str]:
        """The candidates read as float32 that may owe it to this one draw of the rounding noise (:data:`ONE_DRAW`)."""
        limit = math.inf if self.plan.is_approximate else self._tolerance
        gaps = {name: self._gap(name).max_over_std for name in self.exact}
        return [name for name, gap in gaps.items() if limit < gap <= ONE_DRAW * limit]

    def draw_again(self, names: Sequence[str]) -> None:
        """Compare the further draws of the candidates ``names``, which are in ``scratch`` by now, with the hooks'."""
        for name in names:
            self.exact[name] += [Distance() for _ in range(1, DRAWS)]
        with self._model("float32") as model, steer(model, self._reference()):
            for draw, index, hooked in reload_worker.drawn(model, self.job, range(1, DRAWS)):
                for name in names:
                    self.exact[name][draw].update(hooked, self._candidate(name, index, draw))

    def _reference(self) -> list[Intervention]:
        """What the candidate read as float32 must equal."""
        return _as_stored(self.base, self.plan) if self.plan.is_constant else list(self.plan.interventions)

    def _float32(self, model: PreTrainedModel) -> None:
        hooks, stored = list(self.plan.interventions), self._reference()
        pad_id = self.job["pad_id"]
        for index, rows in enumerate(self.job["batches"]):
            plain = reload_worker.logits(model, rows, pad_id)
            with steer(model, hooks), watch(model, [one.gate for one in self.plan.gates if one.gate]) as seen:
                hooked = reload_worker.logits(model, rows, pad_id)
            self._count_openings(rows, seen)
            self.effect.update(plain, hooked)
            if "float32" in self.loaded:
                with steer(model, stored):
                    reference = reload_worker.logits(model, rows, pad_id) if stored != hooks else hooked
                self._first_draw("float32").update(reference, self._candidate("float32", index))
            for route in sorted(self.loaded - {"float32", "storage"}):
                self._first_draw(route).update(hooked, self._candidate(route, index))
            if "storage" in self.loaded:
                for draw, storage in enumerate(self.storage):
                    storage.update(hooked, self._candidate("storage", index, draw))
                save_file({"logits": hooked}, self.scratch / f"hooked.{index}.safetensors")
        if "float32" not in self.loaded:
            return
        found = load_file(self.scratch / "float32.safetensors")
        with steer(model, stored):
            decoded = reload_worker.greedy(model, self.job["decode"], pad_id, self.job["decode_tokens"])
            if self.job["probes"]:
                rows = self.job["batches"][0]
                self.readings["hooks"] = reload_worker.readings(model, rows, pad_id, self.job["probes"], self.along)
                self.readings["reloaded, float32"] = found["readings"]
        self._first_draw("float32").compare_decoding(decoded, found["greedy"])

    def _first_draw(self, name: str) -> Distance:
        return self.exact.setdefault(name, [Distance()])[0]

    def _candidate(self, name: str, index: int, draw: int = 0) -> Tensor:
        return load_file(self.scratch / f"{name}.{index}{f'.{draw}' if draw else ''}.safetensors")["logits"]

    def _count_openings(self, rows: list[list[int]], seen: list[list[Tensor]]) -> None:
        real = reload_worker.pad(rows, self.job["pad_id"])[1].bool().flatten()
        for index, [found] in enumerate(seen):
            self.openings.setdefault(index, Openings()).add(found[real])

    @contextmanager
    def _model(self, dtype: str) -> Iterator[PreTrainedModel]:
        folder, stream = str(self.base.folder), self.job["stream"]
        try:
            model, problems = reload_worker.load_strict(folder, dtype, self.job["device"], stream=stream)
        except ValueError as error:
            raise CheckpointError(f"the base {folder} cannot be loaded: {error}") from error
        if problems:
            raise CheckpointError(f"the base {folder} does not load cleanly: {'; '.join(problems[:4])}")
        reload_worker.count_passes(model, self.advance)
        yield model

    def _measure_norms(self, model: PreTrainedModel) -> None:
        sites = {one.site for one in self.plan.interventions if one.site.layer is not None and one.affine.has_shift}
        ends = [Encoded(tuple(row), len(row) - 1, len(row)) for batch in self.job["batches"] for row in batch]
        if sites:
            ordered = sorted(sites, key=lambda site: site.order)
            found = collect(model, self.layout, ends, ["all"] * len(ends), ordered)
            self.norms = {site: statistics["all"].norm for site, statistics in found.items()}

    def _measure_squares(self, model: PreTrainedModel) -> None:
        """``eps / (ms + eps)`` of the base's stream behind each layer where squares hold a vector, over one batch."""
        layers = [int(one.write.rpartition(".")[2]) for one in self.plan.decisions if one.representation == "squares"]
        if not layers:
            return
        with ExitStack() as stack:
            for layer in layers:
                module = submodule(model, self.layout.layer(layer))
                norm = module.get_submodule(self.layout.architecture.middle)

                def behind(_: Any, __: Any, output: Any, layer: int = layer, norm: nn.Module = norm) -> None:
                    share = float(missing(norm, output[0] if isinstance(output, (tuple, list)) else output).max())
                    self.missing[layer] = max(self.missing.get(layer, 0.0), share)

                stack.callback(module.register_forward_hook(behind).remove)
            for row in self.job["batches"][0]:  # one by one: of padding nothing is asked
                reload_worker.logits(model, [row], self.job["pad_id"])

    def described(self, intervention: Intervention) -> Mapping[str, Any]:
        """The intervention with its dose: the length added over the mean |h| at the prompts' last tokens."""
        norm = self.norms.get(intervention.site)
        return describe(replace(intervention, stream_norm=norm or intervention.stream_norm))

    # --- what came out

    @property
    def _exact_leg(self) -> str:
        if self.plan.target == "lora":
            return "adapter"
        if self.plan.is_approximate:
            return "approximate"
        return "constants" if self.plan.is_constant else "rank_one"

    @property
    def _tolerance(self) -> float:
        known = {"adapter": ADAPTER_TOLERANCE, "constants": CONSTANTS_TOLERANCE, "rank_one": RANK_ONE_TOLERANCE}
        return known[self._exact_leg]

    def _gap(self, name: str) -> Gap:
        """Of a candidate read as float32: the first draw, which decoded too, or the median where there are more."""
        draws = self.exact[name]
        median = middle(draws, lambda one: one.gap().max_over_std)
        return replace(median.gap(), first_divergence=draws[0].first_divergence)

    def _how_far(self, name: str) -> str:
        first, *others = (one.gap().max_over_std for one in self.exact[name])
        far = f"max gap {self._gap(name).max_over_std:.1e} std"
        return f"{far}, median of {DRAWS} draws, the first {first:.1e}" if others else far

    def legs(self) -> dict[str, Gap]:
        found = {self._exact_leg if name == "float32" else name: self._gap(name) for name in self.exact}
        return found | ({"storage": middle(self.storage).gap()} if "storage" in self.loaded else {})

    def floor_kl(self) -> float | None:
        return middle(self.floor).gap().kl if "storage" in self.loaded else None

    def checks(self) -> Iterator[Check]:
        if "float32" in self.loaded:
            yield self._approximation() if self.plan.is_approximate else self._exactness()
        for route in (name for name in self.exact if name != "float32"):
            limit, off = self._tolerance, self._gap(route).max_over_std
            detail = f"{self._how_far(route)}, loaded through {route}"
            yield Check(f"function, {route} (float32)", off <= limit, off, limit, detail)
        if "storage" in self.loaded:
            yield self._rounding()
        for what, found in self.readings.items():
            value, probe = float(found.max()), self.job["probes"][int(found.amax(1).argmax())]
            yield Check(
                f"stream ({what})", value <= STREAM_TOLERANCE, value, STREAM_TOLERANCE,
                f"|r.h - expected| / |h| is {value:.1e} at worst, at the {probe['side']} of {probe['module']}",
            )  # fmt: skip
        yield from self._gate_checks()
        effect = self.effect.gap()
        for layer, share in self.missing.items():
            limit = CONSTANTS_TOLERANCE / effect.max_over_std if effect.max_over_std else 0.0
            yield Check(
                f"squares (layer {layer})", share <= limit, share, limit,
                f"eps / (ms + eps) of the stream: {share:.1e} of the vector is missing at worst"
                + ("" if share <= limit else f"; the stream is too quiet behind layer {layer}, choose a later one"),
            )  # fmt: skip
        felt = effect.max_over_std >= LEAST_EFFECT
        yield Check(
            "effect", felt, effect.max_over_std, LEAST_EFFECT,
            f"hooks move the logits by {effect.max_over_std:.3g} std, KL {effect.kl:.3g}"
            + ("" if felt else ": this recipe changes nothing; raise the coefficient"),
        )  # fmt: skip

    def _exactness(self) -> Check:
        limit, gap = self._tolerance, self._gap("float32")
        return Check(
            f"function, {self._exact_leg} (float32)", gap.max_over_std <= limit and gap.first_divergence is None,
            gap.max_over_std, limit, f"{self._how_far('float32')}, greedy decoding {_decoding(gap)}",
        )  # fmt: skip

    def gates(self) -> list[dict[str, Any]]:
        """Every gate with the tokens on which it was open, closed and in between."""
        return [
            {"gate": one.gate.described(), **self.openings[index].as_json()}
            for index, one in enumerate(self.plan.gates)
            if one.gate is not None and index in self.openings
        ]

    def _gate_checks(self) -> Iterator[Check]:
        found = self.gates()
        if not found:
            return
        never = [str(one["gate"]["site"]) for one in found if one["closed"] == one["tokens"]]
        shares = [1 - one["closed"] / one["tokens"] for one in found]
        good = f"{len(found)} gates open, at least in part, on {min(shares):.1%} to {max(shares):.1%} of the tokens"
        wrong = [f"the gate at {site} opens on no token: compare on prompts that it is for as well" for site in never]
        yield Check.of("gates", wrong, good)

    def _approximation(self) -> Check:
        gap, effect = self._gap("float32"), self.effect.gap()
        limit = APPROXIMATE_SHARE * effect.max_over_std
        return Check(
            "function, approximate (float32)", gap.max_over_std <= limit, gap.max_over_std, limit,
            f"NOT exact, as asked for: max gap {gap.max_over_std:.1e} std where the hooks move the logits by "
            f"{effect.max_over_std:.1e}, KL(hooks || file) {gap.kl:.2e} where they make {effect.kl:.2e}, "
            f"top-1 agreement {gap.top1:.1%}, greedy decoding {_decoding(gap)}",
        )  # fmt: skip

    def _rounding(self) -> Check:
        margin = ADAPTER_MARGIN if self.plan.target == "lora" else NOISE_MARGIN
        stored, hooked = middle(self.storage), middle(self.floor)
        kl, floor = stored.gap().kl, hooked.gap().kl
        known = self._gap("float32").kl if self.plan.is_approximate and "float32" in self.loaded else 0.0
        # Small divergences are squared distances: two that are independent of each other add up under the root at most.
        # A few tokens make most of either mean: what so many tokens leave open is no sign of anything.
        open_still = SAMPLING_ERRORS * math.hypot(stored.kl_error(), margin * hooked.kl_error())
        limit = margin * (floor**0.5 + known**0.5) ** 2 + open_still
        besides = f" (ratio {kl / floor:.2f})" if floor else ""
        besides += f", approximation {known:.2e}" if known else ""
        besides += f", sampling error {open_still:.1e}"
        return Check(
            "function, storage dtype", kl <= limit, kl, limit,
            f"KL(hooks || file) {kl:.2e}, noise floor {floor:.2e}{besides}, medians of {DRAWS} draws",
        )  # fmt: skip


def _draws() -> list[Distance]:
    return [Distance() for _ in range(DRAWS)]


def middle(draws: list[Distance], size: Callable[[Distance], float] = lambda one: one.kl) -> Distance:
    """The draw of median ``size``, the KL if not another; NaN is larger than every number."""
    return sorted(draws, key=lambda one: (math.isnan(size(one)), size(one)))[len(draws) // 2]


def _decoding(gap: Gap) -> str:
    return "identical" if gap.first_divergence is None else f"differs from token {gap.first_divergence} on"


def _as_stored(base: Checkpoint, plan: Plan) -> list[Intervention]:
    """The plan's interventions as the file holds them: constants and the neurons of gates in the storage dtype."""
    dtype = storage_dtype(base)
    gated = [
        one if one.gate is None else replace(one, gate=replace(one.gate, stored=dtype)) for one in plan.interventions
    ]
    return [*gated, *_rounding(base, plan)]


def _rounding(base: Checkpoint, plan: Plan) -> Iterator[Intervention]:
    """What rounding each constant to its storage dtype adds to the stream: at most a unit in the last place."""
    edits = {edit.tensor: edit for edit in plan.edits}
    for constant in plan.constants:
        edit = edits[constant.tensor]
        off = recompute(base, edit).float() - recompute(base, edit, "F32")
        off = off.movedim(edit.axis, -1).reshape(-1, edit.shape[edit.axis])[0]  # where it is held many times: the same
        shift = replace(Affine.identity(len(off)), shift=off * constant.scale)
        yield Intervention(constant.site, shift, name="rounding")


def _always_added(one: Intervention) -> Tensor:
    """Of a gated shift what is added where the gate is closed: the part of it that does not depend on the token."""
    if one.gate is None:
        return one.affine.shift
    return torch.zeros_like(one.affine.shift) if one.gate.otherwise is None else one.gate.otherwise


def _opens_along(one: Intervention, along: Tensor) -> bool:
    """Whether a gate adds to some tokens, and not to others, something along what the stream shall obey."""
    opened = one.affine.shift - _always_added(one)
    return one.gate is not None and bool((along.T @ opened).abs().max() > 1e-6 * opened.norm())


def stream_probes(plan: Plan, layout: Layout) -> tuple[Tensor, list[dict[str, Any]]]:
    """What ablation and clamp at ``writes`` promise of the stream itself, at every residual site.

    The components that the writes can no longer produce, [d, m], and per site what they must be: only what the plan's
    own shifts have put there so far.
    """
    at_writes = compose((one.affine for one in plan.interventions if one.site.point == "writes"), layout.width)
    along = at_writes.fixed_functionals()
    elsewhere = [one for one in plan.interventions if one.site.point != "writes"]
    if along.shape[1] == 0 or any(one.affine.is_linear or _opens_along(one, along) for one in elsewhere):
        return along[:, :0], []

    def expected(point: str, layer: int) -> list[float]:
        passed = [_always_added(one) for one in elsewhere if one.site.order <= Site(point, layer).order]
        total = sum(passed, at_writes.shift)
        return [float(value) for value in along.double().T @ total.double()]

    probes: list[dict[str, Any]] = []
    middle, moved = layout.architecture.middle, plan.moved or [(layer, layer) for layer in range(layout.layers)]
    deepest = plan.layers_after(layout.layers) - 1

    def probe(old: int, new: int, inside: str, side: str, point: str) -> None:
        names = [layout.layer(number) + inside for number in (old, new)]
        probes.append({"module": names[0], "baked": names[1], "side": side, "expected": expected(point, old)})

    for layer, (first, second) in enumerate(moved):
        probe(layer, first, "", "input", "resid_pre")
        if middle:
            probe(layer, second, f".{middle}", "input", "resid_mid")
    probe(layout.layers - 1, deepest, "", "output", "resid_post")
    return along, probes
