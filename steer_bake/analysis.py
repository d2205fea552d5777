"""What the papers show of their directions, as numbers: ``steer-bake analyze`` writes them, ``figures`` draws them.

Per layer how the projection follows the refusal confidence and how far it tells the sides apart; how a direction's
weight is spread over the dimensions; the cosines between the directions of categories; the activations in the plane of
their two largest components; and what steering does to refusals of harmful and of harmless prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import architectures, direction, registry
from .activations import project
from .direction import Direction
from .errors import RecipeError
from .estimation import CATEGORY, Estimation, Scored, by_label
from .estimators import Statistics, estimate
from .interventions import intervene
from .models import load_tokenizer
from .prompts import Prompt, encode
from .selection import layer_score, quantile_scales, ranked
from .sites import Site
from .steering import steer
from .transfer import separation

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

#: Coefficients that the scatter of refusals tries.
COEFFICIENTS = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
TOP = 10  # dimensions whose share of a direction is told


def analyse(
    estimation: Estimation,
    *,
    layers: int,
    coefficients: Sequence[float] = COEFFICIENTS,
    site: Site | None = None,
    harmful: Sequence[Prompt] = (),
    harmless: Sequence[Prompt] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Everything that the figures show, as plain values.

    Args:
        layers: how many decoder layers the model has.
        site: where activations, cosines and the scatter are looked at; by default the site with the best layer score.
        harmful, harmless: prompts of the scatter of refusals; without them it is left out.

    Raises:
        RecipeError: the prompts give no direction, or there are too few of them.
    """
    model = estimation.load(estimation.source[0])
    layout = architectures.layout(estimation.source[1].config)
    training = estimation.scored(model, estimation.prompts)
    held_out = training
    if estimation.wanted.validation is not None:
        held_out = estimation.scored(model, estimation.validation)
    sides = estimation.statistics(model, layout, training)
    found = {one: estimation.direction(one, sides[one]) for one in estimation.sites}
    with progress("projecting") as advance:
        vectors = {one: item.vector for one, item in found.items()}
        projections = project(model, layout, held_out.encoded, vectors, progress=advance)
    centred = {one: values - _origin(sides[one], found[one], estimation) for one, values in projections.items()}
    wanted = estimation.wanted
    scores = torch.tensor(held_out.scores, dtype=torch.float64)
    rows = {one: _layer(centred[one], scores, held_out.labels, wanted.positive, wanted.negative) for one in found}
    best = site or _best(centred, scores, layers)
    if best not in found:
        raise RecipeError(f"{best} is not among the sites that the recipe reads")
    result: dict[str, Any] = {
        "estimator": wanted.name,
        "positive": wanted.positive,
        "negative": wanted.negative,
        "prompts": {"estimated on": len(training.labels), "measured on": len(held_out.labels)},
        "confidence": _confidence(estimation, held_out),
        "held_out": wanted.validation is not None,
        "site": str(best),
        "layers": {str(one): row for one, row in rows.items()},
        "concentration": concentration(found[best].vector),
        **_categories(estimation, model, layout, training, best),
    }
    if harmful and harmless:
        event = estimation.event(estimation.source[0])
        tokens = [encode(load_tokenizer(estimation.source[0].folder), prompts) for prompts in (harmful, harmless)]
        points = []
        with progress("steering") as advance:
            for number, coefficient in enumerate(coefficients, 1):
                with steer(model, [intervene("add", found[best], best, coefficient)]):
                    means = [float((event.confidence(model, one).mean() + 1) / 2) for one in tokens]
                points.append({"coefficient": coefficient, "harmful": means[0], "harmless": means[1]})
                advance(number, len(coefficients))
        result["refusals"] = {"of": "probability that the answer opens as a refusal", "points": points}
    return result


def _confidence(estimation: Estimation, scored: Scored) -> str:
    """What c(x) is here."""
    if estimation.wanted.scores == "opening":
        return "refusal confidence"
    given = sum(prompt.score is not None for prompt in scored.prompts)
    return "refusal confidence" if given == len(scored.prompts) else "score" if given else "label"


def _origin(sides: Mapping[str, Statistics], one: Direction, estimation: Estimation) -> float:
    """What projections are counted from: the neutral mean, or without it half-way between the sides."""
    if one.neutral is not None:
        return one.neutral
    positive, negative = (sides[label].mean for label in (estimation.wanted.positive, estimation.wanted.negative))
    return float((positive + negative) @ one.vector) / 2


def _best(centred: Mapping[Site, Tensor], scores: Tensor, layers: int) -> Site:
    return ranked({one: layer_score(values, scores) for one, values in centred.items()}, layers)[0]


