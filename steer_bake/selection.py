"""Which layers, and how much: the selection of Refusal Steering (Garcia-Ferrero et al., arXiv 2512.16602, section 3.3).

Layers are ranked by how well the projection ``p_l(x) = <h_l(x), v_l>`` follows the refusal confidence ``c(x)`` of
validation prompts. Then every configuration (how many of the best layers, what coefficient, which intervention) is
tried, and of those that lower ``c`` by enough the one is taken that changes other answers the least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .direction import Direction
from .errors import RecipeError
from .interventions import Intervention, intervene
from .prompts import Encoded
from .refusal import logits_at
from .sites import Site
from .steering import steer

#: The values that the paper's table has chosen from; its whole grid is not published.
TOP = (2, 4, 8, 16)
COEFFICIENTS = (-0.15, -0.25, -0.5, -0.75, -1.0, -2.0)

#: The refusal confidence c(x) of prompts, each from -1 to 1, under the model as it is now, hooks included.
Confidence = Callable[[Any, Sequence[Encoded]], Sequence[float] | Tensor]


@dataclass(frozen=True)
class LayerScore:
    """How well a layer's projection follows the refusal confidence."""

    correlation: float  # Pearson r of p and c
    error: float  # root mean square of c where p has the other sign

    @property
    def score(self) -> float:
        return self.correlation - self.error


def layer_score(projections: Tensor, confidence: Tensor) -> LayerScore:
    """Of one layer's ``projections`` [prompts] with the ``confidence`` [prompts] of the same prompts.

    ``error`` is ``sqrt(mean (c 1[sign p != sign c])^2)``: the sum of squares is over the prompts that disagree, the
    mean over all (the authors of the weighted mean difference, whose code the paper follows). ``p`` is to be counted
    from the neutral mean for its sign to mean something.

    Raises:
        RecipeError: fewer than three prompts, or all with the same confidence.
    """
    p, c = projections.double(), confidence.double()
    if len(p) < 3 or bool((c == c[0]).all()):
        raise RecipeError("a layer's score needs at least three validation prompts whose refusal confidence differs")
    r = float(torch.corrcoef(torch.stack([p, c]))[0, 1]) if bool((p != p[0]).any()) else 0.0
    disagree = torch.sign(p) != torch.sign(c)
    return LayerScore(r, float((c * disagree).square().mean().sqrt()))


def quantile_scales(projections: Tensor, confidence: Tensor) -> tuple[float, float]:
    """``(s+, s-)``: how much projection one unit of confidence is worth, at the upper and at the lower end.

    ``s+ = |Q_0.95(p) / Q_0.95(c)|`` over prompts with ``c > 0``, ``s- = |Q_0.05(p) / Q_0.05(c)|`` over those with
    ``c < 0``; 1 for both where a side is empty or a quotient not finite, as the paper has it.
    """
    p, c = projections.double(), confidence.double()
    found = []
    for side, quantile in ((c > 0, 0.95), (c < 0, 0.05)):
        if not bool(side.any()):
            return 1.0, 1.0
        at = float(c[side].quantile(quantile))
        found.append(abs(float(p[side].quantile(quantile)) / at) if at else math.inf)
    return (found[0], found[1]) if all(map(math.isfinite, found)) else (1.0, 1.0)


def usable(layers: int) -> int:
    """How many of the first layers may be steered: the deepest 5 % are dropped, by the rule of the authors' code."""
    return max(1, round(layers * 0.95) - 1)


def ranked(scores: Mapping[Site, LayerScore], layers: int) -> list[Site]:
    """The sites of the usable layers, best first; equal ones by depth.

    Raises:
        RecipeError: none of the sites is in a usable layer.
    """
    limit = usable(layers)
    kept = [site for site in scores if site.layer is not None and site.layer < limit]
    if not kept:
        raise RecipeError(f"the deepest 5 % of the layers are not used, and no site is before layer {limit}")
    return sorted(kept, key=lambda site: (-scores[site].score, site.order))


@dataclass(frozen=True)
class Configuration:
    """The best ``top`` layers, each with its own direction."""

    top: int
    coefficient: float
    name: str = "add"  # the paper also tries repositioning, which is "clamp"

    def interventions(self, best: Sequence[Site], directions: Mapping[Site, Direction]) -> list[Intervention]:
        return [intervene(self.name, directions[site], site, self.coefficient) for site in best[: self.top]]


