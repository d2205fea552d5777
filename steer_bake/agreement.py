"""How well a judge agrees with people: accuracy and Cohen's kappa against a labelled file, with intervals.

A labelled file is JSONL, one object a line: ``answer`` (what was judged), ``label`` (what a person says it is) and,
where the judge needs it, ``prompt`` (the question). ``id`` and ``note`` may be there; other keys are errors.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import RecipeError, did_you_mean
from .evaluate import Share, wilson
from .judges import Judge

_KEYS = ("answer", "label", "prompt", "id", "note")


@dataclass(frozen=True)
class Labelled:
    """One row of a labelled file."""

    answer: str
    label: str
    prompt: str | None
    name: str  # its id, or the number of its line


@dataclass(frozen=True)
class Agreement:
    """Labels by people against labels by a judge."""

    accuracy: Share  # with Wilson's 95 % interval
    kappa: float | None  # None where both gave one and the same label throughout
    kappa_low: float | None
    kappa_high: float | None
    labels: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]  # [people's label][judge's label], in the order of ``labels``
    recall: dict[str, Share]  # of the answers that people gave a label, those that the judge gave the same
    precision: dict[str, Share]  # of the answers that the judge gave a label, those that people gave the same
    disagreements: tuple[tuple[str, str, str], ...]  # (name, people's label, judge's label)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_labelled(path: Path) -> list[Labelled]:
    """The rows of a labelled file.

    Raises:
        RecipeError: the file cannot be read, is empty, or a row is malformed (named by its line).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the labelled file {path} cannot be read as UTF-8 text: {error}") from error
    rows = [_row(line, f"{path}, line {number}", number) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise RecipeError(f'the labelled file {path} is empty; each line is like {{"answer": ..., "label": ...}}')
    return rows


def _row(line: str, where: str, number: int) -> Labelled:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{where}: not JSON ({error.msg})") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{where}: a row is an object with an answer and a label")
    for key in row:
        if key not in _KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}: {did_you_mean(key, _KEYS)}")
    for key in ("answer", "label"):
        if not isinstance(row.get(key), str):
            raise RecipeError(f"{where}: {key!r} is missing or is no text")
    if not isinstance(row.get("prompt"), str | None):
        raise RecipeError(f"{where}: 'prompt' is no text")
    return Labelled(row["answer"], row["label"], row.get("prompt"), str(row.get("id", number)))


def agree(rows: Sequence[Labelled], judge: Judge) -> Agreement:
    """Have ``judge`` label the answers of ``rows`` and compare (raises what the judge raises)."""
    prompts = [row.prompt for row in rows]
    known = [prompt for prompt in prompts if prompt is not None]
    given = judge([row.answer for row in rows], known if len(known) == len(rows) else None)
    return compare_labels([row.label for row in rows], given, [row.name for row in rows])


def compare_labels(people: Sequence[str], judge: Sequence[str], names: Sequence[str]) -> Agreement:
    """Two labellings of the same answers, ``names[i]`` naming the i-th."""
    pairs = Counter(zip(people, judge, strict=True))
    labels = tuple(sorted({*people, *judge}))
    right = sum(pairs[one, one] for one in labels)
    accuracy = wilson(right, len(people))
    by_people, by_judge = Counter(people), Counter(judge)
    kappa = _kappa(accuracy, by_people, by_judge)
    return Agreement(
        accuracy, *kappa, labels,
        tuple(tuple(pairs[row, column] for column in labels) for row in labels),
        {one: wilson(pairs[one, one], by_people[one]) for one in labels if by_people[one]},
        {one: wilson(pairs[one, one], by_judge[one]) for one in labels if by_judge[one]},
        tuple(
            (name, one, other) for name, one, other in zip(names, people, judge, strict=True) if one != other
        ),
    )  # fmt: skip


def _kappa(
    accuracy: Share, by_people: Counter[str], by_judge: Counter[str]
) -> tuple[float | None, float | None, float | None]:
    """Cohen's kappa, (p_o - p_e) / (1 - p_e), with a 95 % interval (Cohen 1960).

    As Cohen's own interval it takes the chance agreement p_e as given; that of p_o is Wilson's, which stays wider than
    a point when every label agrees.
    """
    chance = sum(count * by_judge[one] for one, count in by_people.items()) / accuracy.total**2
    if chance == 1:
        return None, None, None
    return (
        (accuracy.share - chance) / (1 - chance),
        (accuracy.low - chance) / (1 - chance),
        (accuracy.high - chance) / (1 - chance),
    )
