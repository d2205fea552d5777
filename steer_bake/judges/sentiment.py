"""The tone of an answer, by VADER's lexicon and rules: Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM 2014.

English only. The compound score runs from -1 to 1; the thresholds of +-0.05 are the ones its authors publish.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

from ..errors import RecipeError
from . import INCOHERENT, is_incoherent

LABELS = ("negative", "neutral", "positive", INCOHERENT)

THRESHOLD = 0.05  # of |compound|


def sentiment(answers: Sequence[str], prompts: Sequence[str] | None = None) -> list[str]:
    """``"negative"``, ``"neutral"``, ``"positive"`` or ``"incoherent"`` for each answer; ``prompts`` are not needed.

    Raises:
        RecipeError: the package vaderSentiment is not installed.
    """
    scores = _polarity_scores()
    return [INCOHERENT if is_incoherent(answer) else _label(scores(answer)["compound"]) for answer in answers]


def _label(compound: float) -> str:
    if compound >= THRESHOLD:
        return "positive"
    return "negative" if compound <= -THRESHOLD else "neutral"


@lru_cache(maxsize=1)
def _polarity_scores() -> Callable[[str], dict[str, float]]:
    try:
        vader = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError as error:
        raise RecipeError(
            "the judge 'sentiment' needs the package vaderSentiment, which is not installed: "
            "pip install steer-bake[sentiment]"
        ) from error
    return cast("Callable[[str], dict[str, float]]", vader.SentimentIntensityAnalyzer().polarity_scores)