def grid(
    top: Iterable[int] = TOP, coefficients: Iterable[float] = COEFFICIENTS, names: Iterable[str] = ("add",)
) -> list[Configuration]:
    names, coefficients = tuple(names), tuple(coefficients)
    return [Configuration(k, alpha, name) for k in top for alpha in coefficients for name in names]


@dataclass(frozen=True)
class Trial:
    """What one configuration does on held-out prompts."""

    configuration: Configuration
    sites: tuple[str, ...]
    drop: float  # mean c without steering minus with it, on prompts that tend to be refused
    change: float  # mean |s_g - s| over the other conversations, s the mean log-probability of the answer's tokens


@dataclass(frozen=True)
class Selection:
    """Every trial, and the one to use."""

    trials: tuple[Trial, ...]
    chosen: Trial
    confidence: float  # mean c of the refused prompts without steering
    target: float

    def as_json(self) -> dict[str, Any]:
        return {
            "confidence": self.confidence,
            "target": self.target,
            "chosen": asdict(self.chosen),
            "trials": [asdict(trial) for trial in self.trials],
        }


def select(
    model: Any,
    directions: Mapping[Site, Direction],
    best: Sequence[Site],
    configurations: Sequence[Configuration],
    refused: Sequence[Encoded],
    conversations: Sequence[tuple[Encoded, tuple[int, ...]]],
    confidence: Confidence,
    *,
    target: float,
    progress: Callable[[int, int], None] | None = None,
) -> Selection:
    """``argmin_g L_g`` over ``configurations`` subject to ``Delta c_g >= target``.

    Args:
        best: sites, best first (:func:`ranked`).
        refused: held-out prompts that the model tends to refuse.
        conversations: prompts that it answers, each with the tokens of an answer (the paper has 128).
        confidence: measures c(x); judged with the steering on.
        target: the least drop of the mean confidence; the paper does not publish its own.

    Raises:
        RecipeError: no configuration reaches the target; the message has the best of them.
    """
    if not configurations or not refused or not conversations:
        raise RecipeError("a selection needs configurations, refused prompts and conversations")
    before = _mean(confidence(model, refused))
    plain = answer_log_probability(model, conversations)
    trials = []
    for number, one in enumerate(configurations, 1):
        with steer(model, one.interventions(best, directions)):
            drop = before - _mean(confidence(model, refused))
            change = float((answer_log_probability(model, conversations) - plain).abs().mean())
        trials.append(Trial(one, tuple(str(site) for site in best[: one.top]), drop, change))
        if progress is not None:
            progress(number, len(configurations))
    enough = [trial for trial in trials if trial.drop >= target]
    if not enough:
        most = max(trials, key=lambda trial: trial.drop)
        raise RecipeError(
            f"no configuration lowers the refusal confidence ({before:.2f}) by {target}: the most is {most.drop:.2f}, "
            f"of {most.configuration.top} layers with coefficient {most.configuration.coefficient}; lower the target "
            "or try larger coefficients"
        )
    return Selection(tuple(trials), min(enough, key=lambda trial: trial.change), before, target)


_TOGETHER = 8  # conversations in one forward: a row of logits is as wide as the vocabulary


@torch.inference_mode()
def answer_log_probability(model: Any, conversations: Sequence[tuple[Encoded, tuple[int, ...]]]) -> Tensor:
    """``s(x)`` [conversations] float64: the mean log-probability of the answer's tokens, teacher forced."""
    found: list[float] = []
    for at in range(0, len(conversations), _TOGETHER):
        some = conversations[at : at + _TOGETHER]
        rows = [prompt.ids + answer for prompt, answer in some]
        places = [
            (row, len(prompt.ids) - 1 + offset)
            for row, (prompt, answer) in enumerate(some)
            for offset in range(len(answer))
        ]
        tokens = [token for _, answer in some for token in answer]
        each = logits_at(model, rows, places).log_softmax(-1)[range(len(tokens)), tokens].double().cpu()
        start = 0
        for _, answer in some:
            found.append(float(each[start : start + len(answer)].mean()))
            start += len(answer)
    return torch.tensor(found, dtype=torch.float64)


def _mean(values: Sequence[float] | Tensor) -> float:
    return float(torch.as_tensor(values, dtype=torch.float64).mean())
