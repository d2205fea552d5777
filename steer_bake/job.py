"""One recipe being run: what each stage reads, does and writes. The order of the stages is in ``pipeline.py``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from . import architectures, baked, behaviour, card, direction, gating, manifest, registry
from . import recipe as recipes
from .activations import collect, tokens
from .architectures import Layout
from .behaviour import Question
from .checkpoint import Checkpoint
from .direction import Direction
from .errors import CheckpointError, RecipeError, ValidationFailed
from .estimators import Statistics
from .gate import Gate
from .gating import Fitted
from .interventions import Intervention, intervene
from .models import ModelRef, load_model, load_tokenizer, resolve
from .plan import Plan, make_plan
from .prompts import Encoded, Prompt, check_length, encode, in_pairs, require_labels
from .recipe import Recipe
from .sites import Site, parse_site, parse_sites
from .stages import Progress, key, replacing, silent, write_text


class Job:
    """A recipe with its model resolved, and the folder that its artefacts go to.

    Raises:
        SteerBakeError: the recipe cannot be read or names something that does not exist, or the model cannot be had.
    """

    def __init__(
        self,
        recipe_file: Path,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        safety: bool = True,
        progress: Progress = silent,
    ) -> None:
        self.recipe, self.text = recipes.read(recipe_file)
        _check_names(self.recipe)
        self.home = recipe_file.parent  # the recipe's relative paths start here
        self.folder, self.device, self.progress = folder, device, progress
        self.dtype = baked.compute_dtype(dtype, device)
        self.safety = safety and self.recipe.safety
        with progress("fetching the model") as advance:
            beside = self.home / self.recipe.model
            named = str(beside) if beside.is_dir() else self.recipe.model
            self.ref: ModelRef = resolve(named, progress=advance)
        self.base = Checkpoint.open(self.ref.folder)
        self.layout: Layout = architectures.layout(self.base.config)
        self.layers = self.layout.layers

    def check(self) -> Plan:
        """Read everything that the stages will read, but the weights, so that what is wrong is said before long work.

        Returns:
            The plan with stand-ins where a direction is still to be estimated: right but for amounts and hashes.

        Raises:
            SteerBakeError: what would stop a stage: a prompt set, a label, a prompt too long, a site, a direction file.
        """
        if self.recipe.estimator:
            self._encoded_training()
        for one in self._to_fit:
            self._check_prompts(one)
        found = self.plan_sketch()
        _ = self._proof_rows
        behaviour.check_context(self._questions, self.base)
        return found

    # --- where things are

    @property
    def directions_file(self) -> Path:
        return self.folder / "direction.safetensors"

    @property
    def gates_file(self) -> Path:
        return self.folder / "gates.safetensors"

    @property
    def openings_file(self) -> Path:
        return self.folder / "openings.json"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def plan_file(self) -> Path:
        return self.folder / "plan.json"

    @property
    def baked_files(self) -> list[Path]:
        """Without any of these the bake has to be done again."""
        return [self.model / "config.json", *manifest.files(self.model), self.plan_file]

    @property
    def report_file(self) -> Path:
        return self.folder / "report.json"

    @property
    def evaluation_file(self) -> Path:
        return self.folder / "evaluation.json"

    def answers_file(self, which: str) -> Path:
        return self.folder / f"answers.{which}.json"

    # --- what stages are made from

    @cached_property
    def _base_key(self) -> str:
        headers = [self.base.header_hash(name) for name in self.base.files]
        stamps = _stamps(sorted(path for path in self.base.folder.iterdir() if path.is_file()))
        return key(self.ref.name, self.ref.revision, self.base.config, stamps, headers)

    @cached_property
    def extract_key(self) -> str:
        sites = [str(site) for site in self.read_sites()]
        prompts = [astuple(one) for one in self._training_prompts]
        return key(self._base_key, self.recipe.estimator, self.recipe.read, sites, self.dtype, prompts)

    @cached_property
    def probe_key(self) -> str:
        wanted = [one.gate.model_dump() for one in self._to_fit if one.gate]
        read = [side for one in self._to_fit for side in (*self._split(one), *self._unrelated(one).values())]
        prompts = [[astuple(prompt) for prompt in side] for side in read]
        sites = [str(site) for site in self.gate_sites()]
        return key(self._base_key, wanted, prompts, sites, self.dtype)

    def openings_key(self, plan: Plan) -> str:
        return key(self.evaluate_key(plan), "openings")

    def bake_key(self, plan: Plan) -> str:
        return key(self._base_key, self.recipe.target, plan.sha256)

    def validate_key(self, plan: Plan) -> str:
        # The files themselves are part of it: whoever touched them since needs a new certificate.
        stamps = _stamps([*sorted(self.model.glob("*.safetensors")), self.model / "config.json"])
        return key(self.bake_key(plan), stamps, self._proof_rows, self.recipe.validation.decode_tokens, self.device)

    def evaluate_key(self, plan: Plan | None = None) -> str:
        model = self.bake_key(plan) if plan else self._base_key
        return key(model, [astuple(one) for one in self._questions], self.dtype, self.device)

    def card_key(self, plan: Plan) -> str:
        return key(self.validate_key(plan), self.evaluate_key(), self.evaluate_key(plan), self.safety, self.text)

    # --- directions

    def extract(self) -> None:
        """Estimate the directions into ``direction.safetensors``."""
        save_directions(self.estimate(), self.directions_file)

    def estimate(self) -> list[Direction]:
        """The recipe's directions, one per read site.

        Raises:
            RecipeError: the recipe has no estimator, or its prompts do not give a direction.
            ExtractionError: NaN or infinity among the activations.
        """
        estimator = self.recipe.estimator
        if estimator is None:
            raise RecipeError("this recipe estimates no direction, it loads one: there is nothing to extract")
        prompts, encoded, sites = self._training_prompts, self._encoded_training(), self.read_sites()
        labels = [str(prompt.label) for prompt in prompts]
        model = load_model(self.ref.folder, dtype=self.dtype, device=self.device)
        with self.progress("reading activations") as advance:
            found = collect(
                model, self.layout, encoded, labels, sites, rows=self._needs_rows, progress=advance
            )  # fmt: skip
        return [self._direction(site, found[site]) for site in sites]

    def _direction(self, site: Site, sides: dict[str, Statistics]) -> Direction:
        estimator = self.recipe.estimator
        assert estimator is not None
        positive, negative = sides[estimator.positive], sides[estimator.negative]
        vector, scale = registry.load("estimators", estimator.name)(positive, negative)
        if estimator.orthogonal_to:
            before = float(vector.norm())
            vector = direction.orthogonal_to(vector, [sides[estimator.orthogonal_to].mean])
            scale *= float(vector.norm()) / before
        count = positive.count + negative.count
        return Direction(
            vector=direction.unit(vector, f"the {estimator.name} direction at {site}")[0],
            site=site,
            scale=scale,
            stream_norm=(positive.norm * positive.count + negative.norm * negative.count) / count,
            model=self.ref.hub_id or self.recipe.model,
            revision=self.ref.revision,
            estimator=estimator.name,
            recipe_hash=self.extract_key,
        )

    def read_sites(self) -> list[Site]:
        """Where directions are read: what the recipe says under ``read``, else the sites of its interventions."""
        if self.recipe.read.sites is not None:
            sites = parse_sites(self.recipe.read.sites, self.layers)
        else:
            sites = [site for one in self.recipe.intervention for site in parse_sites(one.sites, self.layers)]
        if any(site.layer is None for site in sites):
            raise RecipeError(
                "'writes' and 'writers' are no place to read: name a site such as 'resid_post.14' under 'read'"
            )
        return sorted(set(sites), key=lambda site: site.order)

    @cached_property
    def _training_prompts(self) -> list[Prompt]:
        estimator = self.recipe.estimator
        if estimator is None:
            return []
        labels = [estimator.positive, estimator.negative]
        others = [estimator.orthogonal_to] if estimator.orthogonal_to else []
        prompts = self.recipe.prompts[estimator.prompts].load(self.home)
        require_labels(prompts, [*labels, *others])
        if self._needs_rows:
            aside = [prompt for prompt in prompts if prompt.label in others and prompt.label not in labels]
            return [*in_pairs(prompts, *labels), *aside]
        return [prompt for prompt in prompts if prompt.label in (*labels, *others)]

    @property
    def _needs_rows(self) -> bool:
        name = self.recipe.estimator.name if self.recipe.estimator else ""
        return bool(getattr(registry.module("estimators", name), "NEEDS_ROWS", False))

    def _encoded_training(self) -> list[Encoded]:
        encoded = encode(load_tokenizer(self.ref.folder), self._training_prompts, self.recipe.read.position)
        check_length(encoded, behaviour.context_length(self.base))
        return encoded

    # --- gates

    @property
    def _to_fit(self) -> list[recipes.Intervention]:
        """The interventions whose gate has to be fitted."""
        return [one for one in self.recipe.intervention if one.gate and not one.gate.load]

    @property
    def needs_probes(self) -> bool:
        return bool(self._to_fit)

    def probe(self) -> None:
        """Fit the recipe's gates into ``gates.safetensors``."""
        save_gates(self.fit_gates(), self.gates_file)

    def fit_gates(self) -> list[Fitted]:
        """The recipe's gates, one per site of every intervention that has one.

        Raises:
            RecipeError: the recipe has no gate to fit, or its prompts do not give one.
        """
        if not self._to_fit:
            raise RecipeError("this recipe fits no gate: there is none under 'intervention', or it is loaded")
        model = load_model(self.ref.folder, dtype=self.dtype, device=self.device)
        return [fitted for one in self._to_fit for fitted in self._fitted(one, model)]

    def _fitted(self, one: recipes.Intervention, model: PreTrainedModel) -> list[Fitted]:
        gate, sites = one.gate, self._gate_sites(one)
        assert gate is not None
        tokenizer, sides = load_tokenizer(self.ref.folder), []
        for side, what in zip(self._split(one), ("training", "validation"), strict=True):
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
            for name, prompts in self._unrelated(one).items()
        }
        return [
            gating.fit(
                sides[0][site], sides[1][site], site, probe=gate.probe, name=gate.called,
                threshold=None if gate.threshold == "youden" else gate.threshold, width=gate.width,
                sharpness=gate.sharpness, unrelated={name: found[site] for name, found in unrelated.items()},
            )
            for site in sites
        ]  # fmt: skip

    def gate_sites(self) -> list[Site]:
        """Where gates are to be fitted."""
        return [site for one in self._to_fit for site in self._gate_sites(one)]

    def _gate_sites(self, one: recipes.Intervention) -> list[Site]:
        sites = parse_sites(one.sites, self.layers)
        wrong = next((site for site in sites if site.point not in ("mlp_out", "resid_post")), None)
        if wrong is not None:
            raise RecipeError(
                f"a gate opens what an MLP writes: 'mlp_out' or 'resid_post' with a layer, and not {str(wrong)!r}"
            )
        return [Site("mlp_in", site.layer) for site in sites]

    def _split(self, one: recipes.Intervention) -> tuple[list[Prompt], list[Prompt]]:
        """The labelled prompts of a gate: those that its probe is fitted on, and those that it is measured on."""
        gate = one.gate
        assert gate is not None
        labels = [*gate.positive, *gate.negative]
        prompts = self.recipe.prompts[gate.prompts].load(self.home)
        require_labels(prompts, labels)
        of = {label: [prompt for prompt in prompts if prompt.label == label] for label in labels}
        if gate.validation is not None:
            validation = self.recipe.prompts[gate.validation].load(self.home)
            require_labels(validation, labels)
            return [one for side in of.values() for one in side], [one for one in validation if one.label in labels]
        few = next((label for label, side in of.items() if len(side) < 5), None)
        if few is not None:
            raise RecipeError(
                f"{len(of[few])} prompts are labelled {few!r}: a gate needs 5 at least, or a 'validation'"
            )
        train = [one for side in of.values() for index, one in enumerate(side) if index % 5 != 4]
        return train, [one for side in of.values() for one in side[4::5]]

    def _check_prompts(self, one: recipes.Intervention) -> None:
        """Raise RecipeError where a prompt of a gate cannot be read as the recipe says."""
        assert one.gate is not None
        position = "instruction" if one.gate.position == "answer" else "last"
        prompts = [prompt for side in self._split(one) for prompt in side]
        encoded = encode(load_tokenizer(self.ref.folder), prompts, position)
        wanted = max(one.gate.generated, self.recipe.validation.decode_tokens)
        check_length(encoded, behaviour.context_length(self.base), wanted)
        self._unrelated(one)

    def _unrelated(self, one: recipes.Intervention) -> dict[str, list[Prompt]]:
        """Texts on which a gate should stay closed."""
        assert one.gate is not None
        sets = {name: self.recipe.prompts[name].load(self.home) for name in one.gate.unrelated}
        return {"plain": recipes.Prompts(path="plain").load(self.home)} | sets

    def _gate(self, one: recipes.Intervention, added: Intervention, gates: Sequence[Fitted] | None) -> Gate | None:
        """The gate of one of the recipe's interventions at one site; a stand-in where it is yet to be fitted."""
        wanted, site = one.gate, Site("mlp_in", added.site.layer)
        if wanted is None:
            return None
        closed = None
        if wanted.otherwise is not None and added.direction is not None:
            closed = intervene(one.name, added.direction, added.site, wanted.otherwise, one.units).affine.shift
        if wanted.load is not None:
            return replace(gating.chosen(gating.load(self.home / wanted.load), site, wanted.name), otherwise=closed)
        if gates is None:
            stand_in = torch.eye(self.layout.width)[0]
            return Gate(site, stand_in, 0.0, wanted.width, wanted.sharpness, closed, wanted.called)
        return replace(gating.chosen(gates, site, wanted.called), otherwise=closed)

    # --- plan and bake

    def interventions(
        self, directions: Sequence[Direction], gates: Sequence[Fitted] | None = None
    ) -> list[Intervention]:
        """The recipe's interventions, each with its direction and, where it has one, its gate."""
        found = []
        for one in self.recipe.intervention:
            own = direction.load(self.home / one.direction.load) if one.direction else directions
            wanted = None if one.from_site is None else parse_site(one.from_site, self.layers)
            sites = parse_sites(one.sites, self.layers)
            _check_layers(one.coefficient, sites)
            for site in sites:
                coefficient = _at_layer(one.coefficient, site)
                added = intervene(one.name, choose_direction(own, site, wanted), site, coefficient, one.units)
                found.append(replace(added, gate=self._gate(one, added, gates)) if one.gate else added)
        return found

    def plan(self) -> Plan:
        """What the bake will change, from the recipe's direction file or from what :meth:`extract` wrote."""
        gates = gating.load(self.gates_file) if self.needs_probes else None
        if self.recipe.direction:
            directions = direction.load(self.home / self.recipe.direction.load)
            return self._plan(directions, gates)
        directions = direction.load(self.directions_file) if self.recipe.estimator else []
        return self._plan(directions, gates)

    def plan_sketch(self) -> Plan:
        """:meth:`plan` before extraction: the right tensors, decisions and refusals; made-up vectors where needed."""
        if not self.recipe.estimator and not self.needs_probes:
            return self.plan()
        if not self.recipe.estimator:
            loaded = direction.load(self.home / self.recipe.direction.load) if self.recipe.direction else []
            return self._plan(loaded)
        vector = torch.zeros(self.layout.width)
        vector[0] = 1.0
        stand_ins = [Direction(vector, site, stream_norm=1.0) for site in self.read_sites()]
        return self._plan(stand_ins)

    def _plan(self, directions: Sequence[Direction], gates: Sequence[Fitted] | None = None) -> Plan:
        target = self.recipe.target
        return make_plan(self.base, self.interventions(directions, gates), target.prefer, pad_to=target.pad_to)

    def bake(self, plan: Plan) -> None:
        """Write ``model/`` and ``plan.json``."""
        target = registry.load("targets", self.recipe.target.name)
        # What an earlier run left at this path is replaced; publish() itself replaces nothing but a model folder.
        with self.progress("baking") as advance:
            target(plan, self.base, self.ref, self.model, recipe=self.text, overwrite=True, progress=advance)
        write_text(self.plan_file, json.dumps(plan.as_json(), indent=2) + "\n")

    # --- proof and behaviour

    @cached_property
    def _proof_rows(self) -> list[tuple[int, ...]]:
        wanted = self.recipe.validation
        rows = baked.proof_rows(wanted.prompts, self.home, self.base, wanted.decode_tokens)
        opening = [prompt for one in self._to_fit for prompt in self._split(one)[1]]
        return [*rows, *(found.ids for found in encode(load_tokenizer(self.ref.folder), _few_of_each(opening)))]

    def validate(self, plan: Plan) -> None:
        """Write ``report.json``; where a check failed, rename the model to ``model.rejected`` and raise."""
        with self.progress("validating") as advance:
            report = baked.certify(
                self.model, self.base, plan.interventions, self._proof_rows,
                decode_tokens=self.recipe.validation.decode_tokens, device=self.device,
                stream=self.recipe.validation.stream, prefer=plan.prefer, advance=advance,
            )  # fmt: skip
        write_text(self.report_file, json.dumps(report.as_json(), indent=2) + "\n")
        try:
            report.require()
        except ValidationFailed as error:
            rejected = self.model.with_name("model.rejected")
            shutil.rmtree(rejected, ignore_errors=True)
            self.model.rename(rejected)
            raise ValidationFailed(f"{error}. The model is now {rejected}; figures: {self.report_file}") from error

    @cached_property
    def _questions(self) -> list[Question]:
        return behaviour.questions(self.recipe, self.home, safety=self.safety)

    def evaluate(self, which: str) -> None:
        """Ask the ``base`` or the ``baked`` model and write ``answers.<which>.json``."""
        folder = self.ref.folder if which == "base" else self.model
        found = behaviour.ask(
            folder, self._questions, dtype=self.dtype, device=self.device, who=which, progress=self.progress
        )
        write_text(self.answers_file(which), json.dumps(found, indent=1) + "\n")

    def openings(self, plan: Plan) -> None:
        """Write ``openings.json``: on which share of each prompt set's tokens each gate is open, under the hooks."""
        found = behaviour.openings(
            self.ref.folder, self._questions, plan.interventions, dtype=self.dtype, device=self.device,
            progress=self.progress,
        )  # fmt: skip
        write_text(self.openings_file, json.dumps(found, indent=1) + "\n")

    def card(self) -> None:
        """Put base and baked side by side in ``evaluation.json`` and write the model card."""
        base, after = (json.loads(self.answers_file(which).read_text(encoding="utf-8")) for which in ("base", "baked"))
        plan_sha256 = manifest.read(self.model).content["plan_sha256"]
        evaluation = {"plan_sha256": plan_sha256, **behaviour.before_and_after(self._questions, base, after)}
        if self.openings_file.is_file() and any(one.gate for one in self.recipe.intervention):
            evaluation["gates"] = json.loads(self.openings_file.read_text(encoding="utf-8"))
        write_text(self.evaluation_file, json.dumps(evaluation, indent=2) + "\n")
        manifest.set_recipe(self.model, self.text)
        report = json.loads(self.report_file.read_text(encoding="utf-8"))
        write_text(self.model / "README.md", card.render(self.model, report, evaluation))


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


