"""A recipe is read completely or refused with a sentence that says where and what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from steer_bake.errors import RecipeError
from steer_bake.recipe import Intervention, parse, read

from . import jobs


def text(**changes: Any) -> str:
    return yaml.safe_dump(jobs.recipe(**({"model": "org/name"} | changes)))


def test_a_recipe_reads_as_it_is_written() -> None:
    found = parse(
        text(
            read={"sites": "resid_post.1-2", "position": "mean"},
            intervention=[
                {"name": "add", "sites": ["resid_post.1", "resid_post.2"], "coefficient": {1: 0.5, 2: 1}},
                {"name": "ablate", "sites": "writes", "from": "resid_post.2"},
            ],
        )
    )
    assert found.model == "org/name"
    assert found.prompts["train"].path == "train.jsonl"
    assert (found.read.sites, found.read.position) == ("resid_post.1-2", "mean")
    assert found.intervention[0].coefficient == {1: 0.5, 2: 1.0}
    assert found.intervention[1].from_site == "resid_post.2"
    assert found.validation.decode_tokens == 4
    assert found.evaluate is not None
    assert found.evaluate.sets == ["test"]


def test_one_intervention_needs_no_list() -> None:
    assert parse(text()).intervention == [Intervention(name="add", sites="resid_post.1", coefficient=2.0)]


def test_safety_is_measured_unless_it_is_declined() -> None:
    assert parse(text(safety=None)).safety is True
    assert parse(text(safety=False)).safety is False


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"promts": {}}, "unknown key 'promts': did you mean 'prompts'?"),
        (
            {"intervention": {"sites": "writes", "coeficient": 1}},
            "'intervention.coeficient': did you mean 'coefficient'",
        ),
        ({"intervention": [{"sites": "writes", "form": "x"}]}, "'intervention.0.form': did you mean 'from'?"),
        ({"prompts": {"train": {"pth": "x"}}}, "unknown key 'prompts.train.pth': did you mean 'path'?"),
        ({"intervention": {"name": "add"}}, "'intervention.sites': is missing"),
        ({"model": None}, "'model': is missing"),
        ({"intervention": {"sites": "writes", "coefficient": "much"}}, "'intervention.coefficient': .* not 'much'"),
        ({"intervention": {"sites": "writes", "units": "doze"}}, "'scale', 'unit' or 'dose', not 'doze'"),
        ({"validate": {"decode_tokens": 0}}, "'validate.decode_tokens': .* greater than 0, not 0"),
        ({"estimator": None}, "a direction is needed"),
        ({"direction": {"load": "v.safetensors"}}, "either 'estimator' or 'direction', not both"),
        ({"estimator": {"positive": "a", "negative": "a"}}, "both 'a'"),
        ({"evaluate": {"sets": ["tset"]}}, "no prompt set 'tset' under 'prompts': did you mean 'test'?"),
        ({"prompts": {"train": "t.jsonl", "test": "t.jsonl", "safety/x": "y"}}, "needs another name"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence.replace("?", r"\?")):
        parse(text(**changes))


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"'promts'.*'saftey'"):
        parse(text(promts={}, saftey=True))


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just words"])
def test_a_recipe_that_is_no_mapping_is_refused(content: str) -> None:
    with pytest.raises(RecipeError, match="must be a mapping"):
        parse(content)


def test_broken_yaml_is_one_sentence() -> None:
    with pytest.raises(RecipeError, match="is not YAML") as raised:
        parse("model: [a\nb: c")
    assert "\n" not in str(raised.value)


def test_a_recipe_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# why\n" + text(), encoding="utf-8")
    assert read(path)[1].startswith("# why\n")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_an_unreadable_recipe_is_refused(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read(tmp_path / "recipe.yaml")
