"""What a run asks both models, and what is kept of their answers.

The recipe's own sets are answered, judged and kept. Safety is always measured unless that is declined: of harmful
requests and their harmless look-alikes only the labels are kept, never the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import judges, reload_worker
from .checkpoint import Checkpoint
from .comparison import Openings
from .errors import RecipeError, did_you_mean
from .evaluate import answers, compare
from .interventions import Intervention
from .models import load_model, load_tokenizer
from .prompts import PACKAGED, Encoded, Prompt, check_length, encode
from .recipe import Prompts, Recipe
from .stages import Progress, silent
from .steering import steer, watch

SAFETY_SETS = ("safety/harmful", "safety/harmless")
SAFETY_TOKENS = 24  # a refusal shows in the opening words
EXAMPLES = 4  # of each set, for the card

#: By name of the set: ``{"labels": [...], "answers": [...], "judging": {...}}``, the answers only where they are kept.
Answered = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """One prompt set, who judges the answers to it, and the label that is counted."""

    name: str
    prompts: tuple[Prompt, ...]
    judge: str
    label: str
    max_new_tokens: int
    repetition_penalty: float
    is_safety: bool
    keep_answers: bool
    judge_options: Mapping[str, Any] = field(default_factory=dict, hash=False)


def questions(recipe: Recipe, home: Path, *, safety: bool) -> list[Question]:
    """Everything that both models of a run are asked; the recipe's relative paths start at ``home``.

    Raises:
        RecipeError: a prompt set that cannot be read, an unknown judge, or a label that the judge never gives.
    """
    found = []
    if wanted := recipe.evaluate:
        _check_judge(wanted.judge, wanted.judge_options, wanted.label)
        for name in wanted.sets:
            prompts = tuple(recipe.prompts[name].load(home))
            keep = not holds_harmful(prompts)
            decoding = wanted.max_new_tokens, wanted.repetition_penalty
            found.append(
                Question(name, prompts, wanted.judge, wanted.label, *decoding, False, keep, wanted.judge_options)
            )
    for name in SAFETY_SETS if safety else ():
        prompts = tuple(Prompts(path=name).load(home))
        found.append(Question(name, prompts, "phrases", "refusal", SAFETY_TOKENS, 1.0, True, False))
    return found


def holds_harmful(prompts: Sequence[Prompt]) -> bool:
    """Whether a prompt is labelled ``harmful``, or is a packaged harmful request wherever it was read from."""
    harmful = _harmful()
    return any(prompt.label == "harmful" or prompt.question in harmful for prompt in prompts)


@lru_cache(maxsize=1)
def _harmful() -> frozenset[str]:
    """Every request that a packaged set labels ``harmful``."""
    names = [path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.jsonl")]
    found = [prompt for name in names for prompt in Prompts(path=name).load(Path())]
    return frozenset(prompt.question for prompt in found if prompt.label == "harmful")


def _check_judge(judge: str, options: Mapping[str, Any], label: str) -> None:
    judges.make(judge, options)([], None)  # one that lacks a package or a key says so now, not after an hour of answers
    known = judges.labels(judge, options)
    if label not in known:
        raise RecipeError(f"the judge {judge!r} never gives the label {label!r}: {did_you_mean(label, known)}")


def check_context(asked: Sequence[Question], base: Checkpoint) -> None:
    """Raise RecipeError where a prompt and its answer do not fit the model's context."""
    tokenizer = load_tokenizer(base.folder)
    for one in asked:
        check_length(encode(tokenizer, one.prompts), context_length(base), one.max_new_tokens)


def context_length(base: Checkpoint) -> int:
    """How many tokens the model can hold, a very large number where its config does not say."""
    return int(base.config.get("max_position_embeddings") or 10**9)


