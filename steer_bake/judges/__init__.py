"""How answers are labelled: each file is one function from answers to one label per answer.

``<name>(answers: Sequence[str], prompts: Sequence[str] | None = None, *, ...) -> list[str]``: ``prompts[i]`` is what
``answers[i]`` replies to, for judges that need it. A module lists what its function may return in ``LABELS``, or, where
that depends on the options, returns it from ``labels(...)``, which takes the same options. Options are the function's
keywords; ``progress`` and ``report`` are callbacks, not options. Without an answer nothing is loaded and
nobody is asked.

Every judge asks :func:`is_incoherent` first and labels such an answer ``INCOHERENT``. **Incoherent output counts as
failure, never as success**: a steered model that babbles has not refused, and has not become cheerful. The test is
about form alone and leans towards "incoherent": fluent nonsense passes it, a matrix of zeros does not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from .. import registry
from ..errors import RecipeError, did_you_mean

INCOHERENT = "incoherent"
UNPARSABLE = "unparsable"  # the judge was asked and gave no verdict, or there is no answer to judge
UNJUDGED = "unjudged"  # the judge could not be asked

Judge = Callable[[Sequence[str], "Sequence[str] | None"], list[str]]

_CALLBACKS = ("progress", "report")

LONGEST_LOOP = 8  # words in the longest phrase whose back-to-back repetition is looked for
LOOP_WORDS = 8  # a loop shorter than this is emphasis ("no, no, no"), not a fault
LOOP_SHARE = 1 / 3  # of the answer's words, inside one loop
SEEN_SHARE = 0.35  # of the answer's 4-word phrases, said before in the same answer
NON_WORD_SHARE = 0.5  # of the answer's words
SYMBOL_SHARE = 0.65  # of the answer's visible characters

# Chinese and Japanese put no space between words: there, one character is one word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:['\u2019][^\W\d_]+)*")
_NUMBER = re.compile(r"^\s*\d+[.)](?=\s+\S)", re.MULTILINE)  # of a list: makes every line of a loop new
_LATIN = re.compile(r"[a-z]+\Z")
_VOWEL = re.compile(r"[aeiouy]")
_SAME_LETTER = re.compile(r"([^\W\d_])\1{4}")


def make(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[Any], None] | None = None,
) -> Judge:
    """The judge ``name`` with its options set, and those of the callbacks that it takes.

    Raises:
        RecipeError: no such judge or option, or an option that the judge needs is missing.
    """
    function = registry.load("judges", name)
    known = inspect.signature(function).parameters
    callbacks = {key: one for key, one in (("progress", progress), ("report", report)) if one and key in known}
    judge: Judge = partial(function, **_checked(name, known, options or {}), **callbacks)
    return judge


def labels(name: str, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The labels that the judge ``name`` may give (raises as :func:`make` does)."""
    module = registry.module("judges", name)
    wanted = _checked(name, inspect.signature(registry.load("judges", name)).parameters, options or {})
    found: tuple[str, ...] = module.labels(**wanted) if hasattr(module, "labels") else module.LABELS
    return found


def _checked(name: str, known: Mapping[str, inspect.Parameter], options: Mapping[str, Any]) -> dict[str, Any]:
    takes = {key: one for key, one in known.items() if one.kind is one.KEYWORD_ONLY and key not in _CALLBACKS}
    for key in options:
        if key not in takes:
            raise RecipeError(f"the judge {name!r} has no option {key!r}: {did_you_mean(key, takes)}")
    for key, one in takes.items():
        if one.default is one.empty and key not in options:
            raise RecipeError(f"the judge {name!r} needs the option {key!r}; give it under 'judge_options'")
    return dict(options)


def is_incoherent(answer: str) -> bool:
    """Whether ``answer`` is empty, goes round in a loop, or is made mostly of symbols or non-words."""
    visible = "".join(answer.split())
    words = [word.lower() for word in _WORD.findall(_NUMBER.sub(" ", answer))]
    if not words:
        return True
    symbols = sum(not character.isalnum() for character in visible)
    if len(visible) >= 20 and symbols > SYMBOL_SHARE * len(visible):
        return True
    return _mostly_non_words(words) or _loops(words)


def _mostly_non_words(words: list[str]) -> bool:
    return sum(_is_non_word(word) for word in words) > NON_WORD_SHARE * len(words)


def _is_non_word(word: str) -> bool:
    """Longer than any word, one letter over and over, or Latin letters with no vowel (acronyms are shorter)."""
    if len(word) > 30 or _SAME_LETTER.search(word):
        return True
    return len(word) > 5 and bool(_LATIN.match(word)) and not _VOWEL.search(word)


def _loops(words: list[str]) -> bool:
    longest = max((_longest_run(words, size) for size in range(1, LONGEST_LOOP + 1)), default=0)
    if longest >= LOOP_WORDS and longest >= LOOP_SHARE * len(words):
        return True
    phrases = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(phrases) >= 16 and 1 - len(set(phrases)) / len(phrases) > SEEN_SHARE


def _longest_run(words: list[str], size: int) -> int:
    """The most words in a row that repeat one phrase of ``size`` words back to back, three times or more."""
    best = run = 0
    for here, back in zip(words[size:], words, strict=False):
        run = run + 1 if here == back else 0
        best = max(best, run)
    return best + size if best >= 2 * size else 0
