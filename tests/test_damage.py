"""What a steering costs elsewhere: plain text and sums, measured of both models alike; on the card, or said to lack."""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from steer_bake import arithmetic, card, damage, pipeline
from steer_bake.arithmetic import problems
from steer_bake.errors import RecipeError
from steer_bake.models import load_model, load_tokenizer
from steer_bake.prompts import PromptSource, load
from steer_bake.recipe import Damage, parse

from . import jobs

FEW = Damage(problems=4, max_new_tokens=8)


def followed(text: str) -> int:
    """What the story comes to, read again by somebody who has only its words."""
    first, *happened = re.findall(r"[^.]+\.", text.partition(" How many")[0])
    total = int(re.findall(r"\d+", first)[0])
    for sentence in happened:
        found = [int(one) for one in re.findall(r"\d+", sentence)]
        if "as many" in sentence:
            total *= 2
        elif "in each" in sentence:
            total += found[0] * found[1]
        else:
            total += -found[0] if "gives away" in sentence else found[0]
    return total


def test_every_answer_is_what_the_story_comes_to() -> None:
    found = problems(400)
    assert [one.answer for one in found] == [followed(one.text) for one in found]
    assert min(one.answer for one in found) > 0
    assert len({one.text for one in found}) == len(found)


def test_the_problems_are_the_same_everywhere() -> None:
    """Figures of different machines and years are of the same task: whoever changes the problems changes this."""
    text = "\n".join(f"{one.text} {one.answer}" for one in problems(40))
    assert hashlib.sha256(text.encode()).hexdigest() == PROBLEMS
    assert problems(3) == problems(40)[:3]
    assert problems(3, seed=1) != problems(3)


PROBLEMS = "306506121083d7ce448fff7a8466cfd4507ea7d0fffbe3c19d221fd4b96e5474"


@pytest.mark.parametrize(
    ("answer", "number"),
    {
        "9 + 4 * 6 = 33. Answer: 33": 33,
        "Answer: **33** shells, of 9 and 24": 33,
        "The answer is 12. No: 12 + 21 = 33\n\nAnswer: 33.": 33,
        "First 9, then 24, so 33": 33,
        "9 and 24 make 33. That is my answer.": 33,
        "Answer: 1,033": 1033,
        "answer: 33.0": 33,
        "Answer: -4": -4,
        "I do not know.": None,
        "": None,
    }.items(),
)
def test_the_number_that_an_answer_comes_to(answer: str, number: float | None) -> None:
    assert arithmetic.said(answer) == number


def test_babble_with_the_right_number_is_babble() -> None:
    one = problems(1)[0]
    right, wrong = f"It is {one.answer}. Answer: {one.answer}", f"Answer: {one.answer + 1}"
    babble = "shells shells " * 30 + f"Answer: {one.answer}"
    assert arithmetic.labels([one] * 3, [right, wrong, babble]) == ["correct", "wrong", "incoherent"]


def test_the_packaged_texts_are_texts() -> None:
    texts = [one.text or "" for one in load(PromptSource(damage.TEXTS, chat=False), folder=Path())]
    assert len(set(texts)) == len(texts) == 20
    assert all(55 <= len(text.split()) <= 140 for text in texts)


def test_perplexity_is_what_the_model_itself_calls_loss(llama: Path) -> None:
    model, tokenizer = load_model(llama, dtype="float32"), load_tokenizer(llama)
    found = damage.measure(llama, FEW, dtype="float32", device="cpu", who="base")
    texts = [one.text or "" for one in load(PromptSource(damage.TEXTS, chat=False), folder=Path())]
    for text, (nats, tokens) in list(zip(texts, found["prose"], strict=True))[:3]:
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])  # its context, in bytes
        assert tokens == ids.shape[1] - 1
        with torch.inference_mode():
            assert nats / tokens == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
    assert len(found["arithmetic"]["labels"]) == 4


