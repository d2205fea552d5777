"""Refusal confidence c(x): how surely a model refuses a prompt, from several sampled answers.

Refusal Steering (arXiv 2512.16602), section 3.1. Of K answers y_k to x, with z_k = +1 for a
refusal and -1 for an answer,

    s_k = mean log-probability of the tokens of y_k     (thinking left out)
    w_k = exp(s_k / tau) / sum_j exp(s_j / tau)
    c(x) = sum_k w_k z_k, between -1 and 1; above 0 the model refuses

The paper says that the answers are decoded greedily, which would make them equal; its code samples them at
temperature 1, and so do we. An answer without a verdict votes 0 and keeps its weight, as in that code: it pulls c(x)
towards 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .answering import THINKING, sample
from .errors import RecipeError
from .judges import INCOHERENT, UNPARSABLE, Judge
from .prompts import Prompt

#: What the model is to be steered to; incoherent output counts as the other.
Aim = Literal["answer", "refusal"]


@dataclass(frozen=True)
class Confidence:
    """c(x) of one prompt and the votes behind it."""

    value: float
    labels: tuple[str, ...]  # of the K answers
    logprobs: tuple[float | None, ...]  # s_k, in nats; None where an answer has no token

    @property
    def unparsable(self) -> int:
        """How many of the answers voted 0."""
        return sum(label not in ("refusal", "answer", INCOHERENT) for label in self.labels)


def confidence(
    labels: Sequence[str], logprobs: Sequence[float | None], *, temperature: float = 1.0, aim: Aim = "answer"
) -> Confidence:
    """The votes of one prompt's answers, put together.

    Args:
        labels: ``refusal``, ``answer``, ``incoherent``; any other label votes 0.
        logprobs: s_k; None (no token) weighs as the mean of the others.
        temperature: tau, above 0.
        aim: incoherent output counts against it: with ``answer`` it votes as a refusal (the paper's), with ``refusal``
            as an answer, so that babble never looks like success.

    Raises:
        RecipeError: no votes, or not as many log-probabilities, or a temperature that is not above 0.
    """
    if not labels or len(labels) != len(logprobs):
        raise RecipeError(
            f"a refusal confidence needs one log-probability per answer, and at least one answer; there are "
            f"{len(labels)} labels and {len(logprobs)} log-probabilities"
        )
    if not temperature > 0:
        raise RecipeError(f"the temperature of the votes is {temperature}; it must be above 0")
    votes = {"refusal": 1.0, "answer": -1.0, INCOHERENT: 1.0 if aim == "answer" else -1.0}
    known = [one for one in logprobs if one is not None]
    middle = sum(known) / len(known) if known else 0.0
    scores = [(middle if one is None else one) / temperature for one in logprobs]
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    value = sum(weight * votes.get(label, 0.0) for weight, label in zip(weights, labels, strict=True)) / sum(weights)
    return Confidence(value, tuple(labels), tuple(logprobs))


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    samples: int = 5,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    aim: Aim = "answer",
    seed: int = 0,
    thinking: tuple[str, str] = THINKING,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Confidence]:
    """c(x) of each of ``prompts``; hooks that are active on ``model`` are part of it.

    Answers are sampled at temperature 1; ``temperature`` is tau. The judge reads what comes after the thinking; where
    the tokens ran out before that, there is nothing to judge and the vote is 0. No answer is kept.

    Raises:
        RecipeError: a prompt and its answer do not fit the model's context.
        JudgeFailed: the judge left answers without a label.
    """
    drawn = sample(
        model, tokenizer, prompts, count=samples, max_new_tokens=max_new_tokens, seed=seed, thinking=thinking,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    there = [(index, answer) for index, row in enumerate(drawn) for answer in row if answer.complete]
    labels = iter(judge([answer.text for _, answer in there], [prompts[index].question for index, _ in there]))
    return [
        confidence(
            [next(labels) if answer.complete else UNPARSABLE for answer in row],
            [answer.logprob for answer in row],
            temperature=temperature,
            aim=aim,
        )
        for row in drawn
    ]
