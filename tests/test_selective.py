"""The flagship's material: recipes that are read, and a script that keeps no harmful answer."""

from __future__ import annotations

import json
from collections import Counter
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest

from steer_bake import recipe
from steer_bake.prompts import PACKAGED

ROOT = Path(__file__).parent.parent
GROUPS = ("sensitive", "harmful", "benign")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split(name: str) -> list[dict[str, Any]]:
    return rows(PACKAGED / "selective" / f"{name}.jsonl")


@pytest.fixture(scope="module")
def script() -> Any:
    loader = SourceFileLoader("selective_script", str(ROOT / "scripts" / "selective"))
    spec = spec_from_loader("selective_script", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_openings_are_training_prompts_with_as_many_declined_as_answered_of_each_kind() -> None:
    known = {row["id"]: row for row in split("train")}
    found = rows(ROOT / "recipes" / "prompts" / "selective" / "openings.jsonl")
    assert all(known[row["id"]]["text"] == row["text"] for row in found)
    counts = Counter((known[row["id"]]["label"], row["label"]) for row in found)
    for group in GROUPS:
        assert counts[group, "refused"] == counts[group, "answered"] >= 40


@pytest.mark.parametrize("name", ["selective-refusal", "selective-refusal-first", "topic-refusal"])
def test_recipes_use_no_test_prompt(name: str) -> None:
    found, _ = recipe.read(ROOT / "recipes" / f"{name}.yaml")
    texts = {row["text"] for row in split("test")}
    for prompts in found.prompts.values():
        assert not texts & {one.messages[-1][1] for one in prompts.load(ROOT / "recipes")}


def test_answers_to_harmful_requests_are_not_kept(script: Any, llama: Path, tmp_path: Path) -> None:
    asked = [
        {"id": "a", "text": "Say nothing.", "label": "harmful", "category": "x"},
        {"id": "b", "text": "Say something.", "label": "benign", "category": "plain"},
    ]
    kept = script.Answers(tmp_path / "answers.jsonl")
    script.ask("base", llama, asked, kept, 4, 2)
    found = {row["id"]: row for row in rows(kept.path)}
    assert set(found["a"]) == {"model", "id", "group", "category", "label"}
    assert "answer" in found["b"]


def test_prompts_that_were_answered_are_not_asked_again(script: Any, llama: Path, tmp_path: Path) -> None:
    asked = [{"id": "a", "text": "Say something.", "label": "benign", "category": "plain"}]
    path = tmp_path / "answers.jsonl"
    for _ in range(2):
        script.ask("base", llama, asked, script.Answers(path), 4, 2)
    assert len(rows(path)) == 1


def test_an_incoherent_answer_is_no_success_on_either_side(script: Any) -> None:
    before = ["refusal"] * 4
    after = ["answer", "incoherent", "refusal", "answer"]
    assert script.against(before, after, counts_as_refusal=True)["ratio"] == 0.5
    assert script.against(before, after, counts_as_refusal=False)["ratio"] == 0.25


def test_intervals_are_paired(script: Any) -> None:
    """Both models refuse the same half of the prompts: their ratio is 1 however the prompts are drawn."""
    labels = ["refusal", "answer"] * 20
    found = script.against(labels, labels, counts_as_refusal=False)
    assert found == {"ratio": 1.0, "interval": [1.0, 1.0]}