def _few_of_each(prompts: Sequence[Prompt], count: int = 6) -> list[Prompt]:
    """The first ``count`` prompts of each label."""
    labels = dict.fromkeys(prompt.label for prompt in prompts)
    return [one for label in labels for one in [prompt for prompt in prompts if prompt.label == label][:count]]


def save_directions(directions: Sequence[Direction], path: Path) -> None:
    """Write ``directions`` to ``path``, complete or not at all.

    Raises:
        CheckpointError: the file cannot be written, or something other than directions would be replaced.
    """
    if path.exists() and not direction.is_direction_file(path):
        raise CheckpointError(f"{path} is there and is no direction file of ours; choose another name")
    try:
        with replacing(path) as beside:
            direction.save(directions, beside)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def choose_direction(directions: Sequence[Direction], site: Site, wanted: Site | None = None) -> Direction:
    """The direction for ``site``: the one read at ``wanted`` or at ``site`` itself, or the only one there is.

    Raises:
        RecipeError: none of these exists; the message lists the sites that have one.
    """
    for one in directions:
        if one.site == (wanted or site):
            return one
    if wanted is None and len(directions) == 1:
        return directions[0]
    there = ", ".join(str(one.site) for one in directions) or "none"
    raise RecipeError(f"no direction was read at {wanted or site}; there are: {there}. Choose one with 'from: SITE'")


def _check_layers(value: float | dict[int, float], sites: Sequence[Site]) -> None:
    layers = {site.layer for site in sites}
    unused = sorted(set(value) - layers) if isinstance(value, dict) else []
    if unused:
        raise RecipeError(
            f"'coefficient' names layer {unused[0]}, which is not among the sites; remove it or add the site"
        )


def _at_layer(value: float | dict[int, float], site: Site) -> float:
    if not isinstance(value, dict):
        return value
    if site.layer not in value:
        raise RecipeError(f"'coefficient' has no entry for the layer of {site}; it has {sorted(value)}")
    return value[site.layer]


def _check_names(recipe: Recipe) -> None:
    """Every name that a folder of extensions must have, before the model is looked for."""
    named = [("interventions", one.name) for one in recipe.intervention] + [("targets", recipe.target.name)]
    named += [("probes", one.gate.probe) for one in recipe.intervention if one.gate]
    named += [("estimators", recipe.estimator.name)] if recipe.estimator else []
    named += [("judges", recipe.evaluate.judge)] if recipe.evaluate else []
    for folder, name in named:
        registry.module(folder, name)


def _stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times: whether a file is still the one that it was."""
    found = [(path.name, path.stat()) for path in files if path.exists()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]
