"""What a steering costs where it is not meant to act: perplexity of plain text, and sums worked out at length.

Both are measured of the base and of the published file alike. Perplexity is exp of the mean negative log-likelihood of
a token, over packaged texts that were written for this (prose, letters, code, four languages); the texts are short, so
what they say is the ratio of the two models, not a rank among others. The sums (``arithmetic``) are answered greedily
with room to think: what a model forgets in the middle of a long answer shows there and not in the opening words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import arithmetic
from .answering import answers
from .errors import RecipeError
from .evaluate import compare
from .models import load_model, load_tokenizer
from .prompts import Prompt, encode
from .recipe import Damage, Prompts
from .reload_worker import logits
from .stages import Progress, silent

TEXTS = "damage/prose"
SUMS = "damage/arithmetic"

#: Of a text, at most so many tokens are read.
LONGEST = 1024

_Z95 = 1.959963984540054


def measure(
    folder: Path, wanted: Damage, *, dtype: str, device: str, who: str, progress: Progress = silent
) -> dict[str, Any]:
    """One model's side: per text the negative log-likelihood in nats and the number of tokens, per sum its label.

    What cannot be measured is ``{"unmeasured": "why"}``: a model that is too small for it is no error.
    """
    model, tokenizer = load_model(folder, dtype=dtype, device=device), load_tokenizer(folder)
    texts = Prompts(path=TEXTS, chat=False).load(Path())
    with progress(f"{who} reads plain text") as advance:
        likelihoods = []
        for done, text in enumerate(texts, 1):
            likelihoods.append(_likelihood(model, tokenizer, text))
            advance(done, len(texts))
    return {"prose": likelihoods, "arithmetic": _sums(model, tokenizer, wanted, who, progress)}


def _likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Prompt) -> tuple[float, int]:
    """Negative log-likelihood in nats of all tokens but the first, and how many those are."""
    context = getattr(model.config, "max_position_embeddings", None) or LONGEST
    ids = list(encode(tokenizer, [text])[0].ids[: min(LONGEST, context)])
    found = logits(model, [ids], int(tokenizer.pad_token_id))[:-1].log_softmax(-1)
    taken = found.gather(-1, torch.tensor(ids[1:])[:, None])
    return -float(taken.sum(dtype=torch.float64)), len(ids) - 1


def _sums(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Damage, who: str, progress: Progress
) -> dict[str, Any]:
    asked = arithmetic.problems(wanted.problems)
    prompts = [Prompt((("user", one.text),)) for one in asked]
    with progress(f"{who} works out sums") as advance:
        try:
            texts = answers(model, tokenizer, prompts, max_new_tokens=wanted.max_new_tokens, progress=advance)
        except RecipeError as error:
            return {"unmeasured": str(error)}
    return {"labels": arithmetic.labels(asked, texts), "max_new_tokens": wanted.max_new_tokens}


def before_and_after(base: Mapping[str, Any], baked: Mapping[str, Any]) -> dict[str, Any]:
    """Both sides of :func:`measure`: what goes into ``evaluation.json`` and onto the card."""
    sums: dict[str, Any] = dict(base["arithmetic"])
    if "labels" in sums and "labels" in baked["arithmetic"]:
        row = compare(SUMS, arithmetic.CORRECT, sums["labels"], baked["arithmetic"]["labels"]).as_json()
        sums = {**row, "max_new_tokens": sums["max_new_tokens"]}
    return {"prose": perplexities(base["prose"], baked["prose"]), "arithmetic": sums}


def perplexities(base: Sequence[Sequence[float]], baked: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Both perplexities of the same texts, and their ratio with a 95 % interval; rows are (nats, tokens) of a text.

    The interval is Student's t of the texts' own differences, weighted by their tokens (a ratio estimator, Cochran
    1977, section 6.4): texts are the sample, tokens of one text are not independent of each other.
    """
    tokens = [int(count) for _, count in base]
    total = sum(tokens)
    changes = [after - before for (before, _), (after, _) in zip(base, baked, strict=True)]
    mean = sum(changes) / total
    squares = sum((change - mean * count) ** 2 for change, count in zip(changes, tokens, strict=True))
    error = math.sqrt(squares * len(tokens) / (len(tokens) - 1)) / total
    half = _students_t(len(tokens) - 1) * error
    return {
        "prompt_set": TEXTS,
        "texts": len(tokens),
        "tokens": total,
        "base": _exp(sum(nats for nats, _ in base) / total),
        "baked": _exp(sum(nats for nats, _ in baked) / total),
        "ratio": _exp(mean),
        "low": _exp(mean - half),
        "high": _exp(mean + half),
    }


def _exp(value: float) -> float | None:
    """None where a model was so far gone that there is no number."""
    return math.exp(value) if math.isfinite(value) and value < 700 else None


def _students_t(freedom: int) -> float:
    """The 97.5 % point of Student's t (Cornish and Fisher 1938), right to 0.001 from ten degrees of freedom on."""
    z = _Z95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2
