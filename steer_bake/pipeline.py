"""The whole job on one screen: recipe -> directions -> plan -> bake -> certificate -> behaviour -> card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import distributed, registry
from .checkpoint import Checkpoint, check_no_weights
from .errors import RecipeError
from .interventions import Intervention
from .job import Job
from .models import ModelRef, open_base, open_remote, pick_device
from .plan import PAD_TO, make_plan
from .stages import Progress, Stages, no_empty_folder, silent


@dataclass(frozen=True)
class Outcome:
    """What a run produced."""

    folder: Path
    model: Path
    plan: Mapping[str, Any]
    report: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    ran: Mapping[str, bool]  # stage to whether it was run now


def run(
    recipe_file: str | Path,
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    safety: bool = True,
    force: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Everything a recipe asks for, into ``folder``; stages whose inputs have not changed are not run again.

    Raises:
        SteerBakeError: any of its kinds, with a sentence; what was finished before stays and is used by the next run.
    """
    if distributed.is_launched():
        raise RecipeError(
            "'run' is one process: start only 'extract' under torchrun, then give the file it writes to the recipe as "
            "'direction: {load: FILE}'"
        )
    folder = Path(folder)
    stages = Stages(folder, force)
    job = Job(Path(recipe_file), folder, device=pick_device(device), dtype=dtype, safety=safety, progress=progress)
    job.check_runnable()
    job.check()
    with no_empty_folder(folder):
        if job.recipe.estimator:
            stages.run("extract", job.extract_key, job.extract, job.directions_file)
        if job.needs_probes:
            stages.run("probe", job.probe_key, job.probe, job.gates_file)
        plan = job.plan()
        stages.run("bake", job.bake_key(plan), lambda: job.bake(plan), *job.baked_files)
        stages.run("validate", job.validate_key(plan), lambda: job.validate(plan), job.report_file)
        stages.run("evaluate base", job.evaluate_key(), lambda: job.evaluate("base"), job.answers_file("base"))
        stages.run("evaluate baked", job.evaluate_key(plan), lambda: job.evaluate("baked"), job.answers_file("baked"))
        if job.recipe.damage:
            stages.run("damage base", job.damage_key(), lambda: job.damage("base"), job.damage_file("base"))
            stages.run("damage baked", job.damage_key(plan), lambda: job.damage("baked"), job.damage_file("baked"))
        if plan.gates:
            stages.run("gates", job.openings_key(plan), lambda: job.openings(plan), job.openings_file)
        stages.run("card", job.card_key(plan), job.card, job.model / "README.md", job.evaluation_file)

    report, evaluation = (json.loads(file.read_text("utf-8")) for file in (job.report_file, job.evaluation_file))
    return Outcome(folder, job.model, plan.as_json(), report, evaluation, stages.ran)


def bake(
    model: str | Path,
    interventions: Sequence[Intervention],
    out: str | Path,
    *,
    target: str = "checkpoint",
    prefer: str = "smallest",
    stack: bool = False,
    download: bool = True,
    pad_to: int = PAD_TO,
    progress: Progress = silent,
) -> Path:
    """Fold ``interventions`` into a copy of ``model`` (hub id, folder or packaged name) at ``out``.

    With ``download=False`` the weights of a hub model stay there: ``out`` then holds new tensors and all small files,
    and its ``steering.json`` says which shards are to be copied on the hub before it is complete.

    Raises:
        NotFoldable: a site and operation that this model cannot hold exactly.
        CheckpointError: the model is missing, damaged or was baked before, ``out`` cannot be written, or the bake needs
            weights that are not to be downloaded.
    """
    registry.module("targets", target)
    with progress("fetching the model") as advance:
        open_model = open_base if download else open_remote
        ref, base = open_model(str(model), progress=advance)
    return bake_opened(
        ref, base, interventions, out, target=target, prefer=prefer, stack=stack, pad_to=pad_to, progress=progress
    )


def bake_opened(
    ref: ModelRef,
    base: Checkpoint,
    interventions: Sequence[Intervention],
    out: str | Path,
    *,
    target: str = "checkpoint",
    prefer: str = "smallest",
    stack: bool = False,
    pad_to: int = PAD_TO,
    progress: Progress = silent,
) -> Path:
    """:func:`bake` of a model that :func:`open_base` or :func:`open_remote` has opened."""
    write = registry.load("targets", target)
    plan = make_plan(base, interventions, prefer, target, pad_to=pad_to)
    if base.remote is not None:
        check_no_weights(base, plan.edits, plan.rename, plan.dropped)
    out = Path(out)
    with no_empty_folder(out), progress("baking") as advance:
        write(plan, base, ref, out, stack=stack, progress=advance)
    return out
