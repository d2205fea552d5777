"""Everything of a checkpoint that is not streamed: shards that are linked, and the small files that go along."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import CONFIG

#: Files that the licence of a model wants passed on.
LICENCES = ("LICEN[CS]E*", "COPYING*", "NOTICE*", "*USE_POLICY*", "*[Ll]icense*")
#: Files that somebody who loads the model needs, and those.
CARRIED = (
    "tokenizer*",
    "*.jinja",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*processor_config.json",
    "processor_config.json",
    *LICENCES,
)
#: Never, whatever the list above says: other copies of the weights, and what an earlier bake said about its own result.
LEFT_BEHIND = (
    "README*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.safetensors",
    "*.safetensors.index.json",
    "steering.*",
    "*.py",
)

_FICLONE = 0x40049409
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileRecord:
    """One file of a written checkpoint."""

    name: str
    size: int  # bytes
    how: str  # "linked" | "reflinked" | "copied" | "written" | "remote": not here, to be copied on the hub
    sha256: str | None  # of files whose every byte passed through here; None where the kernel linked or copied weights
    header_hash: str | None  # sha256 of the header, of safetensors files
    lfs_sha256: str | None  # of files of a hub model: the id that the hub knows them by, their sha256
    source: str | None = None  # of remote files: their name in the base


def place(source: Path, target: Path) -> str | None:
    """Put ``source`` at ``target`` without copying a byte: ``"linked"`` or ``"reflinked"``; None where that cannot be.

    A symbolic link (a hub cache) is never hard-linked: the cache is free to change or delete what it points to.
    """
    if not source.is_symlink():
        try:
            os.link(source, target)
            return "linked"
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
    return "reflinked" if _reflink(source, target) else None


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # not a Unix
        return False
    with open(source, "rb") as old, open(target, "xb") as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return True
        except OSError:
            os.unlink(target)
            return False


def lfs_sha256(path: Path) -> str | None:
    """The id of a file of a hub cache, which is a link to ``blobs/<sha256>``; None for any other file."""
    if not path.is_symlink():
        return None
    blob = Path(os.readlink(path))
    return blob.name if blob.parent.name == "blobs" and _LFS_BLOB.fullmatch(blob.name) else None


def carry(source: Path, target: Path, patterns: Sequence[str] = CARRIED) -> list[FileRecord]:
    """Copy what goes along with the weights. Copied, not linked: people edit these files."""
    records = []
    for path in sorted(source.iterdir()):
        if path.is_file() and goes_along(path.name, patterns):
            records.append(write_file(target / path.name, path.read_bytes(), "copied", lfs_sha256(path)))
    templates = source / "additional_chat_templates"
    if templates.is_dir() and patterns is CARRIED:
        (target / templates.name).mkdir()
        for path in sorted(templates.glob("*.jinja")):
            record = write_file(target / templates.name / path.name, path.read_bytes(), "copied", lfs_sha256(path))
            records.append(record)
    return records


def goes_along(name: str, patterns: Sequence[str] = CARRIED) -> bool:
    """True for the files of a base that :func:`carry` copies."""
    if name == CONFIG or any(fnmatch.fnmatchcase(name, pattern) for pattern in LEFT_BEHIND):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def write_json(path: Path, value: dict[str, Any]) -> FileRecord:
    """Write ``value`` as transformers writes its JSON files: two spaces, a newline at the end."""
    return write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_file(path: Path, data: bytes, how: str = "written", lfs: str | None = None) -> FileRecord:
    """Write ``data`` to a file that is not there yet."""
    with open(path, "xb") as file:
        file.write(data)
    return FileRecord(path.name, len(data), how, hashlib.sha256(data).hexdigest(), None, lfs)
