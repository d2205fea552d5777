"""Directions of one model used in another of the same shape, and whether they still tell the two sides apart there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .activations import project
from .architectures import Layout
from .direction import Direction
from .errors import RecipeError
from .probes import auroc
from .prompts import Encoded
from .sites import Site


@dataclass(frozen=True)
class Separation:
    """How well projections tell two sides apart."""

    auc: float  # chance that a positive lies above a negative; 0.5 is none, below it the sign is wrong
    distance: float  # of the means, in pooled standard deviations (d'); infinite where neither side varies


def separation(positive: Tensor, negative: Tensor) -> Separation:
    """Of the projections [n] and [m] of the two sides.

    Raises:
        RecipeError: a side is empty.
    """
    if not len(positive) or not len(negative):
        raise RecipeError("a separation needs prompts of both sides")
    one, other = positive.double(), negative.double()
    spread = float(((one.var(correction=0) + other.var(correction=0)) / 2).sqrt())
    moved = float(one.mean() - other.mean())
    distance = moved / spread if spread else (0.0 if moved == 0 else float("inf") * moved)
    both, is_positive = torch.cat([one, other]), torch.arange(len(one) + len(other)) < len(one)
    return Separation(auroc(both, is_positive, torch.ones_like(both)), distance)


def check_shape(source: Layout, target: Layout) -> None:
    """Raise RecipeError where the two models do not have the same width and number of layers."""
    if (source.width, source.layers) != (target.width, target.layers):
        raise RecipeError(
            f"the sibling has {source.layers} layers of width {source.width} and this model {target.layers} of width "
            f"{target.width}: directions go only between models of one shape; estimate them on this model"
        )


def check(
    model: Any,
    layout: Layout,
    encoded: Sequence[Encoded],
    is_positive: Sequence[bool],
    directions: Sequence[Direction],
    *,
    least: float = 0.75,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[Site, Separation]:
    """How well ``directions`` of another model separate the prompts in ``model``, by site.

    Raises:
        RecipeError: at some site by less than ``least`` (AUC); the message has the figures.
    """
    vectors = {one.site: one.vector for one in directions if one.site is not None}
    found = project(model, layout, encoded, vectors, progress=progress)
    of = torch.tensor(list(is_positive), dtype=torch.bool)
    separations = {site: separation(values[of], values[~of]) for site, values in found.items()}
    weak = {site: one.auc for site, one in separations.items() if one.auc < least}
    if weak:
        site = min(weak, key=weak.__getitem__)
        raise RecipeError(
            f"the directions of the other model do not separate the prompts in this one: AUC {weak[site]:.2f} at "
            f"{site} ({len(weak)} of {len(separations)} sites below {least}); read at other sites, lower 'separates', "
            "or estimate them on this model"
        )
    return separations
