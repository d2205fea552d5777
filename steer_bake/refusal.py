"""The event "the answer is a refusal" as a probability that can be differentiated, for models with and without tokens
for it.

An event is a set of token sequences with which an answer may begin, none the beginning of another. Models trained with
refusal tokens have one-token sequences; others have the tokens of opening phrases, or of whatever judged refusals begin
with and no judged answer does. Its probability is the sum of theirs: the first-token mass that arXiv 2603.13359 trains
on, generalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .errors import RecipeError
from .prompts import Encoded

#: How English-speaking assistants begin to decline.
OPENINGS = (
    "I'm sorry",
    "I am sorry",
    "I’m sorry",
    "Sorry",
    "I apologize",
    "I can't",
    "I can’t",
    "I cannot",
    "I won't",
    "I'm unable",
    "I am unable",
    "I'm not able",
    "Unfortunately",
    "As an AI",
)

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """An answer begins with one of ``openings``, none of which begins with another."""

    openings: tuple[Tokens, ...]

    @classmethod
    def of(cls, openings: Sequence[Tokens]) -> Event:
        """The event of any openings; one that begins with another adds nothing and is left out.

        Raises:
            RecipeError: there is none, or an empty one.
        """
        if not openings or not all(openings):
            raise RecipeError("a refusal needs at least one opening, and none may be empty")
        known = set(openings)
        kept = {one for one in known if not any(one[:length] in known for length in range(1, len(one)))}
        return cls(tuple(sorted(kept)))

    @classmethod
    def phrases(cls, tokenizer: Any, phrases: Sequence[str] = OPENINGS) -> Event:
        """The event that an answer begins with one of ``phrases``.

        With or without a space before it, unless the chat template ends in white space: then there is none.
        """
        befores = ("",) if _ends_in_space(tokenizer) else ("", " ")
        written = [before + phrase for phrase in phrases for before in befores]
        return cls.of([tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written])

    @classmethod
    def judged(cls, answers: Sequence[Tokens], are_refusals: Sequence[bool], longest: int = 8) -> Event:
        """The shortest beginnings of the refusals among ``answers`` (tokens) that no other answer has.

        Raises:
            RecipeError: the first ``longest`` tokens never tell a refusal from an answer.
        """
        others = {
            one[:length] for one, refusal in zip(answers, are_refusals, strict=True) if not refusal
            for length in range(1, longest + 1)
        }  # fmt: skip
        found = []
        for one, refusal in zip(answers, are_refusals, strict=True):
            lengths = range(1, min(longest, len(one)) + 1)
            length = next((length for length in lengths if one[:length] not in others), None) if refusal else None
            if length is not None:
                found.append(one[:length])
        if not found:
            raise RecipeError(
                f"none of the {sum(are_refusals)} judged refusals begins in {longest} tokens as no answer does; "
                "give more answers, or name the openings"
            )
        return cls.of(found)

    def log_probability(self, model: Any, prompts: Sequence[Encoded]) -> Tensor:
        """log p(event) [prompts] float32 under ``model`` as it is now, hooks included; gradients pass through.

        What several openings or prompts begin with is computed once, and the last token of each opening is never run.
        """
        paths, of = self._paths()
        at_once = self._at_once()
        parts = [
            self._log_probability(model, prompts[at : at + at_once], paths, of)
            for at in range(0, len(prompts), at_once)
        ]
        return torch.cat(parts)

    def _at_once(self) -> int:
        """Prompts in one forward: many where they share their beginning only, one where its paths share all of it."""
        paths = len(self._paths()[0])
        return _ROWS // paths if paths <= 2 else 1

    def _paths(self) -> tuple[list[Tokens], list[int]]:
        """What has to be run after a prompt, and which of it has each opening's tokens but the last."""
        begun = {one[:-1] for one in self.openings}
        paths = sorted(one for one in begun if not any(other[: len(one)] == one for other in begun - {one}))
        return paths, [
            next(n for n, path in enumerate(paths) if path[: len(one) - 1] == one[:-1]) for one in self.openings
        ]

    def _log_probability(
        self, model: Any, prompts: Sequence[Encoded], paths: Sequence[Tokens], of: Sequence[int]
    ) -> Tensor:
        """As above for one forward; ``of`` has the path that each opening lies on."""
        rows = [one.ids + path for one in prompts for path in paths]
        places, targets, terms = [], [], []
        for number, one in enumerate(prompts):
            for index, opening in enumerate(self.openings):
                for offset, token in enumerate(opening):
                    places.append((number * len(paths) + of[index], len(one.ids) - 1 + offset))
                    targets.append(token)
                    terms.append(number * len(self.openings) + index)
        unique = sorted(set(places))
        known = {place: n for n, place in enumerate(unique)}
        each = logits_at(model, rows, unique).log_softmax(-1)[[known[place] for place in places], targets]
        sums = each.new_zeros(len(prompts) * len(self.openings))
        sums = sums.index_add(0, torch.tensor(terms, device=each.device), each)
        return sums.reshape(len(prompts), len(self.openings)).logsumexp(dim=1)

    @torch.inference_mode()
    def confidence(
        self, model: Any, prompts: Sequence[Encoded], progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """``2 p(event) - 1`` [prompts] float64: from -1 (never refuses) to 1, without sampling an answer.

        A stand-in for the confidence score of Refusal Steering (arXiv 2512.16602, section 3.1), which judges sampled
        answers; a refusal that opens in another way is missed.
        """
        found: list[Tensor] = []
        at_once = self._at_once()
        for at in range(0, len(prompts), at_once):
            found.append(2 * self.log_probability(model, prompts[at : at + at_once]).double().exp().cpu() - 1)
            if progress is not None:
                progress(min(at + at_once, len(prompts)), len(prompts))
        return torch.cat(found).clamp(-1, 1)


def _ends_in_space(tokenizer: Any) -> bool:
    if not getattr(tokenizer, "chat_template", None):
        return False
    asked = [{"role": "user", "content": "Hello"}]
    return str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))[-1:].isspace()