def _layer(values: Tensor, scores: Tensor, labels: Sequence[str], positive: str, negative: str) -> dict[str, float]:
    score = layer_score(values, scores)
    apart = separation(by_label(values, labels, positive), by_label(values, labels, negative))
    scales = quantile_scales(values, scores)
    return {
        "correlation": score.correlation,
        "error": score.error,
        "score": score.score,
        "auc": apart.auc,
        "distance": apart.distance,
        "scale_positive": scales[0],
        "scale_negative": scales[1],
    }


def concentration(vector: Tensor) -> dict[str, Any]:
    """How the magnitude of ``vector`` [d] is spread: its share in the largest dimensions, and which those are.

    ``curve`` is the share of ``sum |v_i|`` in the k largest dimensions at 100 values of k up to d.
    """
    sizes, order = vector.abs().double().sort(descending=True)
    shares = sizes.cumsum(0) / sizes.sum()
    width = len(vector)
    places = sorted({max(1, round(width * step / 100)) for step in range(1, 101)})
    return {
        "width": width,
        f"top_{TOP}": float(shares[min(TOP, width) - 1]),
        "top_dimensions": order[:TOP].tolist(),
        "curve": [[k, float(shares[k - 1])] for k in places],
    }


def _categories(
    estimation: Estimation, model: Any, layout: architectures.Layout, scored: Scored, site: Site
) -> dict[str, Any]:
    """Cosines between the categories' directions, and every training activation in the plane of the PCA."""
    wanted = estimation.wanted
    names = sorted({str(one.category) for one in scored.prompts if one.label == wanted.positive and one.category})
    found = estimation.by_category(model, layout, scored, [site])[site]
    result: dict[str, Any] = {"pca": plane({label: _rows(one) for label, one in found.items()})}
    if len(names) >= 2:
        columns = []
        paired = getattr(registry.module("estimators", wanted.name), "PAIRED", False)
        for name in names:
            name_of = "mean_difference" if paired else wanted.name  # categories and the negative prompts are no pairs
            options = {} if paired else wanted.options
            vector, _ = estimate(name_of, found[f"{CATEGORY}{name}"], found[wanted.negative], None, options)
            columns.append(direction.unit(vector, f"the direction of {name}")[0].double())
        stacked = torch.stack(columns)
        result["cosines"] = {"categories": names, "matrix": (stacked @ stacked.T).tolist()}
    return result


def _rows(one: Statistics) -> Tensor:
    assert one.rows is not None
    return one.rows


def plane(rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """All ``rows`` (label to [n, d]) in the plane of their first two principal components.

    ``silhouette`` is the mean over the points, in all dimensions, of ``(b - a) / max(a, b)``: ``a`` the mean distance
    to the others of the same label, ``b`` to those of the nearest other label (Rousseeuw 1987).
    """
    names = list(rows)
    points = torch.cat([rows[name] for name in names]).double()
    of = torch.cat([torch.full((len(rows[name]),), n) for n, name in enumerate(names)])
    middle = points.mean(0)
    _, sizes, axes = torch.linalg.svd(points - middle, full_matrices=False)
    for axis in axes[:2]:  # a component has no sign of its own; the largest entry is made positive
        if axis[axis.abs().argmax()] < 0:
            axis.neg_()
    flat = (points - middle) @ axes[:2].T
    variances = sizes.square()
    return {
        "variance": (variances[:2] / variances.sum()).tolist(),
        "silhouette": silhouette(points, of),
        "points": {name.removeprefix(CATEGORY): flat[of == n].tolist() for n, name in enumerate(names)},
    }


def silhouette(points: Tensor, of: Tensor) -> float | None:
    """Mean silhouette of ``points`` [n, d] with labels ``of`` [n]; None with fewer than two labels."""
    labels = torch.tensor(sorted(set(of.tolist())))
    if len(labels) < 2:
        return None
    distances = torch.cdist(points, points)
    means = torch.stack([distances[:, of == label].sum(1) for label in labels], dim=1)
    counts = torch.stack([(of == label).sum() for label in labels])
    own = (of[:, None] == labels).int().argmax(1)
    everyone = torch.arange(len(points))
    alone = counts[own] == 1
    inside = means[everyone, own] / (counts[own] - 1).clamp(min=1)
    outside = means / counts
    outside[everyone, own] = torch.inf
    nearest = outside.min(1).values
    values = (nearest - inside) / torch.maximum(nearest, inside).clamp(min=1e-30)
    return float(values.masked_fill(alone, 0.0).mean())
