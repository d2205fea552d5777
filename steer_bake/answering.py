"""What a model answers: greedily, or sampled several times, each answer with how likely the model finds it.

A sample is drawn with the Gumbel-max trick: ``argmax(logits / temperature + noise)``, the noise from a generator of its
own that is seeded by the prompt, the sample's number and the seed. It is an exact sample of the softmax, and neither
the batch, nor the order of the prompts, nor another process changes it.

Thinking is no part of an answer: text and log-probability begin after the closing mark.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from .prompts import Encoded, Prompt, check_length, encode
from .reload_worker import pad

#: What opens and what closes the thinking of most models that show it.
THINKING = ("<think>", "</think>")


@dataclass(frozen=True)
class Answer:
    """One answer, without the thinking before it."""

    text: str
    logprob: float | None  # mean natural log-probability of its tokens, at temperature 1; None where it has none
    tokens: int  # of the answer proper, without its end mark
    complete: bool  # False: the tokens ran out while the model was still thinking, and there is no answer


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers in the order of ``prompts``; batches of similar length, left-padded.

    ``repetition_penalty`` is the one of ``generate``; 1 is plain greedy decoding, whatever the model's settings say.

    Raises:
        RecipeError: a prompt and its answer do not fit the model's context.
    """
    encoded = _encoded(model, tokenizer, prompts, max_new_tokens)
    found: dict[int, str] = {}
    pad_id = int(tokenizer.pad_token_id)  # load_tokenizer sees to it that there is one
    for chosen in _batches([len(one.ids) for one in encoded], batch_size):
        ids, mask = pad([encoded[index].ids for index in chosen], pad_id)
        out = cast(Any, model).generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
            do_sample=False, num_beams=1, repetition_penalty=repetition_penalty,
            pad_token_id=pad_id,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        found.update(zip(chosen, texts, strict=True))
        if progress:
            progress(len(found), len(encoded))
    return [found[index] for index in range(len(encoded))]


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    count: int = 5,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    thinking: tuple[str, str] = THINKING,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Answer]]:
    """``count`` answers to each of ``prompts``, in their order; temperature 0 is greedy decoding.

    Args:
        thinking: the mark that opens the thinking (in the answer, or at the end of the chat template) and the one that
            closes it.
        batch_size: answers (not prompts) that are generated together.

    Raises:
        RecipeError: a prompt and its answer do not fit the model's context.
    """
    encoded = _encoded(model, tokenizer, prompts, max_new_tokens)
    wanted = [(index, number) for index in range(len(encoded)) for number in range(count)]
    ends = _ends(model, tokenizer)
    found: dict[int, Answer] = {}
    for chosen in _batches([len(encoded[index].ids) for index, _ in wanted], batch_size):
        rows = [encoded[wanted[place][0]].ids for place in chosen]
        drawn = _Drawn(
            [_seed(seed, wanted[place][1], ids) for place, ids in zip(chosen, rows, strict=True)], temperature
        )
        new = _generate(model, tokenizer, rows, max_new_tokens, drawn)
        logprobs = torch.stack(drawn.logprobs, dim=1).cpu()  # [batch, new tokens]
        for place, prompt, ids, row in zip(chosen, rows, new.tolist(), logprobs, strict=True):
            found[place] = _answer(tokenizer, prompt, ids, row, ends, thinking)
        if progress:
            progress(len(found), len(wanted))
    return [[found[index * count + number] for number in range(count)] for index in range(len(encoded))]


def without_thinking(text: str, thinking: tuple[str, str] = THINKING) -> str | None:
    """``text`` after the last closing mark; None where it opens its thinking and never closes it."""
    before, closed, after = text.rpartition(thinking[1])
    if closed:
        return after.strip()
    return None if text.lstrip().startswith(thinking[0]) else text.strip()


def _encoded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Encoded]:
    encoded = encode(tokenizer, prompts)
    context = getattr(model.config, "max_position_embeddings", None)
    if context:
        check_length(encoded, context, max_new_tokens)
    return encoded


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of rows of similar length."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for at in range(0, len(order), size):
        yield order[at : at + size]


def _seed(seed: int, number: int, ids: Sequence[int]) -> int:
    digest = hashlib.sha256(f"{seed}:{number}:{','.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # generators take 63 bits everywhere


class _Drawn(LogitsProcessor):
    """Turns greedy decoding into sampling, row by row, and notes the log-probability of what is taken."""

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.logprobs: list[Tensor] = []  # one [batch] per step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        taken = scores
        if self.temperature > 0:
            waits = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=one) for one in self.generators])
            taken = scores / self.temperature - waits.log().to(scores)
        logprobs = torch.log_softmax(scores.float(), dim=-1)
        self.logprobs.append(logprobs.gather(-1, taken.argmax(dim=-1, keepdim=True))[:, 0])
        return taken


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    drawn: _Drawn,
) -> Tensor:
    """New ids of one left-padded batch, [batch, <= max_new_tokens], padded after each row's end."""
    ids, mask = pad(rows, int(tokenizer.pad_token_id))
    out: Tensor = cast(Any, model).generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=max_new_tokens,
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        logits_processor=LogitsProcessorList([drawn]), pad_token_id=int(tokenizer.pad_token_id),
    )  # fmt: skip
    return out[:, ids.shape[1] :].cpu()


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids after which a row is over."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [*said] if isinstance(said, list) else [said]
    return frozenset(int(one) for one in [*ends, tokenizer.pad_token_id] if one is not None)


def _answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    ids: list[int],
    logprobs: Tensor,
    ends: frozenset[int],
    thinking: tuple[str, str],
) -> Answer:
    """The answer among the new ``ids`` of one row; ``logprobs`` is [new tokens], ``ends`` are the ids that end it."""
    stop = next((at for at, one in enumerate(ids) if one in ends), len(ids))
    start = _answer_start(tokenizer, prompt, ids[:stop], thinking)
    if start is None:
        return Answer("", None, 0, False)
    text = str(tokenizer.decode(ids[start:stop], skip_special_tokens=True)).strip()
    mean = float(logprobs[start:stop].double().mean()) if stop > start else None
    return Answer(text, mean, stop - start, True)


def _answer_start(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: list[int], thinking: tuple[str, str]
) -> int | None:
    """The number of tokens up to the end of the last closing mark; None where the thinking never ends."""

    def closed(count: int) -> int:
        return str(tokenizer.decode(ids[:count], skip_special_tokens=False)).count(thinking[1])

    if times := closed(len(ids)):
        return bisect_left(range(len(ids) + 1), times, key=closed)
    open_in_prompt = str(tokenizer.decode(list(prompt[-8:]), skip_special_tokens=False)).rstrip().endswith(thinking[0])
    opened = str(tokenizer.decode(ids, skip_special_tokens=False)).lstrip().startswith(thinking[0])
    return None if open_in_prompt or opened else 0
