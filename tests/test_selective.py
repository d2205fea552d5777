"""The flagship's material: recipes that are read, and a script that keeps no harmful answer."""

from __future__ import annotations

import json
from collections import Counter
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_bake import recipe
from steer_bake.models import load_model, load_tokenizer
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


@pytest.mark.parametrize(
    "name", ["selective-refusal", "topic-refusal", "refusal-steering", "refusal-control", "safesteer"]
)
def test_recipes_use_no_test_prompt(name: str) -> None:
    found, _ = recipe.read(ROOT / "recipes" / f"{name}.yaml")
    texts = {row["text"] for row in split("test")}
    for prompts in found.prompts.values():
        assert not texts & {one.question for one in prompts.load(ROOT / "recipes")}


def test_plain_texts_are_of_many_kinds_in_both_splits_and_not_those_that_damage_is_measured_on() -> None:
    found = rows(ROOT / "recipes" / "prompts" / "selective" / "texts.jsonl")
    for name, least in (("train", 80), ("validation", 30)):
        kinds = Counter(row["category"] for row in found if row["split"] == name)
        assert len(kinds) >= 15
        assert kinds.total() >= least
    measured = {row["text"] for row in rows(PACKAGED / "damage" / "prose.jsonl")}
    assert not measured & {row["text"] for row in found}
    assert len({row["text"] for row in found}) == len(found)


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


@pytest.mark.parametrize("texts", [["Hi."], ["Hi.", "Hi."], ["Hi.", "What is the time of day?", "Go"]])
def test_running_a_shared_beginning_once_changes_no_answer(script: Any, llama: Path, texts: list[str]) -> None:
    model, tokenizer = load_model(llama, dtype="float32"), load_tokenizer(llama)  # in bfloat16 tokens would tie
    rows = [script.chat(tokenizer, text) for text in texts]
    with torch.inference_mode():
        found = script.greedy(model, tokenizer, rows, 6)
        for row, answer in zip(rows, found, strict=True):
            alone = model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False)[0, len(row) :].tolist()
            assert answer[: len(alone)] == alone


def test_an_incoherent_answer_is_no_success_on_either_side(script: Any) -> None:
    before = ["refusal"] * 4
    after = ["answer", "incoherent", "refusal", "answer"]
    assert script.against(before, after, counts_as_refusal=True)["ratio"] == 0.5
    assert script.against(before, after, counts_as_refusal=False)["ratio"] == 0.25


def test_what_the_recipes_own_is_compared_with_answers_every_third_prompt_of_each_kind(script: Any) -> None:
    asked = script.questions("test", None)
    assert script.put_to("gated", asked) == script.put_to("base", asked) == asked
    thirds = Counter(row["label"] for row in script.put_to("constant", asked))
    assert thirds == {group: count // 3 for group, count in Counter(row["label"] for row in asked).items()}


def test_intervals_are_paired(script: Any) -> None:
    """Both models refuse the same half of the prompts: their ratio is 1 however the prompts are drawn."""
    labels = ["refusal", "answer"] * 20
    found = script.against(labels, labels, counts_as_refusal=False)
    assert found == {"ratio": 1.0, "interval": [1.0, 1.0]}


def test_the_distance_of_two_models_is_that_of_each_answer_alone(script: Any, llama: Path) -> None:
    """Batches and a beginning that is run once change nothing: 1e-5 is float32 rounding of log-probabilities."""
    model, tokenizer = load_model(llama, dtype="float32"), load_tokenizer(llama)
    texts = [(script.chat(tokenizer, text), [5, 6, 7][:count]) for text, count in (("Hi.", 3), ("Go away", 1))]
    for (prompt, answer), found in zip(texts, script.after(model, texts), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(found, logits.log_softmax(-1), atol=1e-5)
