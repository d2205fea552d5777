"""A local chat model that judges: loaded when it is first asked, in batches of similar length."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..answering import sample
from ..models import ModelRef, load_model, load_tokenizer, pick_device, resolve
from ..prompts import Prompt
from ._kept import Reply


@dataclass
class Local:
    """The model ``name``: a hub id, a folder or a packaged name."""

    name: str
    temperature: float
    max_new_tokens: int
    batch_size: int
    device: str
    dtype: str  # auto: float32 on a CPU, elsewhere as stored

    @property
    def identity(self) -> dict[str, Any]:
        """What a reply depends on besides the message.

        Raises:
            CheckpointError: there is no such model.
        """
        ref = resolve(self.name)
        files = [] if ref.revision else [file for file in ref.folder.iterdir() if file.is_file()]
        return {
            "model": ref.name,
            "revision": ref.revision,
            "files": sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
            "dtype": self._computed(),
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def replies(self, messages: Sequence[str]) -> Generator[tuple[str, Reply | str, int], None, None]:
        """``(message, reply, 0)`` batch by batch, so that a run that is broken off has lost one batch at most.

        Raises:
            CheckpointError: the model cannot be loaded.
            RecipeError: a message does not fit its context.
        """
        if not messages:
            return
        ref: ModelRef = resolve(self.name)
        model, tokenizer = _loaded(ref.folder, pick_device(self.device), self._computed())
        ordered = sorted(messages, key=len)
        for at in range(0, len(ordered), self.batch_size):
            batch = ordered[at : at + self.batch_size]
            found = sample(
                model, tokenizer, [Prompt(messages=(("user", one),)) for one in batch], count=1,
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, batch_size=self.batch_size,
            )  # fmt: skip
            for message, (answer,) in zip(batch, found, strict=True):
                yield message, Reply(answer.text, len(tokenizer(message)["input_ids"]), answer.tokens), 0

    def _computed(self) -> str:
        return "float32" if self.dtype == "auto" and pick_device(self.device) == "cpu" else self.dtype


@lru_cache(maxsize=1)  # every prompt set of a run is judged by the same one
def _loaded(folder: Path, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(folder, dtype=dtype, device=device), load_tokenizer(folder)
