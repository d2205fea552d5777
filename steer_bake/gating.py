"""From labelled prompts to gates: what the MLP reads where generation passes through, a probe, a threshold.

Rows are the prompt's tokens behind the instruction (there the template asks for the answer) and the first tokens of the
model's own answer; a gate decides on every one of them anew. The refusal-control paper decides once, at the prompt's
last token (arXiv 2603.13359, eqs. 5 to 7); both rules are measured on the same validation prompts. Texts that no
template frames are read whole: a probe that has seen nothing but tokens of templates and answers is open on half of
theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import distributed, registry, reload_worker
from .activations import tokens
from .architectures import Layout
from .errors import RecipeError
from .gate import Gate
from .probes import Samples, auroc, youden
from .prompts import Encoded, Prompt, encode
from .sites import Site

_METADATA_KEY = "steer_bake.gates"
_RESAMPLES, _BINS = 400, 10
Advance = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A gate and what was measured of its probe."""

    gate: Gate
    measures: Mapping[str, Any]


@dataclass(frozen=True)
class Passed:
    """A prompt with the beginning of its answer: the tokens that generation passes through are the read span."""

    encoded: Encoded
    positive: bool
    last: int | None  # the prompt's last token; none of a text, which nothing answers


def passed_through(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    positive: Sequence[bool],
    *,
    position: str = "answer",
    generated: int = 8,
    batch_size: int = 32,
    progress: Advance | None = None,
) -> list[Passed]:
    """The prompts with ``generated`` tokens of the model's own greedy answer, and texts (``chat: false``) as they are.

    ``position``: ``answer``, from the end of the instruction on, or ``last``, from the prompt's last token on. Texts
    are read from their second token on: the first, on which attention rests, is no token like others.

    Raises:
        RecipeError: an unknown position, or an instruction that cannot be found in the rendered prompt.
    """
    if position not in ("answer", "last"):
        raise RecipeError(f"unknown position {position!r} of a gate: known are 'answer' and 'last'")
    read = encode(tokenizer, prompts, "instruction" if position == "answer" else "last")
    asked = [index for index in distributed.share(len(read)) if prompts[index].text is None]
    order = sorted(asked, key=lambda index: len(read[index].ids))
    answers = torch.zeros(len(read), generated, dtype=torch.long)  # numbers of tokens counted from 1; 0: none
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        for index, answer in zip(
            chosen, _answers(model, tokenizer, [read[index].ids for index in chosen], generated), strict=True
        ):
            answers[index, : len(answer)] = torch.tensor(answer, dtype=torch.long) + 1
        if progress is not None:
            progress(at + len(chosen), len(order))
    distributed.add_up([answers])
    found = []
    for prompt, one, fires, row in zip(prompts, read, positive, answers.tolist(), strict=True):
        if prompt.text is not None:
            found.append(Passed(replace(one, start=min(1, len(one.ids) - 1), stop=len(one.ids)), fires, None))
            continue
        answer, last = tuple(token - 1 for token in row if token), len(one.ids) - 1
        start = min(one.stop, last) if position == "answer" else last
        whole = Encoded(one.ids + answer, start, len(one.ids) + len(answer), one.beginning)
        found.append(Passed(whole, fires, last))
    return found


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]], count: int
) -> list[tuple[int, ...]]:
    if not count:
        return [() for _ in rows]
    pad_id = int(tokenizer.pad_token_id)
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops = {pad_id, *(ends if isinstance(ends, list) else [ends])}
    made = reload_worker.greedy(model, rows, pad_id, count).tolist()
    return [tuple(row[: next((at for at, one in enumerate(row) if one in stops), len(row))]) for row in made]


def samples(
    model: PreTrainedModel,
    layout: Layout,
    found: Sequence[Passed],
    sites: Sequence[Site],
    progress: Advance | None = None,
) -> dict[Site, Samples]:
    """What is read at ``sites`` on the tokens of ``found``."""
    values = tokens(model, layout, [one.encoded for one in found], sites, progress=progress)
    places = [
        (number, place) for number, one in enumerate(found) for place in range(one.encoded.start, one.encoded.stop)
    ]
    positive = torch.tensor([found[number].positive for number, _ in places])
    prompt = torch.tensor([number for number, _ in places])
    last = torch.tensor([place == found[number].last for number, place in places])
    return {site: Samples(values[site], positive, prompt, last) for site in sites}


