"""The whole job: what a run leaves behind, what it does again and what it does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import steer_bake
from steer_bake import behaviour, direction, manifest, pipeline
from steer_bake.errors import CheckpointError, NotFoldable, RecipeError, SteerBakeError, ValidationFailed
from steer_bake.interventions import intervene
from steer_bake.job import Job
from steer_bake.models import load_model
from steer_bake.prompts import PACKAGED
from steer_bake.sites import Site
from steer_bake.steering import steer

from . import jobs, tiny
from .chat_server import ChatServer

STAGES = ["extract", "bake", "validate", "evaluate base", "evaluate baked", "card"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Prompt files and ``recipe.yaml``."""
    folder = tmp_path_factory.mktemp("home")
    jobs.write_recipe(folder, llama)
    return folder


@pytest.fixture(scope="module")
def first(home: Path) -> pipeline.Outcome:
    """A finished run without safety. Read-only: copy its folder to run on."""
    return pipeline.run(home / "recipe.yaml", home / "first")


@pytest.fixture
def again(first: pipeline.Outcome, home: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run, and the recipe put back afterwards."""
    before = (home / "recipe.yaml").read_text()
    shutil.copytree(first.folder, tmp_path / "again", copy_function=shutil.copy2)
    yield tmp_path / "again"
    (home / "recipe.yaml").write_text(before)


def rerun(home: Path, folder: Path, llama: Path, **changes: Any) -> list[str]:
    """The stages that a run of the changed recipe does again."""
    done = pipeline.run(jobs.write_recipe(home, llama, **changes), folder)
    return [name for name in STAGES if done.ran[name]]


# --- what a run leaves behind


def test_a_run_ends_with_every_artefact_and_a_passing_certificate(first: pipeline.Outcome) -> None:
    for name in ("direction.safetensors", "plan.json", "report.json", "evaluation.json", "stages.json"):
        assert (first.folder / name).stat().st_size > 0
    assert first.report["passed"] is True
    assert {"function, constants (float32)", "function, storage dtype", "effect"} <= {
        check["name"] for check in first.report["checks"]
    }
    assert list(first.ran.values()) == [True] * len(STAGES)
    assert json.loads((first.folder / "plan.json").read_text()) == first.plan
    assert ModelCard.load(first.model / "README.md").data.to_dict()["library_name"] == "transformers"
    assert not list(first.folder.rglob(".*")), "nothing half-written stays"


def test_plain_transformers_loads_the_model_without_a_stray_key(first: pipeline.Outcome) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(first.model, output_loading_info=True)
    assert not any(info.values())


def test_the_answers_to_the_recipes_own_prompts_are_kept(first: pipeline.Outcome) -> None:
    answers = json.loads((first.folder / "answers.base.json").read_text())
    assert len(answers["test"]["answers"]) == len(answers["test"]["labels"]) == len(jobs.QUESTIONS)
    (row,) = first.evaluation["behaviour"]
    assert (row["prompt_set"], row["label"], row["base"]["total"]) == ("test", "refusal", len(jobs.QUESTIONS))


def test_safety_that_is_declined_is_recorded(first: pipeline.Outcome) -> None:
    assert first.evaluation["safety_measured"] is False
    assert first.evaluation["safety"] == []
    assert "Refusals were not measured" in (first.model / "README.md").read_text()


@pytest.fixture(scope="module")
def measured(
    home: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[pipeline.Outcome, Any]]:
    """A run that measures safety, and every answer that either model gave."""
    said: list[str] = []
    real = behaviour.answers

    def listening(*arguments: Any, **options: Any) -> list[str]:
        said.extend(real(*arguments, **options))
        return said[-len(arguments[2]) :]

    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(behaviour, "answers", listening)
        recipe = jobs.write_recipe(folder, llama, safety=True, evaluate=None)
        yield pipeline.run(recipe, folder / "run"), said


def test_both_safety_sets_are_measured_with_intervals(measured: tuple[pipeline.Outcome, Any]) -> None:
    outcome, _ = measured
    assert outcome.evaluation["safety_measured"] is True
    assert [row["prompt_set"] for row in outcome.evaluation["safety"]] == ["safety/harmful", "safety/harmless"]
    for row in outcome.evaluation["safety"]:
        assert row["base"]["total"] >= 100
        assert row["base"]["low"] <= row["base"]["hits"] / row["base"]["total"] <= row["base"]["high"]
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["prompt_set"] in (outcome.model / "README.md").read_text()


def test_answers_to_safety_prompts_are_stored_nowhere(measured: tuple[pipeline.Outcome, Any]) -> None:
    outcome, said = measured
    long = [answer for answer in said if len(answer.strip()) >= 8]
    assert len(long) > 100
    for path in outcome.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [one for one in long if one.encode() in content or json.dumps(one)[1:-1].encode() in content]


@pytest.mark.parametrize("path", ["safety/harmful", "./safety/harmful", "copied.jsonl", "selective/test"])
def test_answers_to_the_packaged_harmful_requests_are_not_kept_whatever_they_are_called(
    home: Path, llama: Path, path: str
) -> None:
    shutil.copyfile(PACKAGED / "safety" / "harmful.jsonl", home / "copied.jsonl")
    label = "renamed" if path == "copied.jsonl" else None
    sets = {"train": "train.jsonl", "mine": {"path": path, "limit": 2, "label": label}}
    recipe = jobs.write_recipe(home, llama, prompts=sets, evaluate={"sets": ["mine"]})
    (asked,) = Job(recipe, home / "unused")._questions
    assert not asked.keep_answers
    jobs.write_recipe(home, llama)


def test_a_language_model_judges_a_run_and_what_it_took_is_recorded(llama: Path, tmp_path: Path) -> None:
    server = ChatServer(lambda answer: "<verdict>answer</verdict>")
    options = {"model": "m", "endpoint": server.url, "cache": str(tmp_path / "cache")}
    settings = {"judge": "llm", "judge_options": options, "label": "answer", "sets": ["test"], "max_new_tokens": 12}
    recipe = jobs.write_recipe(tmp_path, llama, evaluate=settings)
    found = pipeline.run(recipe, tmp_path / "run").evaluation
    server.close()
    assert found["judge"] == "llm"
    (row,) = found["behaviour"]
    assert row["labels"].get("answer", [0, 0])[0] + row["labels"].get("incoherent", [0, 0])[0] == row["base"]["total"]
    base, baked = found["judging"]["test"]
    assert base["asked"] + baked["asked"] == len(server.requests) > 0
    assert all("[question " in one["messages"][0]["content"] for one in server.requests)
    jobs.write_recipe(tmp_path, llama, evaluate={**settings, "judge_options": {**options, "modle": "m"}})
    with pytest.raises(RecipeError, match="no option 'modle'"):
        Job(recipe, tmp_path / "run").check()


# --- what is done again


def test_a_second_run_does_nothing(home: Path, again: Path, llama: Path) -> None:
    assert rerun(home, again, llama) == []


def test_another_coefficient_keeps_the_directions_and_the_bases_answers(home: Path, again: Path, llama: Path) -> None:
    changed = {"name": "add", "sites": "resid_post.1", "coefficient": 2.5}
    done = rerun(home, again, llama, intervention=changed)
    assert done == ["bake", "validate", "evaluate baked", "card"]
    assert manifest.read(again / "model").content["plan"]["interventions"][0]["amount"] == pytest.approx(
        2.5 * direction.load(again / "direction.safetensors")[0].scale
    )


def test_another_evaluation_keeps_the_model_and_its_certificate(home: Path, again: Path, llama: Path) -> None:
    settings = {"judge": "phrases", "label": "answer", "sets": ["test"], "max_new_tokens": 6}
    assert rerun(home, again, llama, evaluate=settings) == ["evaluate base", "evaluate baked", "card"]
    assert manifest.read(again / "model").content["recipe"] == (home / "recipe.yaml").read_text()
    assert json.loads((again / "evaluation.json").read_text())["label"] == "answer"


def test_a_comment_in_the_recipe_only_renews_the_card(home: Path, again: Path) -> None:
    recipe = home / "recipe.yaml"
    recipe.write_text("# a reason\n" + recipe.read_text())
    done = pipeline.run(recipe, again)
    assert [name for name, now in done.ran.items() if now] == ["card"]
    assert "# a reason" in (again / "model" / "README.md").read_text()


def test_a_file_that_was_lost_is_made_again(home: Path, again: Path, llama: Path) -> None:
    (again / "evaluation.json").unlink()
    assert rerun(home, again, llama) == ["card"]
    shutil.rmtree(again / "model")
    assert rerun(home, again, llama) == ["bake", "validate", "card"]
    (again / "model" / "steering.json").unlink()
    assert rerun(home, again, llama) == ["bake", "validate", "card"]


def test_another_chat_template_of_the_base_makes_everything_stale(llama: Path, tmp_path: Path) -> None:
    base = jobs.copy(llama, tmp_path / "base")
    recipe, run = jobs.write_recipe(tmp_path, base), tmp_path / "run"
    keys = [Job(recipe, run).extract_key, Job(recipe, run).evaluate_key()]
    template = base / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert not set(keys) & {Job(recipe, run).extract_key, Job(recipe, run).evaluate_key()}


@pytest.mark.tampered
def test_a_model_that_was_tampered_with_loses_its_certificate(home: Path, again: Path, llama: Path) -> None:
    biases = again / "model" / "model-00002-of-00002.safetensors"
    tensors = load_file(biases)
    tensors["model.layers.1.mlp.down_proj.bias"] *= -1
    biases.unlink()
    save_file(tensors, biases, metadata={"format": "pt"})
    with pytest.raises(ValidationFailed):
        rerun(home, again, llama)
    assert not (again / "model").exists()


def test_a_stage_that_was_interrupted_is_run_again(
    home: Path, again: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    def interrupted(*_: Any) -> None:
        raise Interrupted

    settings = {"judge": "phrases", "label": "refusal", "sets": ["test"], "max_new_tokens": 7}
    with monkeypatch.context() as patch:
        patch.setattr(Job, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            rerun(home, again, llama, evaluate=settings)
    # Even where the recipe has gone back by then: what the stage had written is not trusted.
    assert rerun(home, again, llama) == ["evaluate base"]


# --- runs that fail


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"intervention": {"name": "add", "sites": "resid_post.9"}}, RecipeError),
        ({"intervention": {"name": "add", "sites": "writes", "from": "resid_post.1"}}, RecipeError),
        ({"intervention": {"name": "ablate", "sites": "resid_post.1"}}, NotFoldable),
        ({"intervention": {"name": "add", "sites": "resid_post.1", "coefficient": {2: 1.0}}}, RecipeError),
        ({"prompts": {"train": "train.jsonl", "test": "none.jsonl"}}, RecipeError),
        ({"validate": {"prompts": "none.jsonl"}}, RecipeError),
        ({"evaluate": {"judge": "phrases", "label": "refsual", "sets": ["test"]}}, RecipeError),
        ({"target": {"name": "nowhere"}}, RecipeError),
    ],
)
def test_what_is_wrong_is_found_before_the_model_is_loaded_and_leaves_no_folder(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[SteerBakeError]
) -> None:
    monkeypatch.setattr("steer_bake.estimation.load_model", lambda *_, **__: pytest.fail("the weights were loaded"))
    with pytest.raises(error):
        pipeline.run(jobs.write_recipe(tmp_path, llama, **changes), tmp_path / "runs" / "one")
    assert not (tmp_path / "runs").exists()


def test_a_model_that_fails_its_certificate_is_not_left_behind(llama: Path, tmp_path: Path) -> None:
    jobs.write_directions(tmp_path / "v.safetensors")
    nothing = {"name": "add", "sites": "resid_post.1", "coefficient": 0.0}
    changes = {"estimator": None, "direction": {"load": "v.safetensors"}, "intervention": nothing}
    with pytest.raises(ValidationFailed, match=r"effect.*report\.json"):
        pipeline.run(jobs.write_recipe(tmp_path, llama, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "model.rejected" / "config.json").exists()  # set aside, not destroyed
    assert json.loads((tmp_path / "run" / "report.json").read_text())["passed"] is False


def test_a_folder_in_use_for_something_else_is_no_run_folder(llama: Path, tmp_path: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, llama)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(RecipeError, match=r"not empty.*cat\.jpg"):
        pipeline.run(recipe, tmp_path / "photos")
    with pytest.raises(RecipeError, match="is a file"):
        pipeline.run(recipe, recipe)


# --- directions and interventions of a recipe


def planned(tmp_path: Path, llama: Path, **changes: Any) -> list[Any]:
    """The interventions of a recipe, with directions really estimated where it has an estimator."""
    job = Job(jobs.write_recipe(tmp_path, llama, **changes), tmp_path / "run")
    job.check()
    if job.recipe.estimator:
        job.extract()
    return list(job.plan().interventions)


def test_a_direction_can_be_loaded(llama: Path, tmp_path: Path) -> None:
    vector = direction.load(jobs.write_directions(tmp_path / "v.safetensors"))[0]
    (found,) = planned(tmp_path, llama, estimator=None, direction={"load": "v.safetensors"})
    assert torch.allclose(found.affine.shift, 2.0 * 2.0 * vector.vector)
    assert found.dose == pytest.approx(4.0 / 5.0)


def test_every_intervention_can_bring_its_own_direction(llama: Path, tmp_path: Path) -> None:
    jobs.write_directions(tmp_path / "v.safetensors")
    own = [{"name": "add", "sites": "resid_post.1", "direction": {"load": "v.safetensors"}}]
    assert len(planned(tmp_path, llama, estimator=None, intervention=own)) == 1


def test_a_label_can_be_projected_out_of_the_direction(llama: Path, tmp_path: Path) -> None:
    estimator = {"positive": "gloomy", "negative": "cheerful"}
    (free,) = planned(tmp_path, llama, estimator=estimator)
    job = Job(jobs.write_recipe(tmp_path, llama, estimator=estimator | {"orthogonal_to": "plain"}), tmp_path / "b")
    (found,) = job.estimate()
    mean = mean_of(llama, jobs.TRAIN["plain"])
    assert abs(float(found.vector @ mean)) < 1e-4 * float(mean.norm())
    assert abs(float(free.direction.vector @ mean)) > 1e-3 * float(mean.norm())
    assert 0 < found.scale < free.direction.scale


def mean_of(llama: Path, texts: list[str]) -> torch.Tensor:
    """The mean of resid_post.1 at the last token, the plain way."""
    model, words = load_model(llama, dtype="float32"), tiny.tokenizer()
    rows = [
        words.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)
        for text in texts
    ]
    with torch.no_grad():
        states = [model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[2] for row in rows]
    return torch.stack([state[0, -1] for state in states]).mean(0)


def test_a_coefficient_can_be_given_per_layer(llama: Path, tmp_path: Path) -> None:
    each = {"name": "add", "sites": "resid_post.1-2", "coefficient": {1: 0.5, 2: -1.0}, "units": "unit"}
    assert [one.amount for one in planned(tmp_path, llama, intervention=each)] == [0.5, -1.0]


def test_several_interventions_can_share_the_direction_of_one_site(llama: Path, tmp_path: Path) -> None:
    several = [
        {"name": "add", "sites": "resid_post.2", "coefficient": 0.5, "units": "dose", "from": "resid_post.1"},
        {"name": "ablate", "sites": "writes", "from": "resid_post.1"},
    ]
    found = planned(tmp_path, llama, read={"sites": "resid_post.1"}, intervention=several)
    assert [str(one.site) for one in found] == ["writes", "resid_post.2"], "in the order in which they act"
    assert {str(one.direction.site) for one in found} == {"resid_post.1"}
    norm = found[0].direction.stream_norm
    assert float(found[1].affine.shift.norm()) == pytest.approx(0.5 * norm, rel=1e-5)


def test_the_sketch_of_a_plan_has_the_edits_of_the_plan(llama: Path, tmp_path: Path) -> None:
    several = [{"name": "add", "sites": "resid_post.2"}, {"name": "clamp", "sites": "writes", "from": "resid_post.2"}]
    job = Job(jobs.write_recipe(tmp_path, llama, intervention=several, read={"sites": "resid_post.2"}), tmp_path / "r")
    sketch = job.check()
    job.extract()
    assert [edit.tensor for edit in sketch.edits] == [edit.tensor for edit in job.plan().edits]
    assert sketch.decisions == job.plan().decisions


def test_the_recipes_relative_model_lies_beside_it(llama: Path, tmp_path: Path) -> None:
    jobs.copy(llama, tmp_path / "near")
    assert Job(jobs.write_recipe(tmp_path, "near"), tmp_path / "r").ref.folder == tmp_path / "near"


# --- without a recipe


def test_bake_without_a_recipe_is_the_hook(llama: Path, tmp_path: Path) -> None:
    vector = direction.load(jobs.write_directions(tmp_path / "v.safetensors"))[0]
    added = intervene("add", vector, Site("resid_post", 1), 2.0)
    out = steer_bake.bake(str(llama), [added], tmp_path / "baked")
    ids = torch.tensor([[5, 6, 7, 8]])
    base, baked = load_model(llama, dtype="float32"), load_model(out, dtype="float32")
    with torch.no_grad(), steer_bake.steer(base, [added]):
        expected = base(ids).logits
    with torch.no_grad():
        assert torch.allclose(baked(ids).logits, expected, atol=0.02)  # the bias is stored in bfloat16
        assert not torch.allclose(base(ids).logits, expected, atol=0.2)
    assert steer is steer_bake.steer


def test_a_baked_model_is_baked_again_only_where_that_is_asked_for(llama: Path, tmp_path: Path) -> None:
    vector = direction.load(jobs.write_directions(tmp_path / "v.safetensors"))[0]
    added = [intervene("add", vector, Site("resid_post", 1), 2.0)]
    once = pipeline.bake(llama, added, tmp_path / "once")
    with pytest.raises(CheckpointError, match="--stack"):
        pipeline.bake(once, added, tmp_path / "deep" / "twice")
    assert not (tmp_path / "deep").exists()
    twice = pipeline.bake(once, added, tmp_path / "twice", stack=True)
    assert manifest.read(twice).content["stacked_on"]["plan_sha256"] == manifest.read(once).content["plan_sha256"]


# --- the package


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, steer_bake.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_every_public_name_is_there_and_hides_no_module() -> None:
    package = Path(steer_bake.__file__).parent
    modules = {path.stem for path in package.iterdir()}
    for name in steer_bake.__all__:
        assert getattr(steer_bake, name) is not None
        assert name not in modules
    assert set(steer_bake.__all__) <= set(dir(steer_bake))
    with pytest.raises(AttributeError, match="stear"):
        _ = steer_bake.stear  # type: ignore[attr-defined]
