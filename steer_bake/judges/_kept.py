"""What judges said before, on disk, one small file per question: nothing that was answered is asked again.

A file is named by the hash of everything that the reply depends on. It holds the reply and what it took, never the
question, the judged answer or a key.
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


def name_of(request: Any) -> str:
    """The hash of a JSON-ready ``request``: 64 hex digits."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """Replies in ``folder``; several processes may share it."""

    folder: Path

    def get(self, name: str) -> Reply | None:
        """The reply kept under ``name``; None where there is none that can be read."""
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
            return Reply(str(found["text"]), int(found["prompt_tokens"]), int(found["completion_tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, name: str, reply: Reply) -> None:
        """Keep ``reply``; whoever reads at the same time sees all of it or nothing.

        Raises:
            OSError: the folder cannot be written.
        """
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            beside.write_text(json.dumps(asdict(reply)) + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"
