"""Which stages of a run are up to date: a stage whose inputs have not changed is not run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import __version__
from .errors import RecipeError

Advance = Callable[[int, int], None]
#: How work of several steps is followed: ``with progress("reading activations") as advance: advance(done, total)``
Progress = Callable[[str], AbstractContextManager[Advance]]


def silent(_what: str) -> AbstractContextManager[Advance]:
    """Progress that nobody watches."""
    return nullcontext(lambda _done, _total: None)


def key(*inputs: Any) -> str:
    """A hash of JSON-ready ``inputs`` and of the tool's version."""
    return hashlib.sha256(json.dumps([__version__, *inputs], sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Stages:
    """The stages of the run in ``folder``; ``stages.json`` remembers what each was made from.

    Raises:
        RecipeError: ``folder`` is in use for something else.
    """

    folder: Path
    force: bool = False
    ran: dict[str, bool] = field(default_factory=dict)  # stage to whether it was run now or found up to date

    def __post_init__(self) -> None:
        try:
            self._keys: dict[str, str] = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._keys = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise RecipeError(f"{self.folder} is a file; choose another run folder")
        if self.folder.exists() and not self._file.exists():
            there = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
            if there:
                raise RecipeError(
                    f"{self.folder} is not empty and not the folder of an earlier run (it holds {there[0]!r}); "
                    "choose another run folder"
                )

    @property
    def _file(self) -> Path:
        return self.folder / "stages.json"

    def is_current(self, name: str, made_from: str, *artefacts: Path) -> bool:
        """Whether ``name`` was finished with the same ``made_from`` key and what it made is still there."""
        return not self.force and self._keys.get(name) == made_from and all(path.exists() for path in artefacts)

    def run(self, name: str, made_from: str, work: Callable[[], None], *artefacts: Path) -> None:
        """Do ``work``, which writes ``artefacts``, unless it was done before with the same ``made_from`` key."""
        self.ran[name] = not self.is_current(name, made_from, *artefacts)
        if not self.ran[name]:
            return
        if self._keys.pop(name, None):  # a run that dies in between must not look finished
            self._save()
        work()
        self._keys[name] = made_from
        self._save()

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps(self._keys, indent=2) + "\n")


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Where the block fails, ``folder`` and those above it that it made go again if nothing is in them."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            try:
                path.rmdir()
            except OSError:  # it was never made, or something useful is in it
                continue
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, renamed to ``path`` when the block ends well and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it appears complete or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
