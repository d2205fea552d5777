"""Layers and coefficient for a recipe's directions, chosen as in Refusal Steering (``selection`` has the rule)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from . import architectures
from .activations import project
from .errors import RecipeError
from .estimation import Estimation
from .models import load_tokenizer
from .prompts import Encoded, Prompt, encode
from .refusal import Event
from .reload_worker import pad
from .selection import Configuration, Selection, layer_score, ranked, select
from .sites import Site

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

ANSWER_TOKENS = 32  # of an answer that the model gives itself, where a conversation has none


def configure(
    estimation: Estimation,
    *,
    layers: int,
    configurations: Sequence[Configuration],
    refused: Sequence[Prompt],
    conversations: Sequence[Prompt],
    target: float,
    progress: Progress,
) -> tuple[list[Site], dict[Site, float], Selection]:
    """The sites best first, the score of each, and the configurations tried.

    Layers are ranked on the recipe's validation prompts. ``c(x)`` is the probability that the answer opens as a
    refusal, times two, minus one; :func:`selection.select` takes any other measure. A conversation that ends in an
    answer keeps it, others are answered by the model without steering.

    Raises:
        RecipeError: too few prompts, or no configuration reaches the target.
    """
    if estimation.wanted.validation is None:
        raise RecipeError(
            "layers are chosen on prompts that the directions were not estimated on: name a set under "
            "'estimator: {validation: ...}'"
        )
    if estimation.wanted.model is not None or estimation.wanted.combine is not None:
        raise RecipeError("a sibling's directions and learned combinations have no choice of layers; choose by hand")
    directions = {one.site: one for one in estimation.directions() if one.site is not None}
    model = estimation.load(estimation.target)
    layout = architectures.layout(estimation.target_base.config)
    held_out = estimation.scored(model, estimation.validation)
    with progress("projecting") as advance:
        vectors = {site: one.vector for site, one in directions.items()}
        found = project(model, layout, held_out.encoded, vectors, progress=advance)
    confidence = torch.tensor(held_out.scores, dtype=torch.float64)
    scores = {
        site: layer_score(values - _middle(values, directions[site].neutral), confidence)
        for site, values in found.items()
    }
    best = ranked(scores, layers)
    tokenizer = load_tokenizer(estimation.target.folder)
    event = estimation.event(estimation.target)
    with progress("trying configurations") as advance:
        selection = select(
            model, directions, best, configurations, encode(tokenizer, refused),
            _answered(model, tokenizer, conversations), _opening(event), target=target, progress=advance,
        )  # fmt: skip
    return best, {site: scores[site].score for site in best}, selection


def _middle(values: torch.Tensor, neutral: float | None) -> float:
    """What projections are counted from; without neutral prompts the mean over the validation prompts."""
    return float(values.mean()) if neutral is None else neutral


def _opening(event: Event) -> Callable[[Any, Sequence[Encoded]], torch.Tensor]:
    return lambda model, prompts: event.confidence(model, prompts)


@torch.inference_mode()
def _answered(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[tuple[Encoded, tuple[int, ...]]]:
    found = []
    for prompt in prompts:
        if prompt.answer is not None:
            [asked] = encode(tokenizer, [Prompt(prompt.messages[:-1])])
            found.append((asked, tuple(tokenizer(prompt.answer, add_special_tokens=False)["input_ids"])))
            continue
        [asked] = encode(tokenizer, [prompt])
        ids, mask = pad([asked.ids], int(tokenizer.pad_token_id))
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=ANSWER_TOKENS,
            do_sample=False, num_beams=1, repetition_penalty=1.0, pad_token_id=int(tokenizer.pad_token_id),
        )  # fmt: skip
        found.append((asked, tuple(out[0, ids.shape[1] :].tolist())))
    return found