def fit(
    train: Samples,
    validation: Samples,
    site: Site,
    *,
    probe: str = "logistic",
    name: str = "",
    threshold: float | None = None,
    width: float = 2.0,
    sharpness: float = 8.0,
    unrelated: Mapping[str, Tensor] | None = None,
) -> Fitted:
    """A gate at ``site`` whose probe is fitted on ``train``, and calibrated and measured on ``validation``.

    The probe's scale is that of calibrated log-odds (Platt 1999), so that ``width`` means the same for every probe. The
    threshold is where true less false positives are most (Youden's J), or the given log-odds.

    Args:
        unrelated: [n, d] by name: what is read on texts on which the gate should stay closed.

    Raises:
        RecipeError: an unknown probe, or prompts of one kind only.
    """
    for samples_, what in ((train, "training"), (validation, "validation")):
        if not samples_.positive.any() or samples_.positive.all():
            raise RecipeError(f"the {what} prompts of the gate at {site} are all of one kind; give both kinds")
    vector, bias = registry.load("probes", probe)(train)
    raw = validation.values @ vector + bias
    slope, shift = calibration(raw.double(), validation.positive, validation.weights)
    vector, bias = slope * vector, slope * bias + shift
    logits = (validation.values @ vector + bias).double()
    chosen = youden(logits, validation.positive, validation.weights) if threshold is None else threshold
    gate = Gate(site, vector, chosen - bias, width, sharpness, name=name)
    held = gate.held_threshold + bias
    measures = {
        "probe": probe,
        "threshold": chosen,
        "log_odds": [slope, shift],
        **measured(logits, held, validation),
        "false_fires": {
            what: float((rows @ vector + bias > held).float().mean()) for what, rows in (unrelated or {}).items()
        },
        "train_tokens": len(train.values),
        "validation_prompts": len(set(validation.prompt.tolist())),
    }
    return Fitted(gate, measures)


def measured(logits: Tensor, threshold: float, validation: Samples) -> dict[str, Any]:
    """AUROC with a 95 % interval (bootstrap over prompts), rates, calibration error, and the two rules side by side."""
    weights, positive = validation.weights, validation.positive
    low, high = _interval(logits, validation)
    sure, fires = logits.sigmoid(), (logits > threshold).double()
    prompts = torch.zeros(int(validation.prompt.max()) + 1, dtype=torch.float64)
    counts = torch.bincount(validation.prompt).double().clamp_min(1)
    shares = prompts.index_add(0, validation.prompt, fires) / counts
    of_prompt = torch.zeros(len(prompts), dtype=torch.bool)
    of_prompt[validation.prompt] = positive
    at_end = validation.last
    end = youden(logits[at_end], positive[at_end], weights[at_end])
    return {
        "auroc": auroc(logits, positive, weights),
        "auroc_interval": [low, high],
        "calibration_error": _calibration_error(sure, positive.double(), weights),
        # what is baked: every token decides for itself
        "per_token": _rates(fires > 0, positive, weights),
        "share_of_tokens": {
            "positive": float(shares[of_prompt].mean()),
            "negative": float(shares[~of_prompt].mean()),
        },
        # the paper's rule, which is not: one decision, at the prompt's last token
        "once_per_prompt": {"threshold": end, **_rates(logits[at_end] > end, positive[at_end], weights[at_end])},
    }


def _rates(fires: Tensor, positive: Tensor, weights: Tensor) -> dict[str, float]:
    true, false = (
        float((weights[side] * fires[side]).sum() / weights[side].sum()) for side in (positive, ~positive)
    )  # fmt: skip
    return {"true_positives": true, "false_positives": false, "youden": true - false}