_ROWS = 32  # sequences in one forward


def keeps_keys_and_values(model: Any) -> bool:
    """Whether what a token leaves for later tokens is a key and a value per layer, and no recurrent state."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    return not getattr(model, "_is_stateful", False) and kinds <= {"full_attention", "sliding_attention"}


def next_token_logits(model: Any, prompts: Sequence[Encoded]) -> Tensor:
    """Logits [prompts, vocabulary] float32 of the first token of the answer; gradients pass through."""
    return logits_at(model, [one.ids for one in prompts], [(n, len(one.ids) - 1) for n, one in enumerate(prompts)])


def logits_at(model: Any, rows: Sequence[Tokens], places: Sequence[tuple[int, int]]) -> Tensor:
    """Logits [places, vocabulary] float32 at (row, token); elsewhere the head, the largest matrix, does not run.

    What all rows begin with (chat template, system prompt) is run once, unless that is less than a forward is worth.
    Padding is on the right, where a causal model does not see it.
    """
    shared, cache = _shared(model, rows, min(token for _, token in places)), None
    if shared:
        cache = DynamicCache()
        beginning = torch.tensor([rows[0][:shared]], device=model.device)
        model(input_ids=beginning, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(rows))
    widest = max(len(row) for row in rows)
    ids = torch.tensor([row[shared:] + (0,) * (widest - len(row)) for row in rows], device=model.device)
    row = [number for number, _ in places]
    token = [at - shared for _, at in places]

    def only(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][row, token][None], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(only)
    try:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits[0].float()
    finally:
        handle.remove()
    return logits


_WORTH_A_FORWARD = 64  # tokens that are not run again


def _shared(model: Any, rows: Sequence[Tokens], limit: int) -> int:
    """How many tokens at the beginning of all ``rows``, at most ``limit``, are run once."""
    if not keeps_keys_and_values(model):
        return 0
    alike = next((at for at, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), limit)
    alike = min(alike, limit, min(map(len, rows)) - 1)
    return alike if alike * (len(rows) - 1) > _WORTH_A_FORWARD else 0
