"""From a recipe's labelled prompts to its gates: which prompts, read where, fitted to which interventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from . import architectures, gating
from .activations import tokens
from .architectures import Layout
from .behaviour import context_length
from .checkpoint import Checkpoint
from .errors import CheckpointError, RecipeError
from .gate import Gate
from .gating import Fitted
from .interventions import Intervention, intervene
from .models import ModelRef, Placement, load_model, load_tokenizer
from .prompts import Prompt, check_length, encode, require_labels
from .recipe import Gate as Wanted
from .recipe import Intervention as Described
from .recipe import Prompts, Recipe
from .sites import Site, parse_sites
from .stages import Progress, replacing

#: Without a validation set every so many prompts of each label are kept for it.
_KEPT_BACK = 5


@dataclass(eq=False)
class Fitting:
    """The gates that a recipe asks for.

    Raises:
        SteerBakeError: of its methods, where prompts, labels or sites do not fit.
    """

    recipe: Recipe
    home: Path  # where the recipe's relative paths start
    ref: ModelRef
    base: Checkpoint
    _: KW_ONLY
    dtype: str
    placement: Placement
    progress: Progress

    @cached_property
    def layout(self) -> Layout:
        return architectures.layout(self.base.config)

    @cached_property
    def wanted(self) -> list[tuple[Described, Wanted]]:
        """The interventions with a gate that has to be fitted."""
        return [(one, one.gate) for one in self.recipe.intervention if one.gate and not one.gate.load]

    def sites(self) -> list[Site]:
        """Where gates are to be fitted."""
        return [site for one, _ in self.wanted for site in self._sites(one)]

    def inputs(self) -> list[Any]:
        """All that the fit depends on apart from the model, as plain values."""
        read = [side for _, gate in self.wanted for side in (*self.split(gate), *self._unrelated(gate).values())]
        prompts = [[astuple(prompt) for prompt in side] for side in read]
        return [[gate.model_dump() for _, gate in self.wanted], prompts, [str(site) for site in self.sites()]]

    def check(self) -> None:
        """Read everything but the weights, so that what is wrong is said before long work."""
        tokenizer = load_tokenizer(self.ref.folder) if self.wanted else None
        for one, gate in self.wanted:
            self._sites(one)
            position = "instruction" if gate.position == "answer" else "last"
            encoded = encode(tokenizer, [prompt for side in self.split(gate) for prompt in side], position)
            check_length(encoded, context_length(self.base), max(gate.generated, self.recipe.validation.decode_tokens))
            self._unrelated(gate)

    def held_back(self, of_each: int = 6) -> list[Prompt]:
        """Some validation prompts of each label: on them every gate should be open somewhere, and closed somewhere."""
        prompts = [prompt for _, gate in self.wanted for prompt in self.split(gate)[1]]
        labels = dict.fromkeys(prompt.label for prompt in prompts)
        return [one for label in labels for one in [prompt for prompt in prompts if prompt.label == label][:of_each]]

    # --- the fit

    def gates(self) -> list[Fitted]:
        """The recipe's gates, one per site of every intervention that has one.

        Raises:
            RecipeError: the recipe has no gate to fit, or its prompts do not give one.
            ExtractionError: NaN or infinity among the activations.
        """
        if not self.wanted:
            raise RecipeError("this recipe fits no gate: there is none under 'intervention', or it is loaded")
        model = load_model(self.ref.folder, dtype=self.dtype, device=self.placement)
        return [fitted for one, gate in self.wanted for fitted in self._fitted(one, gate, model)]

    def _fitted(self, one: Described, gate: Wanted, model: PreTrainedModel) -> list[Fitted]:
        sites, tokenizer, sides = self._sites(one), load_tokenizer(self.ref.folder), []
        for side, what in zip(self.split(gate), ("training", "validation"), strict=True):
            positive = [prompt.label in gate.positive for prompt in side]
            with self.progress(f"answering {what} prompts of the gate {gate.called!r}") as advance:
                passed = gating.passed_through(
                    model, tokenizer, side, positive, position=gate.position, generated=gate.generated,
                    progress=advance,
                )  # fmt: skip
            with self.progress(f"reading {what} prompts of the gate {gate.called!r}") as advance:
                sides.append(gating.samples(model, self.layout, passed, sites, progress=advance))
        unrelated = {
            name: tokens(model, self.layout, encode(tokenizer, prompts, "mean"), sites)
            for name, prompts in self._unrelated(gate).items()
        }
        return [
            gating.fit(
                sides[0][site], sides[1][site], site, probe=gate.probe, name=gate.called,
                threshold=None if gate.threshold == "youden" else gate.threshold, width=gate.width,
                sharpness=gate.sharpness, unrelated={name: found[site] for name, found in unrelated.items()},
            )
            for site in sites
        ]  # fmt: skip

    def _sites(self, one: Described) -> list[Site]:
        sites = parse_sites(one.sites, self.layout.layers)
        wrong = next((site for site in sites if site.point not in ("mlp_out", "resid_post")), None)
        if wrong is not None:
            raise RecipeError(
                f"a gate opens what an MLP writes: 'mlp_out' or 'resid_post' with a layer, and not {str(wrong)!r}"
            )
        return [Site("mlp_in", site.layer) for site in sites]

    # --- prompts

    def split(self, gate: Wanted) -> tuple[list[Prompt], list[Prompt]]:
        """The labelled prompts of a gate: those that its probe is fitted on, and those that it is measured on."""
        labels = [*gate.positive, *gate.negative]
        prompts = self._loaded(gate.prompts)
        require_labels(prompts, labels)
        of = {label: [prompt for prompt in prompts if prompt.label == label] for label in labels}
        if gate.validation is not None:
            validation = self._loaded(gate.validation)
            require_labels(validation, labels)
            return [one for side in of.values() for one in side], [one for one in validation if one.label in labels]
        few = next((label for label, side in of.items() if len(side) < _KEPT_BACK), None)
        if few is not None:
            raise RecipeError(
                f"{len(of[few])} prompts are labelled {few!r}: a gate needs {_KEPT_BACK} at least, or a 'validation'"
            )
        last = _KEPT_BACK - 1
        train = [one for side in of.values() for index, one in enumerate(side) if index % _KEPT_BACK != last]
        return train, [one for side in of.values() for one in side[last::_KEPT_BACK]]

    def _loaded(self, sets: Sequence[str]) -> list[Prompt]:
        return [prompt for name in sets for prompt in self.recipe.prompts[name].load(self.home)]

    def _unrelated(self, gate: Wanted) -> dict[str, list[Prompt]]:
        """Texts on which a gate should stay closed."""
        sets = {name: self.recipe.prompts[name].load(self.home) for name in gate.unrelated}
        return {"plain": Prompts(path="plain").load(self.home)} | sets

    # --- what they are put to

    def gate(self, one: Described, added: Intervention, fitted: Sequence[Fitted] | None) -> Gate | None:
        """The gate of one of the recipe's interventions at one site; a stand-in where it is yet to be fitted.

        Raises:
            RecipeError: the gate that is loaded, or was fitted, is of other sites.
        """
        wanted, site = one.gate, Site("mlp_in", added.site.layer)
        if wanted is None:
            return None
        closed = None
        if wanted.otherwise is not None and added.direction is not None:
            closed = intervene(one.name, added.direction, added.site, wanted.otherwise, one.units).affine.shift
        if wanted.load is not None:
            return replace(gating.chosen(gating.load(self.home / wanted.load), site, wanted.name), otherwise=closed)
        if fitted is None:
            stand_in = torch.eye(self.layout.width)[0]
            return Gate(site, stand_in, 0.0, wanted.width, wanted.sharpness, closed, wanted.called)
        return replace(gating.chosen(fitted, site, wanted.called), otherwise=closed)


def save_gates(found: Sequence[Fitted], path: Path) -> None:
    """Write ``found`` to ``path``, complete or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with replacing(path) as beside:
            gating.save(found, beside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
