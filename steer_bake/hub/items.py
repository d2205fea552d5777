"""The files that make up a published repository, and what of them the hub has already."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from ..checkpoint.header import open_regular
from ..contents import PIECE, is_loaded
from ..errors import PublishError

Advance = Callable[[int, int], None]  # (bytes done, bytes in all)
How = Literal["upload", "copy", "keep", "delete"]

CARD = "README.md"


@dataclass(frozen=True)
class Away:
    """A file of another repository on the hub."""

    repo: str
    revision: str
    path: str


@dataclass(frozen=True)
class Item:
    """One file as it is to be in the repository."""

    path: str
    size: int
    sha256: str
    source: Path | bytes | Away

    def git_oid(self) -> str:
        """What git calls a small file; one that lies on the hub has none here."""
        if isinstance(self.source, Away):
            return ""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class Move:
    """What becomes of one file of the repository."""

    path: str
    how: How
    size: int

    @property
    def sent(self) -> int:
        """Bytes that go up, at most: the hub may know parts of them."""
        return self.size if self.how == "upload" else 0


def hashed(folder: Path, names: Iterable[str], advance: Advance) -> dict[str, Item]:
    """The files ``names`` of ``folder`` with their hashes; every byte is read once."""
    paths = [(name, folder / name, (folder / name).stat().st_size) for name in names]
    total, done, found = sum(size for _, _, size in paths), 0, {}
    for name, path, size in paths:
        digest = hashlib.sha256()
        with open_regular(path) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                done += len(piece)
                advance(done, total)
        found[name] = Item(name, size, digest.hexdigest(), path)
    return found


def made(path: str, data: bytes) -> Item:
    """A file that is made for the hub and is not in the folder."""
    return Item(path, len(data), hashlib.sha256(data).hexdigest(), data)


def files_of(folder: Path) -> list[str]:
    """Everything in a folder but what is hidden: a clone's or a download's own files among it."""
    found = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]


# --- against the hub


Tree = Mapping[str, RepoFile]


def tree(api: HfApi, repo: str, revision: str) -> Tree:
    """What the repository holds at a revision."""
    rows = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {row.path: row for row in rows if isinstance(row, RepoFile)}


def is_there(item: Item, there: Tree) -> bool:
    """Whether the hub has this very file at its place."""
    row = there.get(item.path)
    if row is None or row.size != item.size:
        return False
    return row.lfs.sha256 == item.sha256 if row.lfs else row.blob_id == item.git_oid()


def moves(items: Sequence[Item], there: Tree) -> list[Move]:
    """What is to be done so that a repository with ``there`` in it has ``items``.

    Files that loaders act on and that are not among ``items`` go: an older push had them, or the model that a pull
    request is for, and transformers would take ``model.safetensors`` before any index.
    """
    found = []
    for item in items:
        how: How = "keep" if is_there(item, there) else "copy" if isinstance(item.source, Away) else "upload"
        found.append(Move(item.path, how, item.size))
    wanted = {item.path for item in items}
    stale = sorted(path for path in there if path not in wanted and is_loaded(path) and not path.startswith("."))
    return [*found, *(Move(path, "delete", there[path].size) for path in stale)]


def check_arrived(repo: str, items: Sequence[Item], there: Tree) -> None:
    """Compare what the hub says it has with what was to be there, file by file.

    Raises:
        PublishError: a file is missing or another one.
    """
    wrong = [item.path for item in items if not is_there(item, there)]
    if wrong:
        raise PublishError(
            f"{repo} was written, and {len(wrong)} of its files are not what was sent (for example {wrong[0]}, by its "
            "checksum); run the same command again, which sends what differs"
        )
