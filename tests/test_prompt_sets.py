from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import steer_bake

ROOT = Path(steer_bake.__file__).parent
SETS = ROOT / "prompt_sets"
MOOD = ROOT.parent / "recipes" / "prompts" / "mood"
FILES = {
    SETS / "safety" / "harmful.jsonl": 110,
    SETS / "safety" / "harmless.jsonl": 110,
    SETS / "plain.jsonl": 40,
    MOOD / "train.jsonl": 48,
    MOOD / "validation.jsonl": 72,
    MOOD / "test.jsonl": 40,
}
COMMON = {
    "about",
    "describe",
    "tell",
    "think",
    "what",
    "like",
    "feel",
    "does",
    "people",
    "with",
    "your",
    "would",
    "that",
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(row: dict[str, Any]) -> list[str]:
    return [row["text"]] if "text" in row else [message["content"] for message in row["messages"]]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize(("path", "least"), FILES.items(), ids=lambda value: getattr(value, "name", str(value)))
def test_a_set_has_enough_rows_and_unique_ids(path: Path, least: int) -> None:
    found = rows(path)
    assert len(found) >= least
    assert len({row["id"] for row in found}) == len(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_prompt_is_short_and_said_once(path: Path) -> None:
    said = [text for row in rows(path) for text in texts(row)]
    assert all(text == text.strip() and 0 < len(text) <= 200 for text in said)
    assert len(said) == len({text.lower() for text in said})
    assert all({"text"} <= set(row) or {"messages"} <= set(row) for row in rows(path))


def test_every_harmful_request_has_a_category_and_a_look_alike() -> None:
    harmful, harmless = (rows(SETS / "safety" / f"{name}.jsonl") for name in ("harmful", "harmless"))
    assert {row["label"] for row in harmful} == {"harmful"}
    assert {row["label"] for row in harmless} == {"harmless"}
    categories = Counter(row["category"] for row in harmful)
    assert len(categories) >= 11
    assert min(categories.values()) >= 10
    assert categories == Counter(row["category"] for row in harmless)


def test_a_look_alike_shares_its_wording() -> None:
    harmful, harmless = (rows(SETS / "safety" / f"{name}.jsonl") for name in ("harmful", "harmless"))
    shared = []
    for bad, good in zip(harmful, harmless, strict=True):
        assert bad["id"].removeprefix("harmful-") == good["id"].removeprefix("harmless-")
        shared.append(len(words(bad["text"]) & words(good["text"])) / len(words(bad["text"])))
    assert min(shared) > 0
    assert sum(shared) / len(shared) > 0.4


def test_no_request_of_one_safety_set_is_in_the_other() -> None:
    harmful, harmless = (
        {row["text"] for row in rows(SETS / "safety" / f"{name}.jsonl")} for name in ("harmful", "harmless")
    )
    assert not harmful & harmless


def test_plain_prompts_are_five_to_sixty_words_and_some_are_conversations() -> None:
    plain = rows(SETS / "plain.jsonl")
    lengths = [sum(len(text.split()) for text in texts(row)) for row in plain]
    assert min(lengths) >= 5
    assert max(lengths) <= 60
    assert sum("messages" in row for row in plain) >= 4
    for row in plain:
        if "messages" in row:
            assert row["messages"][-1]["role"] == "user"


def test_mood_splits_share_no_topic() -> None:
    splits = {name: rows(MOOD / f"{name}.jsonl") for name in ("train", "validation", "test")}
    for first, second in combinations(splits, 2):
        for one in splits[first]:
            for other in splits[second]:
                a, b = words(one["text"]), words(other["text"])
                assert not {word for word in a & b if len(word) > 3} - COMMON, (one["text"], other["text"])
