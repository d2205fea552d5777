"""The storage behind Xet uploads: a folder that the client itself reads and writes, named to it as ``local://``."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RECORD = 48  # bytes of everything in a shard: its header, a file, a segment of a file
END = b"\xff" * 32
VERIFICATION, METADATA = 1 << 31, 1 << 30  # flags of a file: what follows its segments


def files(folder: Path) -> Iterator[tuple[str, str]]:
    """(sha256, Xet hash) of every file that was uploaded into ``folder``."""
    for path in sorted(folder.rglob("shards/*.mdb")):
        yield from _files(path.read_bytes())


def _files(shard: bytes) -> Iterator[tuple[str, str]]:
    at = RECORD
    while len(found := shard[at : at + RECORD]) == RECORD and found[:32] != END:
        flags, segments = struct.unpack_from("<II", found, 32)
        at += RECORD * (1 + segments * (2 if flags & VERIFICATION else 1))
        if flags & METADATA:
            yield _hex(shard[at : at + 32]), _hex(found[:32])
            at += RECORD


def _hex(stored: bytes) -> str:
    """Hashes are kept and shown as four numbers of 64 bits."""
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", stored))


def fetch(folder: Path, xet_hash: str, size: int, target: Path) -> None:
    """Put a file together from its chunks.

    The client that is uploading keeps the database in ``folder`` locked: it is read from a copy.
    """
    import hf_xet

    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        copy = Path(name) / "xet"
        shutil.copytree(folder, copy, copy_function=_copied)
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{copy}", token="none", token_expiry_unix_secs=int(time.time()) + 3600
        )
        with group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))


def _copied(source: str, target: str) -> None:
    """Databases are written to; everything else is kept by its hash."""
    if source.endswith(".redb"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)