def ask(
    folder: Path, asked: Sequence[Question], *, dtype: str, device: str, who: str, progress: Progress = silent
) -> dict[str, dict[str, Any]]:
    """The labels of the answers that the model in ``folder`` gives, the answers where they are kept, and what the judge
    took (requests, tokens, cost) where it says so."""
    found: dict[str, dict[str, Any]] = {}
    if not asked:
        return found
    model = load_model(folder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(folder)
    for one in asked:
        took: list[Any] = []
        with progress(f"{who} answers {one.name}") as advance:
            texts = answers(
                model, tokenizer, one.prompts,
                max_new_tokens=one.max_new_tokens, repetition_penalty=one.repetition_penalty, progress=advance,
            )  # fmt: skip
        with progress(f"{one.judge} judges {one.name}") as advance:
            judge = judges.make(one.judge, one.judge_options, progress=advance, report=took.append)
            found[one.name] = {"labels": judge(texts, [prompt.question for prompt in one.prompts])}
        if took:
            found[one.name]["judging"] = took[0].as_json()
        if one.keep_answers:
            found[one.name]["answers"] = texts
    return found


def openings(
    folder: Path,
    asked: Sequence[Question],
    interventions: Sequence[Intervention],
    *,
    dtype: str,
    device: str,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """For every gate and prompt set the tokens on which it is open, closed and in between, under the hooks.

    Counted are a prompt's tokens from the end of the instruction on, and apart from these all of its tokens.
    """
    gates = [one.gate for one in interventions if one.gate]
    if not gates:
        return []
    model, tokenizer, found = load_model(folder, dtype=dtype, device=device), load_tokenizer(folder), []
    for one in asked:
        encoded = _behind_instruction(tokenizer, one.prompts)
        counts = [(Openings(), Openings()) for _ in gates]
        with progress(f"gates on {one.name}") as advance, steer(model, interventions), watch(model, gates) as seen:
            for done, prompt in enumerate(encoded):
                reload_worker.logits(model, [prompt.ids], int(tokenizer.pad_token_id))
                for index, (behind, whole) in enumerate(counts):
                    [opened] = seen[index]
                    whole.add(opened)
                    behind.add(opened[prompt.start :])
                    seen[index].clear()
                advance(done + 1, len(encoded))
        found += [
            {
                "prompt_set": one.name,
                "site": str(gate.site),
                "gate": gate.name,
                "answer": behind.as_json(),
                "all": whole.as_json(),
            }
            for gate, (behind, whole) in zip(gates, counts, strict=True)
        ]
    return found


def _behind_instruction(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Encoded]:
    """Each prompt from the end of its instruction on; its last token where that is not to be found."""
    try:
        found = encode(tokenizer, prompts, "instruction")
    except RecipeError:
        return encode(tokenizer, prompts, "last")
    return [replace(one, start=min(one.stop, len(one.ids) - 1), stop=len(one.ids)) for one in found]


def before_and_after(asked: Sequence[Question], base: Answered, baked: Answered) -> dict[str, Any]:
    """Both models side by side: what goes into ``evaluation.json`` and onto the card."""
    rows = {one: compare(one.name, one.label, base[one.name]["labels"], baked[one.name]["labels"]) for one in asked}
    examples = [
        {"prompt": prompt.beginning, "base": before, "baked": after}
        for one in asked
        if one.keep_answers
        for prompt, before, after in list(
            zip(one.prompts, base[one.name]["answers"], baked[one.name]["answers"], strict=True)
        )[:EXAMPLES]
    ]
    own = [one for one in asked if not one.is_safety]
    judging = {
        one.name: [side[one.name]["judging"] for side in (base, baked) if "judging" in side[one.name]] for one in own
    }
    return {
        "judge": own[0].judge if own else None,
        "label": own[0].label if own else None,
        "judging": {name: took for name, took in judging.items() if took},
        "repetition_penalty": own[0].repetition_penalty if own else None,
        "behaviour": [rows[one].as_json() for one in own],
        "safety": [rows[one].as_json() for one in asked if one.is_safety],
        "safety_measured": any(one.is_safety for one in asked),
        "examples": examples,
    }
