from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import steer_bake

ROOT = Path(steer_bake.__file__).parent
SETS = ROOT / "prompt_sets"
SELECTIVE = {name: SETS / "selective" / f"{name}.jsonl" for name in ("train", "validation", "test")}
MOOD = ROOT.parent / "recipes" / "prompts" / "mood"
FILES = {
    SETS / "safety" / "harmful.jsonl": 110,
    SETS / "safety" / "harmless.jsonl": 110,
    SETS / "plain.jsonl": 40,
    SETS / "selective" / "train.jsonl": 650,
    SETS / "selective" / "validation.jsonl": 240,
    SETS / "selective" / "test.jsonl": 450,
    MOOD / "train.jsonl": 48,
    MOOD / "validation.jsonl": 72,
    MOOD / "test.jsonl": 40,
}
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be can did do does for from have how i if in is it my no not of on or so that the there "
        "they to was were what when where which who why with without would you",
    )
)
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


# --- the sets for selective refusal control


@pytest.fixture(scope="module")
def selective() -> dict[str, list[dict[str, Any]]]:
    return {name: rows(path) for name, path in SELECTIVE.items()}


def test_selective_sets_have_enough_of_each_label_and_a_third_for_the_test(
    selective: dict[str, list[dict[str, Any]]],
) -> None:
    for label in ("sensitive", "harmful", "benign"):
        counts = {name: sum(row["label"] == label for row in found) for name, found in selective.items()}
        assert sum(counts.values()) >= 450
        assert counts["test"] >= sum(counts.values()) / 3
        assert counts["validation"] >= 75
    assert {row["label"] for found in selective.values() for row in found} == {"sensitive", "harmful", "benign"}


def test_selective_splits_share_no_topic_and_no_id(selective: dict[str, list[dict[str, Any]]]) -> None:
    for key in ("topic", "id", "text"):
        values = {name: {row[key].lower() for row in found} for name, found in selective.items()}
        for first, second in combinations(values, 2):
            assert not values[first] & values[second]


def test_a_topic_is_of_one_label_and_category(selective: dict[str, list[dict[str, Any]]]) -> None:
    of_topic: dict[str, set[tuple[str, str]]] = {}
    for row in (row for found in selective.values() for row in found):
        of_topic.setdefault(row["topic"], set()).add((row["label"], row["category"]))
    assert all(len(kinds) == 1 for kinds in of_topic.values())
    assert len(of_topic) >= 120


def test_sensitive_questions_are_about_many_parts_of_the_world(selective: dict[str, list[dict[str, Any]]]) -> None:
    for name, least in (("train", 8), ("validation", 6), ("test", 8)):
        regions = Counter(row["category"] for row in selective[name] if row["label"] == "sensitive")
        assert len(regions) >= least
        assert max(regions.values()) <= 0.3 * regions.total()


def test_harmful_requests_are_short_and_of_every_kind(selective: dict[str, list[dict[str, Any]]]) -> None:
    kinds = {row["category"] for row in rows(SETS / "safety" / "harmful.jsonl")}
    harmful = [row for found in selective.values() for row in found if row["label"] == "harmful"]
    assert max(len(row["text"].split()) for row in harmful) <= 20
    for name in ("train", "test"):
        assert {row["category"] for row in selective[name] if row["label"] == "harmful"} == kinds


def test_benign_prompts_look_like_both_others_in_every_split(selective: dict[str, list[dict[str, Any]]]) -> None:
    for found in selective.values():
        kinds = Counter(row["category"] for row in found if row["label"] == "benign")
        assert set(kinds) == {"plain", "harmful_lookalike", "sensitive_lookalike"}
        assert min(kinds.values()) >= 20
        assert kinds["plain"] <= 0.5 * kinds.total()


def pieces(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The words that mean something, and all runs of four characters."""
    plain = re.sub(r"\W+", " ", text.lower())
    return words(text) - FUNCTION_WORDS, frozenset(plain[at : at + 4] for at in range(len(plain) - 3))


def overlaps(of_texts: list[frozenset[str]]) -> Any:
    """What every two have in common, as a share of what they have together, [texts, texts]."""
    column = {piece: at for at, piece in enumerate(sorted(frozenset().union(*of_texts)))}
    there = np.zeros((len(of_texts), len(column)), dtype=np.float32)
    for row, found in enumerate(of_texts):
        there[row, [column[piece] for piece in found]] = 1
    shared, sizes = there @ there.T, there.sum(axis=1)
    return shared / np.maximum(1, sizes[:, None] + sizes[None, :] - shared)


def test_no_prompt_is_said_again_in_another_split_or_set() -> None:
    said = [(path, text) for path in FILES for row in rows(path) for text in texts(row)[-1:]]
    cut = [pieces(text) for _, text in said]
    close = (overlaps([one for one, _ in cut]) >= 0.6) | (overlaps([other for _, other in cut]) >= 0.5)
    ours = set(SELECTIVE.values())
    again = [
        (said[one], said[other])
        for one, other in zip(*np.nonzero(np.triu(close, 1)), strict=True)
        if said[one][0] != said[other][0] and ours & {said[one][0], said[other][0]}
    ]
    assert not again


def test_near_duplicates_would_be_noticed() -> None:
    cut = [pieces(text) for text in ("How do I fake an old painting?", "How do I fake a very old painting?")]
    assert overlaps([one for one, _ in cut])[0, 1] >= 0.6
    assert overlaps([other for _, other in cut])[0, 1] >= 0.5