def calibration(logits: Tensor, positive: Tensor, weights: Tensor) -> tuple[float, float]:
    """``(a, b)`` so that ``a logit + b`` are log-odds where both kinds are as frequent; all [n] float64.

    Platt's targets keep the scale finite where the two kinds do not overlap. Newton's method.
    """
    counts = [max(1, int(side.sum())) for side in (positive, ~positive)]
    targets = torch.where(positive, (counts[0] + 1.0) / (counts[0] + 2), 1.0 / (counts[1] + 2)).double()
    size = logits.std().clamp_min(1e-9)
    rows = torch.stack([logits / size, torch.ones_like(logits)], dim=1)
    found = torch.tensor([1.0, 0.0], dtype=torch.float64)
    ridge = 1e-6 * torch.eye(2, dtype=torch.float64)
    for _ in range(50):
        likely = (rows @ found).sigmoid()
        slope = rows.T @ (weights * (likely - targets)) + ridge @ found
        curve = (rows * (weights * likely * (1 - likely))[:, None]).T @ rows + ridge
        step = torch.linalg.solve(curve, slope)
        found = found - step * min(1.0, 4.0 / float(step.norm().clamp_min(1e-12)))
        if float(step.norm()) < 1e-9:
            break
    return max(float(found[0] / size), 1e-6), float(found[1])


def _calibration_error(sure: Tensor, positive: Tensor, weights: Tensor) -> float:
    """Expected calibration error over ten bins of equal width."""
    bins = (sure * _BINS).long().clamp(0, _BINS - 1)
    off = torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, weights * (sure - positive))
    return float(off.abs().sum() / weights.sum())


def _interval(logits: Tensor, validation: Samples) -> tuple[float, float]:
    """95 % interval of the AUROC: prompts of either kind drawn anew, with all their tokens."""
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.unique(validation.prompt[side]) for side in (validation.positive, ~validation.positive)]
    found = []
    for _ in range(_RESAMPLES):
        times = torch.zeros(int(validation.prompt.max()) + 1, dtype=torch.float64)
        for kind in kinds:
            drawn = kind[torch.randint(len(kind), (len(kind),), generator=generator)]
            times += torch.bincount(drawn, minlength=len(times))
        found.append(auroc(logits, validation.positive, validation.weights * times[validation.prompt]))
    low, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


# --- files


def save(found: Sequence[Fitted], path: Path) -> None:
    """Write gates and what was measured of them to a safetensors file."""
    tensors = {str(index): one.gate.probe.contiguous().clone() for index, one in enumerate(found)}
    content = [{"gate": one.gate.described(), "measures": dict(one.measures)} for one in found]
    path.write_bytes(to_bytes(tensors, metadata={"format": "pt", _METADATA_KEY: json.dumps(content, sort_keys=True)}))


def load(path: Path) -> list[Fitted]:
    """The gates of a file.

    Raises:
        RecipeError: it cannot be read or was not written by :func:`save`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads((file.metadata() or {})[_METADATA_KEY])
            return [_read(one, file.get_tensor(str(index))) for index, one in enumerate(content)]
    except (OSError, SafetensorError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(
            f"{path} is no gate file of ours ({error}); make one with: steer-bake probe RECIPE"
        ) from error


def _read(content: Mapping[str, Any], probe: Tensor) -> Fitted:
    told = content["gate"]
    gate = Gate(
        Site.named(told["site"]), probe, float(told["threshold"]), float(told["width"]), float(told["sharpness"]),
        name=str(told["name"]),
    )  # fmt: skip
    return Fitted(gate, content["measures"])


def chosen(found: Sequence[Fitted], site: Site, name: str = "") -> Gate:
    """The gate that was fitted at ``site``, and under ``name`` where one is given.

    Raises:
        RecipeError: there is none, or several.
    """
    here = [one.gate for one in found if one.gate.site == site and name in ("", one.gate.name)]
    if len(here) != 1:
        there = ", ".join(f"{one.gate.name} at {one.gate.site}" for one in found) or "none"
        raise RecipeError(
            f"{'no gate' if not here else f'{len(here)} gates'} {name!r} at {site}: there are {there}. Name one with "
            "'name', or fit it at this site"
        )
    return here[0]
