"""Any sequence-classification model as the judge: its own labels, or what they are renamed to.

A model that reads two texts (question and answer, trained as a pair) gets both with ``reads: pair``. What is longer
than the model's context is cut at its end: a refusal comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import CheckpointError, RecipeError, did_you_mean
from ..models import pick_device, read_config, resolve
from . import INCOHERENT, is_incoherent


def labels(
    *,
    model: str,
    names: Mapping[str, str] | None = None,
    reads: Literal["answer", "pair"] = "answer",
    batch_size: int = 32,
    device: str = "auto",
) -> tuple[str, ...]:
    """The labels that this judge may give, from the model's config alone (options and errors as :func:`classifier`)."""
    config = read_config(model)
    if config is None:
        raise CheckpointError(f"the classifier {model!r} has no config.json to be had; check its name and the network")
    own = _own_labels(config)
    return (*dict.fromkeys(_renamed(own, names or {})), INCOHERENT)


def classifier(
    answers: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    model: str,
    names: Mapping[str, str] | None = None,
    reads: Literal["answer", "pair"] = "answer",
    batch_size: int = 32,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The most probable label for each answer, or ``"incoherent"``.

    Args:
        model: a hub id or a folder with a sequence-classification model and its tokenizer.
        names: the model's labels to ours, ``{REJECTION: refusal, NORMAL: answer}``; others stay as they are.
        reads: ``pair`` gives the model the question as its first text and the answer as its second.

    Raises:
        CheckpointError: there is no such model, or it is no classifier.
        RecipeError: ``names`` has a label that the model has not, or a pair is wanted and there are no prompts.
    """
    wanted = [index for index, answer in enumerate(answers) if not is_incoherent(answer)]
    found = [INCOHERENT] * len(answers)
    if not wanted:
        return found
    if reads not in ("answer", "pair"):
        raise RecipeError(f"the judge's option 'reads' is {reads!r}; it is 'answer' or 'pair'")
    if reads == "pair" and prompts is None:
        raise RecipeError("the judge 'classifier' reads pairs, and there are no prompts; use reads: answer")
    place = pick_device(device)
    network, tokenizer = _loaded(resolve(model).folder, place)
    renamed = _renamed(_own_labels(network.config.to_dict()), names or {})
    longest = _context(network.config, tokenizer)
    wanted.sort(key=lambda index: len(answers[index]))
    for at in range(0, len(wanted), batch_size):
        chosen = wanted[at : at + batch_size]
        second = [answers[index] for index in chosen]
        texts = [second] if reads == "answer" or prompts is None else [[prompts[index] for index in chosen], second]
        batch = tokenizer(*texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(place)
        with torch.inference_mode():
            best = network(**batch).logits.argmax(dim=-1).tolist()
        for index, one in zip(chosen, best, strict=True):
            found[index] = renamed[one]
        if progress:
            progress(at + len(chosen), len(wanted))
    return found


def _own_labels(config: Mapping[str, Any]) -> list[str]:
    """The model's labels in the order of its outputs."""
    given = config.get("id2label") or {index: f"LABEL_{index}" for index in range(int(config.get("num_labels") or 2))}
    return [str(given[key]) for key in sorted(given, key=int)]


def _renamed(own: Sequence[str], names: Mapping[str, str]) -> list[str]:
    for name in names:
        if name not in own:
            raise RecipeError(f"the classifier has no label {name!r}: {did_you_mean(name, own)}")
    return [names.get(label, label) for label in own]


def _context(config: Any, tokenizer: Any) -> int:
    """Tokens that the model can read; RoBERTa keeps two of its positions to itself."""
    positions = getattr(config, "max_position_embeddings", None)
    reserved = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
    return min(int(tokenizer.model_max_length), int(positions) - reserved if positions else 512, 4096)


@lru_cache(maxsize=1)  # every prompt set of a run is judged by the same one
def _loaded(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        network, report = AutoModelForSequenceClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and the Rust tokenizers raise whatever they come across
        raise CheckpointError(f"{folder} cannot be loaded as a classifier: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder} is no sequence-classification model: {sorted(report['missing_keys'])[0]} is missing"
        )
    network.eval()
    return network.to(device), tokenizer
