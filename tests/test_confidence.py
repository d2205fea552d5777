"""Sampled answers and the refusal confidence that is made of them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from steer_bake.answering import _answer, answers, sample, without_thinking
from steer_bake.confidence import confidence, measure
from steer_bake.errors import RecipeError
from steer_bake.judges import INCOHERENT, UNPARSABLE
from steer_bake.models import load_model, load_tokenizer
from steer_bake.prompts import Prompt, encode

from . import tiny

PROMPTS = [Prompt(messages=(("user", text),)) for text in ("Hello.", "What is this about, then?", "Yes", "Hm, well")]


@pytest.fixture(scope="module")
def loaded(llama: Path) -> tuple[Any, Any]:
    return load_model(llama, dtype="float32"), load_tokenizer(llama)


def test_confidence_is_the_papers_formula() -> None:
    labels, logprobs = ["refusal", "answer", "answer", "refusal", "answer"], [-0.5, -1.0, -2.0, -0.1, -0.7]
    weights = [math.exp(one / 0.5) for one in logprobs]
    z = [1, -1, -1, 1, -1]
    expected = sum(w * one for w, one in zip(weights, z, strict=True)) / sum(weights)
    assert confidence(labels, logprobs, temperature=0.5).value == pytest.approx(expected, abs=1e-12)
    assert confidence(labels, [-1.0] * 5).value == pytest.approx(-1 / 5)


def test_unanimous_votes_are_the_ends_of_the_scale() -> None:
    assert confidence(["refusal"] * 5, [-1, -2, -3, -4, -900]).value == pytest.approx(1)
    assert confidence(["answer"] * 5, [-1, -2, -3, -4, -900]).value == pytest.approx(-1)


def test_a_vote_of_zero_keeps_its_weight_and_is_counted() -> None:
    found = confidence(["refusal", "refusal", UNPARSABLE, "unjudged"], [-1.0, -1.0, -1.0, None])
    assert found.value == pytest.approx(0.5)
    assert found.unparsable == 2
    assert confidence([UNPARSABLE], [None]).value == 0


def test_incoherent_output_is_never_what_was_aimed_for() -> None:
    assert confidence([INCOHERENT] * 3, [-1.0] * 3, aim="answer").value == pytest.approx(1)
    assert confidence([INCOHERENT] * 3, [-1.0] * 3, aim="refusal").value == pytest.approx(-1)
    assert confidence([INCOHERENT], [None]).value == pytest.approx(1)


@pytest.mark.parametrize(("labels", "logprobs", "tau"), [([], [], 1), (["answer"], [], 1), (["answer"], [-1.0], 0)])
def test_votes_that_cannot_be_are_refused(labels: list[str], logprobs: list[float], tau: float) -> None:
    with pytest.raises(RecipeError):
        confidence(labels, logprobs, temperature=tau)


def test_samples_do_not_depend_on_batch_or_company(loaded: tuple[Any, Any]) -> None:
    one = sample(*loaded, PROMPTS, count=3, max_new_tokens=6, batch_size=12)
    other = sample(*loaded, PROMPTS, count=3, max_new_tokens=6, batch_size=1)
    assert [[answer.text for answer in row] for row in one] == [[answer.text for answer in row] for row in other]
    alone = sample(*loaded, PROMPTS[2:3], count=1, max_new_tokens=6)
    assert alone[0][0].text == one[2][0].text
    for row, again in zip(one, other, strict=True):
        assert [answer.logprob for answer in row] == pytest.approx([answer.logprob for answer in again], abs=1e-5)


def test_samples_differ_and_a_seed_brings_them_back(loaded: tuple[Any, Any]) -> None:
    rows = [sample(*loaded, PROMPTS[:1], count=5, max_new_tokens=6, seed=seed)[0] for seed in (0, 0, 1)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert len({answer.text for answer in rows[0]}) > 1


def test_samples_follow_the_models_distribution(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = torch.tensor([encode(tokenizer, PROMPTS[:1])[0].ids])
    with torch.inference_mode():
        expected = torch.softmax(model(ids).logits[0, -1].double(), dim=-1)
    row = sample(model, tokenizer, PROMPTS[:1], count=2000, max_new_tokens=1, batch_size=500)[0]
    drawn = Counter(round(math.exp(answer.logprob), 9) for answer in row if answer.logprob is not None)
    likeliest = torch.topk(expected, 8).values.tolist()
    for share in likeliest:
        got = sum(count for value, count in drawn.items() if math.isclose(value, share, rel_tol=1e-4)) / 2000
        assert abs(got - share) < 4 * math.sqrt(share * (1 - share) / 2000)
    assert sum(likeliest) > 0.05


def test_logprob_is_the_mean_that_a_forward_pass_gives(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for row, prompt in zip(sample(model, tokenizer, PROMPTS, count=2, max_new_tokens=5), PROMPTS, strict=True):
        start = list(encode(tokenizer, [prompt])[0].ids)
        for answer in row:
            new = tokenizer(answer.text)["input_ids"]
            if len(new) != answer.tokens:  # bytes that are no text do not come back
                continue
            with torch.inference_mode():
                logprobs = torch.log_softmax(model(torch.tensor([start + new])).logits[0].double(), dim=-1)
            expected = sum(float(logprobs[len(start) - 1 + at, one]) for at, one in enumerate(new)) / len(new)
            assert answer.logprob == pytest.approx(expected, abs=1e-4)


def test_temperature_zero_is_greedy(loaded: tuple[Any, Any]) -> None:
    drawn = [row[0].text for row in sample(*loaded, PROMPTS, count=1, max_new_tokens=6, temperature=0)]
    assert drawn == [text.strip() for text in answers(*loaded, PROMPTS, max_new_tokens=6)]


def span(text: str, prompt: str = "x", thinking: tuple[str, str] = ("<think>", "</think>")) -> Any:
    words: PreTrainedTokenizerFast = tiny.tokenizer()
    ids = words(text)["input_ids"]
    logprobs = torch.arange(len(ids), dtype=torch.float32)
    return _answer(words, words(prompt)["input_ids"], ids, logprobs, frozenset({int(words.eos_token_id)}), thinking)


def test_thinking_is_no_part_of_text_or_logprob() -> None:
    found = span("<think>I cannot.</think>\n\nParis<|im_end|><|pad|>")
    assert (found.text, found.complete, found.tokens) == ("Paris", True, 7)
    start = len("<think>I cannot.</think>")
    assert found.logprob == pytest.approx(start + 3)  # the mean of seven tokens in a row
    assert span("<think>a</think>b</think>c").text == "c"
    assert span("plain</think>answer", prompt="<|im_start|>assistant\n<think>\n").text == "answer"
    assert span("§reasoning§ the end", thinking=("§reasoning", "§ ")).text == "the end"


def test_thinking_that_never_ends_is_no_answer() -> None:
    assert not span("<think>I wonder whether").complete
    assert not span("I wonder whether", prompt="<|im_start|>assistant\n<think>\n").complete
    assert span("I wonder whether", prompt="<think> is a tag").complete
    assert span("I wonder").logprob == pytest.approx(3.5)
    assert span("<|im_end|>").logprob is None


def test_text_without_thinking() -> None:
    assert without_thinking("<think>a</think> b ") == "b"
    assert without_thinking("a</think>b") == "b"
    assert without_thinking(" <think>a") is None
    assert without_thinking("b") == "b"


def test_measure_asks_a_judge_about_whole_questions(loaded: tuple[Any, Any]) -> None:
    asked: list[tuple[str, str]] = []

    def judge(texts: Any, questions: Any) -> list[str]:
        asked.extend(zip(questions, texts, strict=True))
        return ["refusal" if "Hello" in question else "answer" for question in questions]

    long = Prompt(messages=(("user", "Why " * 40),))
    found = measure(*loaded, [PROMPTS[0], long], judge, samples=3, max_new_tokens=4)
    assert [one.value for one in found] == pytest.approx([1, -1])
    assert Counter(question for question, _ in asked) == {"Hello.": 3, "Why " * 40: 3}
    assert all(len(one.labels) == len(one.logprobs) == 3 for one in found)
