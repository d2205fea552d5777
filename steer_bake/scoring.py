"""The refusal confidence of whole prompt sets: sampled and judged by as many processes as there are, and resumable.

The votes of every prompt are noted as soon as they are cast, so that a run that broke off goes on where it was, also
with another number of processes. Neither answers nor prompts are noted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import distributed
from .confidence import Aim, Confidence, confidence, measure
from .judges import Judge
from .prompts import Prompt

_AT_ONCE = 16  # prompts between two notes: few are lost, and batches still hold prompts of about one length


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    judge: Judge,
    notes: Path,
    *,
    made_by: str,
    samples: int = 5,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    aim: Aim = "answer",
    seed: int = 0,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Confidence]:
    """c(x) of each of ``prompts`` (:func:`~steer_bake.confidence.measure`), the same for any number of processes.

    Args:
        notes: folder for the votes that were cast; one that is there is gone on with.
        made_by: what else the votes depend on: the model with its commit, the judge with its options.

    Raises:
        RecipeError: a prompt and its answer do not fit the model's context.
        JudgeFailed: the judge left answers without a label; what was noted before stays.
    """
    names = [_name(one, [made_by, samples, max_new_tokens, seed]) for one in prompts]
    known = _noted(notes)
    notes.mkdir(parents=True, exist_ok=True)
    own = distributed.share(len(prompts))
    open_ = [index for index in own if names[index] not in known]
    open_.sort(key=lambda index: len(prompts[index].question))
    with (notes / f"{distributed.rank()}.jsonl").open("a", encoding="utf-8") as out:
        for at in range(0, len(open_), _AT_ONCE):
            chosen = open_[at : at + _AT_ONCE]
            done = len(own) - len(open_) + at

            def advance(part: int, whole: int, done: int = done, count: int = len(chosen)) -> None:
                if progress is not None:
                    progress(done + count * part // whole, len(own))

            found = measure(
                model, tokenizer, [prompts[index] for index in chosen], judge, samples=samples,
                max_new_tokens=max_new_tokens, temperature=temperature, aim=aim, seed=seed, batch_size=batch_size,
                progress=advance,
            )  # fmt: skip
            for index, one in zip(chosen, found, strict=True):
                known[names[index]] = one
                out.write(json.dumps({"prompt": names[index], **asdict(one)}) + "\n")
            out.flush()
    said = distributed.gather(json.dumps({names[index]: asdict(known[names[index]]) for index in own}))
    votes = {name: one for part in said for name, one in json.loads(part).items()}
    return [
        confidence(votes[name]["labels"], votes[name]["logprobs"], temperature=temperature, aim=aim) for name in names
    ]


def forget(notes: Path) -> None:
    """Remove what :func:`score` noted, once its result is safe."""
    for file in _files(notes):
        file.unlink()
    notes.rmdir()


def _name(prompt: Prompt, settings: Iterable[Any]) -> str:
    content = json.dumps([prompt.messages, prompt.text, *settings])
    return hashlib.sha256(content.encode()).hexdigest()


def _files(notes: Path) -> Iterator[Path]:
    yield from sorted(notes.glob("*.jsonl"))


def _noted(notes: Path) -> dict[str, Confidence]:
    found = {}
    for file in _files(notes):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                found[str(row["prompt"])] = Confidence(row["value"], tuple(row["labels"]), tuple(row["logprobs"]))
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a process that was killed
    return found
