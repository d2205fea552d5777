"""Complete or not at all: write beside the output, fsync, rename.

The hidden folder is named after host and process, so that a later run can tell what a killed one left behind.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError

#: What the system says when a folder cannot be written; each becomes a sentence.
_CANNOT_WRITE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than this system or user may write",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
}

#: An old folder is replaced only where one of these shows that it is a model, not somebody's home.
_MODEL_FILES = ("config.json", "adapter_config.json", "steering.json")


@contextmanager
def publish(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A fresh hidden folder beside ``out``, on the same file system, that becomes ``out`` when the block ends well.

    Files and folder are fsynced first, so that ``out`` is complete or absent whatever happens. After an exception the
    hidden folder is removed; what runs that were killed left beside ``out`` is removed here too.

    Raises:
        CheckpointError: ``out`` exists and is not an empty folder (with ``overwrite``: is not a model folder), or
            the disk is full, read-only or not ours.
    """
    out = Path(os.path.realpath(out))
    hidden = _beside(out, "baking")
    try:
        _clean(out)
        _check_free(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        hidden.mkdir()
    except OSError as error:
        raise cannot_write(error, out, 0) from error
    try:
        yield hidden
        _sync(hidden)
        _check_free(out, overwrite)  # somebody may have been quicker
        _move(hidden, out)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise cannot_write(error, out, _size(hidden)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def check_outside(base: Path, out: Path) -> None:
    """Raise CheckpointError where ``out`` is the folder ``base`` or lies in it."""
    if out.absolute() == base.absolute() or base.absolute() in out.absolute().parents:
        raise CheckpointError(f"{out} lies in the base model's own folder; choose a place outside {base}")


def check_room(folder: Path, needed: int) -> None:
    """Raise CheckpointError where the file system of ``folder`` has clearly less than ``needed`` bytes free."""
    free = _free(folder)
    if free is not None and free < needed:
        raise CheckpointError(
            f"{folder} needs {needed:,} bytes and its disk has {free:,} free; make room or write to another disk"
        )


def cannot_write(error: OSError, folder: Path, needed: int) -> CheckpointError:
    """``error`` as a sentence with the bytes that are needed and those that are free."""
    free, why = _free(folder), _CANNOT_WRITE.get(error.errno or 0, error.strerror or str(error))
    room = f"; {needed:,} bytes are needed and {free:,} are free" if needed and free is not None else ""
    return CheckpointError(f"{folder} cannot be written: {why}{room}. Nothing was left there; the base is untouched")


def _free(folder: Path) -> int | None:
    for place in (folder, *folder.resolve().parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0


def _check_free(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} exists and is not a folder; choose another output folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{out} exists and is not empty; choose another output folder, remove it or ask to overwrite it"
        )
    if not any((out / name).exists() for name in _MODEL_FILES):
        raise CheckpointError(f"{out} holds no model, so it is not overwritten; remove it yourself if it can go")


def _sync(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        for path in [*(Path(place) / file for file in files), Path(place)]:
            sync(path)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(hidden: Path, out: Path) -> None:
    """Rename; an old folder steps aside first, comes back if that fails, and goes when all is done."""
    old = _beside(out, "replaced") if out.is_dir() and any(out.iterdir()) else None
    if old is not None:
        os.rename(out, old)
    try:
        os.rename(hidden, out)  # atomic; also over an empty folder
    except OSError:
        if old is not None:
            os.rename(old, out)
        raise
    sync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _beside(out: Path, what: str) -> Path:
    return out.parent / f".{out.name}.{what}-{_host()}-{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", socket.gethostname())


def _clean(out: Path) -> None:
    """Undo what killed runs left: a folder that had stepped aside goes back, half-written ones go."""
    if not out.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(baking|replaced)-{re.escape(_host())}-(\d{{1,10}})")
    for path in sorted(out.parent.iterdir(), reverse=True):  # "replaced" before "baking"
        found = pattern.fullmatch(path.name)
        if not found or _alive(int(found[2])):
            continue
        if found[1] == "replaced" and not out.exists():
            os.rename(path, out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        return True
    return True