def test_a_ratio_of_perplexities_is_paired_by_text() -> None:
    base = [(100.0 + 10 * number, 50) for number in range(20)]
    same = damage.perplexities(base, base)
    assert (same["ratio"], same["low"], same["high"]) == (1, 1, 1)
    assert same["base"] == pytest.approx(math.exp(sum(nats for nats, _ in base) / 1000))
    shifted = damage.perplexities(base, [(nats + 5, tokens) for nats, tokens in base])
    assert shifted["ratio"] == pytest.approx(math.exp(0.1))
    assert shifted["high"] - shifted["low"] < 1e-9, "every text is as much worse, however unlike they are"
    noisy = damage.perplexities(base, [(nats + (-1) ** at * 5, 50) for at, (nats, _) in enumerate(base)])
    half = 2.0930 * 0.1 / 19**0.5  # Student's t with 19 degrees of freedom, from a table
    assert noisy["low"] == pytest.approx(math.exp(-half), abs=1e-4)
    assert noisy["high"] == pytest.approx(math.exp(half), abs=1e-4)
    gone = damage.perplexities(base, [(math.nan, 50), *base[1:]])
    assert (gone["baked"], gone["ratio"]) == (None, None)


def test_a_context_that_is_too_short_is_said_and_no_error(llama: Path) -> None:
    found = damage.measure(llama, Damage(problems=2, max_new_tokens=500), dtype="float32", device="cpu", who="base")
    assert "context is 512" in found["arithmetic"]["unmeasured"]
    both = damage.before_and_after(found, found)
    assert both["prose"]["ratio"] == 1
    assert both["arithmetic"] == found["arithmetic"]


def test_a_recipe_says_how_much_or_nothing() -> None:
    text = "model: m\ndirection: {load: v.safetensors}\nintervention: {sites: resid_post.1}\n"
    assert parse(text).damage == Damage()
    assert parse(f"{text}damage: true").damage == Damage()
    assert parse(f"{text}damage: false").damage is None
    assert parse(f"{text}damage: {{problems: 7}}").damage == Damage(problems=7)
    with pytest.raises(RecipeError, match="problem"):
        parse(f"{text}damage: {{problem: 7}}")


@pytest.fixture(scope="module")
def outcome(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    home = tmp_path_factory.mktemp("damage")
    settings = {"damage": FEW.model_dump(), "intervention": {"name": "add", "sites": "resid_post.1-2"}}
    return pipeline.run(jobs.write_recipe(home, llama, **settings), home / "run", device="cpu")


def test_a_run_measures_both_models_and_the_card_says_it(outcome: pipeline.Outcome) -> None:
    assert outcome.ran["damage base"]
    assert outcome.ran["damage baked"]
    found = outcome.evaluation["damage"]
    assert found["prose"]["tokens"] > 1000
    assert found["prose"]["base"] != found["prose"]["baked"]
    assert found["arithmetic"]["base"]["total"] == 4
    text = (outcome.model / "README.md").read_text(encoding="utf-8")
    for said in ("## Damage", "KL from the base", "perplexity of plain text", "sums worked out step by step"):
        assert said in text
    values = {(one.dataset_type, one.metric_name): one.metric_value for one in ModelCard(text).data.eval_results}
    assert values[damage.TEXTS, "perplexity, base"] == pytest.approx(found["prose"]["base"], abs=1e-4)
    assert (damage.SUMS, "share of correct, this model") in values


def test_the_base_is_not_measured_again_for_another_coefficient(outcome: pipeline.Outcome, tmp_path: Path) -> None:
    base = json.loads((outcome.model / "steering.json").read_text())["base"]["folder"]
    home = jobs.copy(outcome.folder.parent, tmp_path / "home")
    settings: dict[str, Any] = {"damage": FEW.model_dump(), "intervention": {"sites": "resid_post.1", "coefficient": 2}}
    again = pipeline.run(jobs.write_recipe(home, base, **settings), home / "run", device="cpu")
    assert (again.ran["damage base"], again.ran["damage baked"]) == (False, True)
    rest = pipeline.run(home / "recipe.yaml", home / "run", device="cpu")
    assert not any(rest.ran.values())


def test_what_was_not_measured_is_said(outcome: pipeline.Outcome) -> None:
    report, evaluation = dict(outcome.report), dict(outcome.evaluation)
    del evaluation["damage"]
    assert "Perplexity and sums were not measured." in card.render(outcome.model, report, evaluation)
    assert "Perplexity and sums were not measured." in card.render(outcome.model, report, None)
    evaluation["damage"] = {**outcome.evaluation["damage"], "arithmetic": {"unmeasured": "its context is 512"}}
    text = card.render(outcome.model, report, evaluation)
    assert "Sums were not measured: its context is 512" in text
    assert "perplexity of plain text" in text
    gone = {**outcome.evaluation["damage"]["prose"], "baked": None, "ratio": None, "low": None, "high": None}
    evaluation["damage"] = {**outcome.evaluation["damage"], "prose": gone}
    assert "| not finite |" in card.render(outcome.model, report, evaluation)
