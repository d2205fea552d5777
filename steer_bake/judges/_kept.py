"""Verdicts on disk, one small file per question: nothing that was answered is asked again.

A file is named by the hash of everything that the verdict depends on. It holds the label and what it took, and no text:
neither the question nor the judged answer, nor the judge's reply, which may quote both, nor a key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What a judge said."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """What became of it."""

    label: str
    prompt_tokens: int
    completion_tokens: int


def name_of(request: Any) -> str:
    """The hash of a JSON-ready ``request``: 64 hex digits."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """Verdicts in ``folder``; several processes may share it."""

    folder: Path

    def get(self, name: str) -> Verdict | None:
        """The verdict kept under ``name``; None where there is none that can be read."""
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
            if not isinstance(found["label"], str):
                return None
            return Verdict(found["label"], int(found["prompt_tokens"]), int(found["completion_tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, name: str, verdict: Verdict) -> None:
        """Keep ``verdict``; whoever reads at the same time sees all of it or nothing.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            beside.write_text(json.dumps(asdict(verdict)) + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
