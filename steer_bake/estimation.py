"""From a recipe's labelled prompts to its directions: what is read, how it is weighted, what is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import architectures, direction, distributed, registry
from .activations import collect, project
from .architectures import Layout
from .checkpoint import Checkpoint
from .combination import Learning, basis, learn
from .direction import Direction
from .errors import RecipeError
from .estimators import Statistics, check_options, estimate
from .models import ModelRef, Placement, load_model, load_tokenizer, resolve
from .prompts import Encoded, Prompt, check_length, encode, in_pairs, require_labels
from .recipe import Estimator, Recipe
from .refusal import OPENINGS, Event
from .selection import quantile_scales
from .sites import Site
from .transfer import check as check_transfer
from .transfer import check_shape

CATEGORY = "category/"  # what the labels of categories begin with
NEUTRAL = "neutral"  # the label that scores near 0 give, where the recipe names no other


@dataclass(frozen=True)
class Scored:
    """Prompts with the tokens of each, its label, and the refusal confidence c(x)."""

    prompts: tuple[Prompt, ...]
    encoded: tuple[Encoded, ...]
    labels: tuple[str, ...]
    scores: tuple[float, ...]

    def where(self, keep: Callable[[str], bool]) -> Scored:
        """Those whose label is to be kept."""
        chosen = [index for index, label in enumerate(self.labels) if keep(label)]
        return Scored(
            tuple(self.prompts[index] for index in chosen),
            tuple(self.encoded[index] for index in chosen),
            tuple(self.labels[index] for index in chosen),
            tuple(self.scores[index] for index in chosen),
        )


class Estimation:
    """The directions that a recipe asks for.

    Raises:
        SteerBakeError: of its methods, where prompts, labels, options or a sibling model do not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        home: Path,
        ref: ModelRef,
        base: Checkpoint,
        sites: Sequence[Site],
        *,
        dtype: str,
        placement: Placement,
        recipe_hash: Callable[[], str],
        progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
    ) -> None:
        if recipe.estimator is None:
            raise RecipeError("this recipe estimates no direction, it loads one: there is nothing to extract")
        self.wanted: Estimator = recipe.estimator
        self.recipe, self.home, self.sites = recipe, home, tuple(sites)
        self.target, self.target_base = ref, base
        self.dtype, self.placement, self.progress = dtype, placement, progress
        self._recipe_hash = recipe_hash
        self._module: Any = registry.module("estimators", self.wanted.name)

    # --- what is read

    @cached_property
    def source(self) -> tuple[ModelRef, Checkpoint]:
        """The model that directions are estimated on: the recipe's own, or the sibling that it names."""
        if self.wanted.model is None:
            return self.target, self.target_base
        with self.progress("fetching the sibling model") as advance:
            beside = self.home / self.wanted.model
            ref = resolve(str(beside) if beside.is_dir() else self.wanted.model, progress=advance)
        base = Checkpoint.open(ref.folder)
        check_shape(architectures.layout(base.config), architectures.layout(self.target_base.config))
        return ref, base

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The training prompts that carry a label of interest, or all of them where labels come from scores."""
        wanted = self.wanted
        found = self._load(wanted.prompts)
        if wanted.threshold is None:
            require_labels(found, [label for label in self._labels if label is not None])
            if self._is_paired:
                aside = [prompt for prompt in found if prompt.label in self._labels[2:]]
                aside = [prompt for prompt in aside if prompt.label not in self._labels[:2]]
                return [*in_pairs(found, wanted.positive, wanted.negative), *aside]
            found = [prompt for prompt in found if prompt.label in self._labels]
        elif self._is_paired:
            raise RecipeError(f"{wanted.name} takes pairs, and 'threshold' gives labels that break them; leave it out")
        return found

    def _load(self, names: Sequence[str]) -> list[Prompt]:
        found = [prompt for name in names for prompt in self.recipe.prompts[name].load(self.home)]
        return self._of_category(self._with_answers(found))

    def _with_answers(self, prompts: list[Prompt]) -> list[Prompt]:
        """SafeSteer's refusal filter: positive prompts count only with an answer that the judge gives the label."""
        wanted = self.wanted.answers
        if wanted is None:
            return prompts
        judge = registry.load("judges", wanted.judge)
        labels = judge([prompt.answer or "" for prompt in prompts])
        kept = [
            prompt for prompt, label in zip(prompts, labels, strict=True)
            if prompt.label != self.wanted.positive or label == wanted.label
        ]  # fmt: skip
        if not any(prompt.label == self.wanted.positive for prompt in kept):
            raise RecipeError(
                f"no {self.wanted.positive!r} prompt ends in an answer that {wanted.judge} calls {wanted.label!r}: "
                "such prompts are messages whose last one is the assistant's"
            )
        return kept

    def _of_category(self, prompts: list[Prompt]) -> list[Prompt]:
        wanted = self.wanted.category
        if wanted is None:
            return prompts
        kept = [prompt for prompt in prompts if prompt.label != self.wanted.positive or prompt.category == wanted]
        if not any(prompt.label == self.wanted.positive for prompt in kept):
            there = sorted({str(prompt.category) for prompt in prompts if prompt.label == self.wanted.positive})
            raise RecipeError(
                f"no {self.wanted.positive!r} prompt is of category {wanted!r}; there are: {', '.join(there)}"
            )
        return kept

    @property
    def _labels(self) -> tuple[str | None, ...]:
        wanted = self.wanted
        neutral = wanted.neutral or (NEUTRAL if wanted.threshold is not None else None)
        return wanted.positive, wanted.negative, neutral, wanted.orthogonal_to

    @property
    def _is_paired(self) -> bool:
        own = bool(getattr(self._module, "PAIRED", False))
        return own or (self.wanted.options.get("paired") is True)

    def check(self) -> None:
        """Read everything but the weights, so that what is wrong is said before long work."""
        check_options(self.wanted.name, self.wanted.options)
        if self.wanted.answers is not None:
            registry.module("judges", self.wanted.answers.judge)
        self.encode(self.prompts)
        if self.wanted.scale == "quantile":
            self.encode(self.validation)
        if self.wanted.combine is not None:
            self._categories(self.prompts)

    @cached_property
    def validation(self) -> list[Prompt]:
        if self.wanted.validation is None:
            return self.prompts
        found = self._load(self.wanted.validation)
        return [one for one in found if self.wanted.threshold is not None or one.label in self._labels[:3]]

    def encode(self, prompts: Sequence[Prompt], ref: ModelRef | None = None) -> list[Encoded]:
        ref = ref or self.source[0]
        encoded = encode(load_tokenizer(ref.folder), prompts, self.recipe.read.position)
        check_length(encoded, int(self.source[1].config.get("max_position_embeddings") or 10**9))
        return encoded

    # --- what is made of it

    def load(self, ref: ModelRef) -> Any:
        return load_model(ref.folder, dtype=self.dtype, device=self.placement)

    def directions(self) -> list[Direction]:
        """The recipe's directions, one per site.

        Raises:
            RecipeError: the prompts do not give a direction, or one of a sibling does not separate them here.
            ExtractionError: NaN or infinity among the activations.
        """
        model, layout = self.load(self.source[0]), architectures.layout(self.source[1].config)
        scored = self.scored(model, self.prompts)
        if self.wanted.combine is None:
            found = self.statistics(model, layout, scored)
            directions = [self.direction(site, found[site]) for site in self.sites]
        else:
            directions = self._combined(model, layout, scored)
        if self.wanted.scale == "quantile":
            directions = self._scaled(model, layout, directions, scored)
        if self.wanted.model is not None:
            del model
            self._check_separation(directions)
        return directions

    def scored(self, model: Any, prompts: Sequence[Prompt]) -> Scored:
        """``prompts`` with c(x) and the labels that follow; without scores c is 1, -1 or 0 by label."""
        wanted, encoded = self.wanted, self.encode(prompts)
        signs = {wanted.positive: 1.0, wanted.negative: -1.0}
        scores = [one.score if one.score is not None else signs.get(str(one.label), 0.0) for one in prompts]
        if wanted.scores == "opening":
            scores = self.confidence(model, prompts)
        labels = [str(one.label) for one in prompts]
        if wanted.threshold is not None:
            low, neutral = wanted.threshold, str(self._labels[2])
            labels = [
                wanted.positive if score > low else wanted.negative if score < -low else neutral for score in scores
            ]
            for label in (wanted.positive, wanted.negative):
                if label not in labels:
                    span = f"{min(scores):.2f} to {max(scores):.2f}"
                    raise RecipeError(
                        f"no prompt is {label!r}: the scores go from {span}, and the threshold is {low}; lower it, or "
                        "give other prompts"
                    )
        return Scored(tuple(prompts), tuple(encoded), tuple(labels), tuple(scores))

    def event(self, ref: ModelRef) -> Event:
        """What counts as the beginning of a refusal."""
        return Event.phrases(load_tokenizer(ref.folder), self.wanted.openings or OPENINGS)

    def confidence(self, model: Any, prompts: Sequence[Prompt]) -> list[float]:
        """c(x) of ``prompts`` by how the answer would open: twice the probability of a refusal, minus one."""
        ref = self.source[0]
        encoded = encode(load_tokenizer(ref.folder), prompts)
        own = distributed.share(len(encoded))
        found = torch.zeros(len(encoded), dtype=torch.float64)
        with self.progress("measuring how answers open") as advance:
            if own:
                found[own] = self.event(ref).confidence(model, [encoded[index] for index in own], advance)
        distributed.add_up([found])
        return [float(one) for one in found]

    def statistics(self, model: Any, layout: Layout, scored: Scored) -> dict[Site, dict[str, Statistics]]:
        """What the estimator needs, by site and label."""
        sides = getattr(self._module, "NEEDS_COVARIANCE", ())
        with self.progress("reading activations") as advance:
            return collect(
                model, layout, scored.encoded, scored.labels, self.sites,
                rows=bool(getattr(self._module, "NEEDS_ROWS", False)),
                covariance=[getattr(self.wanted, side) for side in sides],
                weights=self._weights(scored), progress=advance,
            )  # fmt: skip

    def _weights(self, scored: Scored) -> list[float] | None:
        """``|c(x)|`` for both sides, where the estimator weights its prompts."""
        if not getattr(self._module, "USES_SCORES", False):
            return None
        sides = (self.wanted.positive, self.wanted.negative)
        return [
            abs(score) if label in sides else 1.0 for label, score in zip(scored.labels, scored.scores, strict=True)
        ]

    def direction(self, site: Site, sides: Mapping[str, Statistics]) -> Direction:
        """The direction at ``site`` from the statistics there, with its natural scale."""
        wanted = self.wanted
        positive, negative = sides[wanted.positive], sides[wanted.negative]
        neutral = sides.get(str(self._labels[2]))
        vector, scale = estimate(wanted.name, positive, negative, neutral, wanted.options)
        if wanted.orthogonal_to:
            before = float(vector.norm())
            vector = direction.orthogonal_to(vector, [sides[wanted.orthogonal_to].mean])
            scale *= float(vector.norm()) / before
        count = positive.count + negative.count
        along = direction.unit(vector, f"the {wanted.name} direction at {site}")[0]
        return Direction(
            vector=along,
            site=site,
            scale=scale,
            stream_norm=(positive.norm * positive.count + negative.norm * negative.count) / count,
            model=self.source[0].hub_id or wanted.model or self.recipe.model,
            revision=self.source[0].revision,
            estimator=wanted.name,
            recipe_hash=self._recipe_hash(),
            neutral=None if neutral is None else float(neutral.mean @ along),
        )

    # --- quantile scales

    def _scaled(self, model: Any, layout: Layout, directions: list[Direction], training: Scored) -> list[Direction]:
        """With s_l+ and s_l- as the two scales, from the validation prompts."""
        scored = training if self.wanted.validation is None else self.scored(model, self.validation)
        vectors = {one.site: one.vector for one in directions if one.site is not None}
        with self.progress("measuring scales") as advance:
            found = project(model, layout, scored.encoded, vectors, progress=advance)
        scores = torch.tensor(scored.scores, dtype=torch.float64)
        scaled = []
        for one in directions:
            assert one.site is not None
            above, below = quantile_scales(found[one.site] - (one.neutral or 0.0), scores)
            scaled.append(replace(one, scale=above, scale_negative=below))
        return scaled

    # --- categories

    def _categories(self, prompts: Sequence[Prompt]) -> list[str]:
        found = sorted({str(one.category) for one in prompts if one.label == self.wanted.positive and one.category})
        if len(found) < 2:
            raise RecipeError(
                f"a combination needs at least two categories among the {self.wanted.positive!r} prompts, and there "
                f"are {len(found)}; give the rows a 'category'"
            )
        return found

    def by_category(
        self, model: Any, layout: Layout, scored: Scored, sites: Sequence[Site]
    ) -> dict[Site, dict[str, Statistics]]:
        """Statistics with every row, the positive prompts per category: their label is ``category/<name>``."""
        labels = tuple(
            f"{CATEGORY}{prompt.category}" if label == self.wanted.positive and prompt.category else label
            for prompt, label in zip(scored.prompts, scored.labels, strict=True)
        )
        with self.progress("reading activations") as advance:
            return collect(
                model, layout, scored.encoded, labels, sites, rows=True, weights=self._weights(scored), progress=advance
            )

    def _combined(self, model: Any, layout: Layout, scored: Scored) -> list[Direction]:
        """One learned vector per site, each on its own."""
        wanted, asked = self.wanted, self.wanted.combine
        assert asked is not None
        if distributed.is_launched():
            raise RecipeError("'combine' learns in one process; run it without torchrun")
        categories, found = self._categories(scored.prompts), self.by_category(model, layout, scored, self.sites)
        harmful = scored.where(lambda label: label == wanted.positive).encoded
        benign = scored.where(lambda label: label == wanted.negative).encoded
        directions = []
        for site in self.sites:
            sides = found[site]
            negative = sides[wanted.negative]
            columns = []
            for category in categories:
                vector, _ = estimate(wanted.name, sides[f"{CATEGORY}{category}"], negative, None, wanted.options)
                columns.append(direction.unit(vector, f"the direction of {category} at {site}")[0])
            assert negative.rows is not None
            start = basis(torch.stack(columns, dim=1), negative.rows, asked.ridge, asked.relative)
            length = negative.norm if asked.units == "dose" else 1.0
            learning = Learning(asked.epochs, asked.rate, asked.batch, asked.kl_weight, length=length, seed=asked.seed)
            with self.progress(f"learning the combination at {site}") as advance:
                learned = learn(
                    model, site, start, harmful, benign, self.event(self.source[0]), learning, progress=advance
                )
            vector, scale = direction.unit(learned.vector, f"the combination at {site}")
            directions.append(
                Direction(
                    vector, site, scale, negative.norm, self.source[0].hub_id or wanted.model or self.recipe.model,
                    self.source[0].revision, f"low_rank({wanted.name})", self._recipe_hash(),
                )
            )  # fmt: skip
        return directions

    # --- a sibling's directions

    def _check_separation(self, directions: Sequence[Direction]) -> None:
        wanted = self.wanted
        prompts = [one for one in self.prompts if one.label in (wanted.positive, wanted.negative)]
        encoded = self.encode(prompts, self.target)
        layout = architectures.layout(self.target_base.config)
        model = self.load(self.target)
        with self.progress("checking the directions in the model itself") as advance:
            check_transfer(
                model, layout, encoded, [one.label == wanted.positive for one in prompts], directions,
                least=wanted.separates, progress=advance,
            )  # fmt: skip


def by_label(values: Tensor, labels: Sequence[str], label: str) -> Tensor:
    """Those of ``values`` [prompts] whose prompt has ``label``."""
    return values[torch.tensor([one == label for one in labels], dtype=torch.bool)]
