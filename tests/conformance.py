"""The conformance matrix: every model type x a few interventions, each exact on disk or refused with a sentence.

A cell plans and bakes a tiny model (tests/zoo.py); plain transformers reloads the folder strictly in a process that
never imports steer_bake (tests/plain_worker.py); the hooked base is the reference. What is neither exact nor refused is
a failure, whatever it is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from steer_bake import architectures, reload_worker
from steer_bake.architectures import Layout, submodule
from steer_bake.checkpoint import Checkpoint
from steer_bake.comparison import CONSTANTS_TOLERANCE, STREAM_TOLERANCE, stream_probes
from steer_bake.direction import Direction, unit
from steer_bake.errors import NotFoldable, UnknownArchitecture
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef
from steer_bake.plan import Plan, make_plan
from steer_bake.representations.squares import missing
from steer_bake.sites import Site
from steer_bake.skeleton import is_tied
from steer_bake.steering import steer
from steer_bake.targets.checkpoint import checkpoint

from . import zoo
from .plain_worker import PlainWorker

#: Operation and site; "middle" is the layer before the middle of the stack.
CELLS = (
    *("add resid_post.middle", "add resid_post.all", "add resid_mid.middle", "add resid_pre.0"),
    *("ablate resid_pre.0", "ablate writes", "clamp writes"),
)
LEAST_EFFECT = 0.3  # of the hooks, max logit gap / std
NOISE_MARGIN = 2.0  # hooks and file both round
TIE = 1e-3  # of std(logits): tokens so close may change places by rounding
ROWS = [zoo.ids(10, seed=1)[0].tolist(), zoo.ids(10, seed=2)[0].tolist()]
PADDED = [zoo.ids(length, seed=length)[0].tolist() for length in (9, 6, 4)]
DECODE_TOKENS = 6


@dataclass(frozen=True)
class Outcome:
    """What became of one cell: exact, refused or failed."""

    how: tuple[str, ...] = ()  # the representations
    gap: float = 0.0  # hooks to file, max logit gap / std, float32
    stream: float | None = None  # of ablation and clamp at writes: |u.h - expected| / |h| at worst
    share: float | None = None  # of squares: how much of the vector is missing at worst, eps / (ms + eps)
    why: str = ""  # where the gap is more than rounding in four layers: what accounts for all of it
    refused: str = ""
    failed: str = ""

    def as_json(self) -> dict[str, Any]:
        if self.failed or self.refused:
            return {"failed": self.failed} if self.failed else {"refused": self.refused}
        more = {name: value for name, value in (("stream", self.stream), ("share", self.share)) if value is not None}
        found = {"exact": list(self.how), "gap": f"{self.gap:.0e}", **{name: f"{more[name]:.0e}" for name in more}}
        return {**found, "because": self.why} if self.why else found


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder, in memory where the machine has such a place."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def variants(model_type: str, folder: Path) -> dict[str, Path]:
    """Bases of a type, with the head tied and not where the class honours it: ``{"tied": folder, ...}``."""
    found: dict[str, Path] = {}
    for wanted in (None, True, False):
        out = folder / f"base-{wanted}"
        name = {None: None, True: "tied", False: "untied"}[wanted]
        if name in found:
            continue
        try:
            zoo.save(model_type, out, **({} if wanted is None else {"tie_word_embeddings": wanted}))
            actual = "tied" if is_tied(architectures.parse(Checkpoint.open(out).config)) else "untied"
            clean = not reload_worker.load_strict(str(out), "float32")[1]
        except Exception:
            if wanted is None:
                raise
            continue
        if wanted is None or (name == actual and clean):
            found[actual] = out
    return found


@dataclass
class Bench:
    """One base model, its hooks' reference and a worker."""

    folder: Path
    worker: PlainWorker
    layout: Layout = field(init=False)
    base: Checkpoint = field(init=False)
    model: PreTrainedModel = field(init=False)

    def __post_init__(self) -> None:
        self.base = Checkpoint.open(self.folder)
        self.layout = architectures.layout(self.base.config)
        self.model, problems = reload_worker.load_strict(str(self.folder), "float32")
        if problems:
            raise RuntimeError(f"the base does not load cleanly: {problems}")
        self.job = {
            "batches": [ROWS, PADDED], "decode": [ROWS[0], PADDED[1]], "decode_tokens": DECODE_TOKENS,
            "pad_id": zoo.PAD, "probes": [],
        }  # fmt: skip
        self.plain = self._logits()
        self.norms = self._norms()

    def _logits(self) -> list[Tensor]:
        return [reload_worker.logits(self.model, rows, zoo.PAD) for rows in self.job["batches"]]

    def _norms(self) -> list[float]:
        """Mean length of the stream where it enters each layer, and where it leaves the last."""
        found: dict[int, float] = {}
        with ExitStack() as stack:
            for layer in range(self.layout.layers):

                def before(_module: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
                    h = args[0] if args else kwargs["hidden_states"]
                    found[layer] = float(h.norm(dim=-1).mean())

                module = submodule(self.model, self.layout.layer(layer))
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._logits()
        return [found[layer] for layer in sorted(found)]

    def interventions(self, cell: str) -> list[Intervention]:
        name, _, where = cell.partition(" ")
        point, _, layer = where.partition(".")
        middle = (self.layout.layers - 1) // 2
        vector = torch.randn(self.layout.width, generator=torch.Generator().manual_seed(3))
        direction = Direction(unit(vector)[0], None)
        layers = {"": [None], "middle": [middle], "all": list(range(self.layout.layers)), "0": [0]}[layer]
        at = self.norms[0] if layer in ("", "0") else self.norms[min(middle + 1, len(self.norms) - 1)]
        amount = 1.0 if name == "ablate" else 0.5 * at * (0.5 if layer == "all" else 1.0)
        return [intervene(name, direction, Site(point, one), amount, "unit") for one in layers]

    def outcome(self, cell: str, folder: Path) -> Outcome:
        try:
            return self._outcome(self.interventions(cell), folder)
        except (NotFoldable, UnknownArchitecture) as refusal:
            return Outcome(refused=str(refusal))
        except Exception as error:
            return Outcome(failed=f"{type(error).__name__}: {error}")

    def _outcome(self, interventions: list[Intervention], folder: Path) -> Outcome:
        plan = make_plan(self.base, interventions)
        out = checkpoint(plan, self.base, ModelRef("base", self.folder), folder / "out", overwrite=True)
        along, probes = stream_probes(plan, self.layout)
        save_file({"along": along.contiguous()}, folder / "along.safetensors")
        job = {**self.job, "probes": probes, "along": str(folder / "along.safetensors")}
        problems = self.worker.measure(out, folder / "file", job)
        if problems:
            return Outcome(failed="; ".join(problems))
        with steer(self.model, interventions):
            hooked = self._logits()
            decoded = reload_worker.greedy(self.model, job["decode"], zoo.PAD, DECODE_TOKENS)
            readings = reload_worker.readings(self.model, ROWS, zoo.PAD, probes, along) if probes else None
        std = torch.cat(hooked).std()
        reloaded = [
            load_file(folder / "file" / f"float32.{index}.safetensors")["logits"] for index in range(len(hooked))
        ]
        rest = load_file(folder / "file" / "float32.safetensors")
        gap = _farthest(hooked, reloaded) / float(std)
        effect = _farthest(hooked, self.plain) / float(std)
        stream = None if readings is None else float(torch.maximum(readings, rest["readings"]).max())
        wrong, why = [], ""
        squared, share = self._squared(plan, interventions)
        if not gap <= CONSTANTS_TOLERANCE:
            if squared is not None and _farthest(squared, reloaded) / float(std) <= CONSTANTS_TOLERANCE:
                why = "epsilon"
            elif not plan.is_constant and gap <= NOISE_MARGIN * self._noise(interventions, hooked) / float(std):
                why = "rounding"
            else:
                wrong.append(f"the file is {gap:.1e} std from the hooks")
        if not effect >= LEAST_EFFECT:
            wrong.append(f"the hooks move the logits by {effect:.1e} std only")
        if stream is not None and not stream <= STREAM_TOLERANCE:
            wrong.append(f"the stream is off by {stream:.1e}")
        if any(one.site.point == "writes" for one in interventions) and stream is None:
            wrong.append("the stream was not read")
        if not self._same(decoded, rest["greedy"], interventions):
            wrong.append(f"decoding differs: {decoded.tolist()} {rest['greedy'].tolist()}")
        how = tuple(sorted({decision.representation for decision in plan.decisions}))
        return Outcome(how, gap, stream, share, why, failed="; ".join(wrong))

    def _squared(self, plan: Plan, interventions: list[Intervention]) -> tuple[list[Tensor] | None, float | None]:
        """The reference with the part of the vector that squares hold, and the greatest share that is missing of it."""
        squares = {name for one in plan.decisions if one.representation == "squares" for name in one.interventions}
        if not squares:
            return None, None
        shares = []

        def hook(shift: Tensor) -> Callable[..., Any]:
            def after(module: Any, _args: Any, output: Any) -> Any:
                h = output[0] if isinstance(output, (tuple, list)) else output
                lacking = missing(module.get_submodule(self.layout.architecture.middle), h)
                shares.append(float(lacking.max()))
                h = h + shift * (1 - lacking)
                return type(output)((h, *output[1:])) if isinstance(output, (tuple, list)) else h

            return after

        with ExitStack() as stack:
            others: list[Intervention] = []
            for one in interventions:
                if f"{one.name} at {one.site}" not in squares:
                    others.append(one)
                    continue
                assert one.site.point == "resid_post"
                module = submodule(self.model, self.layout.layer(int(one.site.layer or 0)))
                stack.callback(module.register_forward_hook(hook(one.affine.shift)).remove)
            stack.enter_context(steer(self.model, others))
            first = reload_worker.logits(self.model, ROWS, zoo.PAD)  # without padding, where the stream may be zero
            share = max(shares)
            return [first, reload_worker.logits(self.model, PADDED, zoo.PAD)], share

    def _same(self, ours: Tensor, theirs: Tensor, interventions: list[Intervention]) -> bool:
        """Whether both decoded the same tokens, up to the first tie of a row or what follows a padding token.

        The padding token's embedding is zero here, and of a stream of zeros no norm makes anything.
        """
        if ours.shape != theirs.shape:
            return False
        for prompt, one, other in zip(self.job["decode"], ours.tolist(), theirs.tolist(), strict=True):
            at = next((at for at in range(len(one)) if one[at] != other[at]), None)
            if at is not None and zoo.PAD not in one[:at]:
                with steer(self.model, interventions):
                    last = reload_worker.logits(self.model, [[*prompt, *one[:at]]], zoo.PAD)[-1]
                if (last[one[at]] - last[other[at]]).abs() > TIE * last.std():
                    return False
        return True

    def _noise(self, interventions: list[Intervention], hooked: list[Tensor]) -> float:
        """How far the hooked logits move when every weight is rounded once more in its last place, at most."""
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        generator, greatest = torch.Generator().manual_seed(0), 0.0
        for _ in range(4):
            for name, tensor in self.model.state_dict().items():
                if tensor.is_floating_point():
                    tensor.copy_(kept[name] * (1 + 2**-24 * (2 * torch.rand(tensor.shape, generator=generator) - 1)))
            with steer(self.model, interventions):
                greatest = max(greatest, _farthest(hooked, self._logits()))
        self.model.load_state_dict(kept)
        return greatest


def _farthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def run(model_type: str, worker: PlainWorker) -> dict[str, dict[str, Outcome]]:
    """Every cell of a type: ``{"tied": {cell: outcome}, "untied": ...}``."""
    with scratch() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {}
        for name, base in variants(model_type, folder).items():
            try:
                bench = Bench(base, worker)
            except UnknownArchitecture as refusal:
                found[name] = dict.fromkeys(CELLS, Outcome(refused=str(refusal)))
                continue
            except Exception as error:
                found[name] = dict.fromkeys(CELLS, Outcome(failed=f"{type(error).__name__}: {error}"))
                continue
            found[name] = {cell: bench.outcome(cell, folder) for cell in CELLS}
        return found
