"""Intervals and comparisons, against published values and against brute force."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from steer_bake.evaluate import answers, compare, paired_interval, wilson
from steer_bake.models import load_model, load_tokenizer
from steer_bake.prompts import Prompt


def test_wilson_interval_has_its_textbook_value() -> None:
    share = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (share.low, share.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20).low == pytest.approx(0.0, abs=1e-12)
    assert wilson(20, 20).high == pytest.approx(1.0, abs=1e-12)


def test_paired_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    source, covered, runs, size = random.Random(0), 0, 2000, 40
    for _ in range(runs):
        pairs = [source.choices([(0, 0), (0, 1), (1, 0), (1, 1)], [0.3, 0.4, 0.1, 0.2])[0] for _ in range(size)]
        low, high = paired_interval(pairs.count((0, 1)), pairs.count((1, 0)), size)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / runs <= 0.98  # nominal 0.95; three standard errors of the simulation are 0.015


def test_compare_counts_labels_pairwise() -> None:
    row = compare(
        "test", "refusal", ["refusal", "refusal", "answer", "answer"], ["answer", "answer", "answer", "refusal"]
    )
    assert (row.base.hits, row.baked.hits, row.difference) == (2, 1, -0.25)
    assert row.low < -0.25 < row.high
    assert row.labels == {"answer": (2, 3), "refusal": (2, 1)}


def test_answers_do_not_depend_on_the_batch(llama: Path) -> None:
    model, tokenizer = load_model(llama, dtype="float32"), load_tokenizer(llama)
    prompts = [Prompt(messages=(("user", "x" * length),)) for length in (1, 30, 4, 17, 9)]
    together = answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=5)
    assert together == answers(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)
    assert len(set(together)) > 1
