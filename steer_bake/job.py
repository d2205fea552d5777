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

from . import adapter, architectures, baked, behaviour, card, damage, direction, gating, manifest, registry
from . import recipe as recipes
from .architectures import Layout
from .behaviour import Question
from .checkpoint import Checkpoint
from .direction import Direction
from .errors import CheckpointError, RecipeError, ValidationFailed
from .estimation import Estimation
from .fitting import Fitting, save_gates
from .gating import Fitted
from .interventions import Intervention, intervene
from .models import ModelRef, Offload, Placement, load_tokenizer, resolve
from .plan import Plan, make_plan
from .prompts import encode
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
        offload: Offload | None = None,
        progress: Progress = silent,
    ) -> None:
        self.recipe, self.text = recipes.read(recipe_file)
        _check_names(self.recipe)
        self.home = recipe_file.parent  # the recipe's relative paths start here
        self.folder, self.device, self.progress = folder, device, progress
        self.placement: Placement = offload or device  # of the model whose activations are read
        self.dtype = baked.compute_dtype(dtype, device)
        self.safety = safety and self.recipe.safety
        with progress("fetching the model") as advance:
            beside = self.home / self.recipe.model
            named = str(beside) if beside.is_dir() else self.recipe.model
            self.ref: ModelRef = resolve(named, progress=advance)
        self.base = Checkpoint.open(self.ref.folder)
        self.layout: Layout = architectures.layout(self.base.config)
        self.layers = self.layout.layers

    def check_runnable(self) -> None:
        """Raise RecipeError where what the recipe makes is not for transformers, which prove and measure it."""
        if registry.identifier(self.recipe.target.name) == "gguf_vector":
            raise RecipeError(
                "a run proves and measures with transformers, which do not load control vectors: write one with "
                "'steer-bake extract RECIPE -o v.gguf' or 'steer-bake bake --target gguf-vector'"
            )

    def check(self) -> Plan:
        """Read everything that the stages will read, but the weights, so that what is wrong is said before long work.

        Returns:
            The plan with stand-ins where a direction is still to be estimated: right but for amounts and hashes.

        Raises:
            SteerBakeError: what would stop a stage: a prompt set, a label, a prompt too long, a site, a direction file.
        """
        if self.recipe.estimator:
            self.estimation.check()
        self.fitting.check()
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
        first = adapter.CONFIG if self.recipe.target.name == "lora" else "config.json"
        return [self.model / first, *manifest.files(self.model), self.plan_file]

    @property
    def report_file(self) -> Path:
        return self.folder / "report.json"

    @property
    def evaluation_file(self) -> Path:
        return self.folder / "evaluation.json"

    def answers_file(self, which: str) -> Path:
        return self.folder / f"answers.{which}.json"

    def damage_file(self, which: str) -> Path:
        return self.folder / f"damage.{which}.json"

    # --- what stages are made from

    @cached_property
    def _base_key(self) -> str:
        headers = [self.base.header_hash(name) for name in self.base.files]
        stamps = _stamps(sorted(path for path in self.base.folder.iterdir() if path.is_file()))
        return key(self.ref.name, self.ref.revision, self.base.config, stamps, headers)

    @cached_property
    def extract_key(self) -> str:
        sites = [str(site) for site in self.read_sites()]
        estimation = self.estimation
        prompts = [astuple(one) for one in (*estimation.prompts, *estimation.validation)]
        source = estimation.source[0]
        sibling = _stamps(sorted(source.folder.iterdir())) if source is not self.ref else []
        return key(self._base_key, self.recipe.estimator, self.recipe.read, sites, self.dtype, prompts, sibling)

    @cached_property
    def probe_key(self) -> str:
        return key(self._base_key, self.fitting.inputs(), self.dtype)

    def bake_key(self, plan: Plan) -> str:
        return key(self._base_key, self.recipe.target, plan.sha256)

    def validate_key(self, plan: Plan) -> str:
        # The files themselves are part of it: whoever touched them since needs a new certificate.
        stamps = _stamps([*sorted(self.model.glob("*.safetensors")), self.baked_files[0]])
        return key(self.bake_key(plan), stamps, self._proof_rows, self.recipe.validation.decode_tokens, self.device)

    def evaluate_key(self, plan: Plan | None = None) -> str:
        model = self.bake_key(plan) if plan else self._base_key
        return key(model, [astuple(one) for one in self._questions], self.dtype, self.device)

    def damage_key(self, plan: Plan | None = None) -> str:
        model = self.bake_key(plan) if plan else self._base_key
        wanted = self.recipe.damage and self.recipe.damage.model_dump()
        return key(model, wanted, self.dtype, self.device, "damage")

    def openings_key(self, plan: Plan) -> str:
        return key(self.evaluate_key(plan), "openings")

    def card_key(self, plan: Plan) -> str:
        measured = [each(one) for each in (self.evaluate_key, self.damage_key) for one in (None, plan)]
        return key(self.validate_key(plan), *measured, self.safety, self.text)

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
        return self.estimation.directions()

    @cached_property
    def estimation(self) -> Estimation:
        """How the directions come about; raises RecipeError where the recipe loads them."""
        return Estimation(
            self.recipe, self.home, self.ref, self.base, self.read_sites(),
            dtype=self.dtype, placement=self.placement, recipe_hash=lambda: self.extract_key, progress=self.progress,
        )  # fmt: skip

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

    # --- gates

    @cached_property
    def fitting(self) -> Fitting:
        """How the gates come about."""
        return Fitting(
            self.recipe, self.home, self.ref, self.base,
            dtype=self.dtype, placement=self.placement, progress=self.progress,
        )  # fmt: skip

    @property
    def needs_probes(self) -> bool:
        """Whether a gate is to be fitted."""
        return bool(self.fitting.wanted)

    def probe(self) -> None:
        """Fit the recipe's gates into ``gates.safetensors``."""
        save_gates(self.fit_gates(), self.gates_file)

    def fit_gates(self) -> list[Fitted]:
        """The recipe's gates, one per site of every intervention that has one (raises as :meth:`Fitting.gates`)."""
        return self.fitting.gates()

    def gate_sites(self) -> list[Site]:
        """Where gates are to be fitted."""
        return self.fitting.sites()

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
                found.append(replace(added, gate=self.fitting.gate(one, added, gates)))
        return found

    def plan(self) -> Plan:
        """What the bake will change, from the recipe's direction file or from what :meth:`extract` wrote."""
        gates = gating.load(self.gates_file) if self.needs_probes else None
        return self._plan(direction.load(self.directions_file) if self.recipe.estimator else self._loaded(), gates)

    def plan_sketch(self) -> Plan:
        """:meth:`plan` before extraction: the right tensors, decisions and refusals; made-up vectors where needed."""
        if not self.recipe.estimator:
            return self._plan(self._loaded())
        vector = torch.zeros(self.layout.width)
        vector[0] = 1.0
        stand_ins = [Direction(vector, site, stream_norm=1.0) for site in self.read_sites()]
        return self._plan(stand_ins)

    def _loaded(self) -> list[Direction]:
        named = self.recipe.direction
        return direction.load(self.home / named.load) if named else []

    def _plan(self, directions: Sequence[Direction], gates: Sequence[Fitted] | None = None) -> Plan:
        found, target = self.interventions(directions, gates), self.recipe.target
        return make_plan(self.base, found, target.prefer, target.name, pad_to=target.pad_to)

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
        opening = self.fitting.held_back()  # plain text opens no gate
        more = encode(load_tokenizer(self.ref.folder), opening) if opening else []
        return [*rows, *(one.ids for one in more)]

    def validate(self, plan: Plan) -> None:
        """Write ``report.json``; where a check failed, rename the model to ``model.rejected`` and raise."""
        with self.progress("validating") as advance:
            report = baked.certify(
                self.model, self.base, plan.interventions, self._proof_rows,
                decode_tokens=self.recipe.validation.decode_tokens, device=self.device,
                stream=self.recipe.validation.stream, prefer=plan.prefer, target=plan.target, advance=advance,
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

    def damage(self, which: str) -> None:
        """Measure plain text and sums of the ``base`` or the ``baked`` model and write ``damage.<which>.json``."""
        assert self.recipe.damage is not None
        found = damage.measure(
            self.ref.folder if which == "base" else self.model, self.recipe.damage,
            dtype=self.dtype, device=self.device, who=which, progress=self.progress,
        )  # fmt: skip
        write_text(self.damage_file(which), json.dumps(found, indent=1) + "\n")

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
        if self.recipe.damage:
            sides = [json.loads(self.damage_file(which).read_text(encoding="utf-8")) for which in ("base", "baked")]
            evaluation["damage"] = damage.before_and_after(*sides)
        if self.openings_file.is_file() and any(one.gate for one in self.recipe.intervention):
            evaluation["gates"] = json.loads(self.openings_file.read_text(encoding="utf-8"))
        write_text(self.evaluation_file, json.dumps(evaluation, indent=2) + "\n")
        manifest.set_recipe(self.model, self.text)
        report = json.loads(self.report_file.read_text(encoding="utf-8"))
        card.write(self.model, report, evaluation)


def save_directions(directions: Sequence[Direction], path: Path, model_type: str = "") -> None:
    """Write ``directions`` to ``path``, complete or not at all; where that ends in ``.gguf``, as a control vector.

    Raises:
        CheckpointError: the file cannot be written, or something other than directions would be replaced.
    """
    if path.exists() and not direction.is_direction_file(path):
        raise CheckpointError(f"{path} is there and is no direction file of ours; choose another name")
    try:
        with replacing(path) as beside:
            if path.suffix == ".gguf":
                direction.save_control_vector(directions, beside, model_type)
            else:
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
