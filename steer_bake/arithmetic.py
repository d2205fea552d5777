"""Sums told as little stories, to be worked out step by step: a task that needs a train of thought to stay whole.

The problems are made, not collected: a seed gives the same ones everywhere, and no model was trained on their answers.
Numbers stay small, so that a wrong answer is a lost thread and seldom a slip.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .judges import INCOHERENT, is_incoherent

CORRECT, WRONG = "correct", "wrong"
LABELS = (CORRECT, WRONG, INCOHERENT)

_NAMES = ("Anna", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas")
_THINGS = ("apples", "books", "coins", "stamps", "pencils", "marbles", "candles", "postcards", "buttons", "shells")
_BOXES = ("boxes", "bags", "baskets", "tins")
_ASKED = "Work it out step by step. Then write 'Answer:' and the number."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """One story, and the number that it comes to."""

    text: str
    answer: int


def problems(count: int, seed: int = 0) -> list[Problem]:
    """The first ``count`` problems of a seed: of one to four steps in turn, for models of all sizes."""
    return [_problem(random.Random(f"{seed}:{number}"), 1 + number % 4) for number in range(count)]


def _problem(source: random.Random, steps: int) -> Problem:
    who, what, where = (options[source.randrange(len(options))] for options in (_NAMES, _THINGS, _BOXES))
    total = source.randrange(5, 20)
    told = [f"{who} has {total} {what}."]
    for _ in range(steps):
        sentence, total = _step(source, who, what, where, total, easy=steps == 1)
        told.append(sentence)
    return Problem(f"{' '.join(told)} How many {what} does {who} have now? {_ASKED}", total)


def _step(source: random.Random, who: str, what: str, where: str, total: int, *, easy: bool = False) -> tuple[str, int]:
    """One thing that happens, and how many there are then: never fewer than one, seldom more than a hundred.

    ``easy``: nothing is multiplied.
    """
    kinds = ["more"] + (["fewer"] if total > 3 else [])
    if not easy:
        kinds += ["boxes"] + (["twice"] if total <= 30 else [])
    kind = kinds[source.randrange(len(kinds))]
    if kind == "more":
        found = source.randrange(2, 15)
        return f"Then {who} buys {found} more {what}.", total + found
    if kind == "boxes":
        count, each = source.randrange(2, 5), source.randrange(2, 8)
        return f"Then {who} gets {count} {where} with {each} {what} in each.", total + count * each
    if kind == "fewer":
        lost = source.randrange(2, min(total, 15))
        return f"Then {who} gives away {lost} {what}.", total - lost
    return f"An aunt then gives {who} as many {what} as {who} already has.", 2 * total


def labels(asked: Sequence[Problem], answers: Sequence[str]) -> list[str]:
    """``correct``, ``wrong`` or ``incoherent`` for each answer; babble that ends with the right number is babble."""
    return [_label(one, answer) for one, answer in zip(asked, answers, strict=True)]


def _label(problem: Problem, answer: str) -> str:
    if is_incoherent(answer):
        return INCOHERENT
    return CORRECT if said(answer) == problem.answer else WRONG


def said(answer: str) -> float | None:
    """The number that an answer comes to: the first one behind its last "answer", else the last one of all."""
    before, word, behind = answer.lower().rpartition("answer")
    given = _NUMBER.findall(behind)
    if word and given:
        return _value(given[0])
    every = _NUMBER.findall(before if word else behind)
    return _value(every[-1]) if every else None


def _value(text: str) -> float:
    return float(text.rstrip(",").replace(",", ""))
