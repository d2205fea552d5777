"""The jobs of a bake on two cores: while one thread waits for the disk or the kernel, the other computes.

Jobs are independent and know their place in the output, so their order does not matter. Only running jobs hold memory:
at most two slabs.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event, local

import torch

from ..errors import CheckpointError
from .edit import COPY, Slab, Workspace
from .publishing import sync

WORKERS = 2

#: The kernel cannot copy between these two files; reading and writing can.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)


@dataclass(frozen=True)
class Copy:
    """``size`` bytes of the file ``path`` from ``source`` on go to byte ``target`` of the output file."""

    path: Path
    source: int
    target: int
    size: int


@dataclass(frozen=True, eq=False)
class NewFile:
    """A file to write: ``header`` at its beginning, then ``jobs``, which fill it up to ``size``."""

    path: Path
    header: bytes
    size: int
    jobs: Sequence[Copy | Slab]
    in_order: bool = False  # small: written by one thread, which takes the sha256 on the way


def write_files(files: Sequence[NewFile], progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Write ``files`` and fsync them; the sha256 of each by file name.

    ``progress`` is called in this thread with bytes (done, total). On any exception running jobs are waited for.
    """
    total, done, stop = sum(file.size for file in files), 0, Event()
    threads = torch.get_num_threads()
    hashes: dict[str, str] = {}
    missing = {file.path: 0 for file in files}  # jobs not yet done, counted as they are submitted
    waiting: dict[Future[str | None], tuple[Path, int]] = {}
    flushes: list[Future[None]] = []

    def flush(path: Path) -> None:
        flushes.append(flusher.submit(finish, path))

    def finish(path: Path) -> None:
        if path.name not in hashes:
            hashes[path.name] = _sha256(path, stop)
        sync(path)

    # one thread of torch's own per worker: two workers with two each would fight over two cores
    with (
        ThreadPoolExecutor(WORKERS, "bake", initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ThreadPoolExecutor(1, "flush") as flusher,
    ):
        try:
            for path, size, job in _jobs(files, missing, stop):
                waiting[pool.submit(job)] = (path, size)
                while len(waiting) >= 2 * WORKERS:
                    done += _collect(
                        waiting, missing, hashes, lambda path: flushes.append(flusher.submit(finish, path))
                    )
                    if progress is not None:
                        progress(done, total)
            while waiting:
                done += _collect(waiting, missing, hashes, flush)
                if progress is not None:
                    progress(done, total)
            for flushed in flushes:
                flushed.result()
        except BaseException:
            stop.set()
            for future in waiting:
                future.cancel()
            raise
        finally:
            torch.set_num_threads(threads)
    return hashes


def _jobs(
    files: Sequence[NewFile], missing: dict[Path, int], stop: Event
) -> Iterator[tuple[Path, int, Callable[[], str | None]]]:
    """Every job with its output file and its size; a file is created when its first job comes up."""
    for file in files:
        _create(file)
        if file.in_order:
            missing[file.path] = 1
            yield file.path, file.size, lambda file=file: _write_hashed(file, stop)  # type: ignore[misc]
            continue
        missing[file.path] = len(file.jobs) + 1
        yield file.path, len(file.header), lambda: None  # so that a file without jobs is flushed as well
        for job in file.jobs:
            yield file.path, job.size, lambda path=file.path, job=job: _write(path, job, stop)  # type: ignore[misc]


def _collect(
    waiting: dict[Future[str | None], tuple[Path, int]],
    missing: dict[Path, int],
    hashes: dict[str, str],
    flush: Callable[[Path], None],
) -> int:
    """Wait for at least one job; flush files that are complete; the bytes that were written."""
    count = 0
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        path, size = waiting.pop(future)
        digest = future.result()
        if digest is not None:
            hashes[path.name] = digest
        missing[path] -= 1
        if missing[path] == 0:
            flush(path)
        count += size
    return count


_thread = local()


def _workspace() -> Workspace:
    if not hasattr(_thread, "workspace"):
        _thread.workspace = Workspace()  # goes when the thread ends
    found: Workspace = _thread.workspace
    return found


def _create(file: NewFile) -> None:
    descriptor = os.open(file.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        _write_all(descriptor, memoryview(file.header), 0)
    finally:
        os.close(descriptor)


def _write(path: Path, job: Copy | Slab, stop: Event) -> None:
    if stop.is_set():
        return
    descriptor = os.open(path, os.O_WRONLY)
    try:
        if isinstance(job, Copy):
            copy_range(job, descriptor)
        else:
            _write_all(descriptor, job.compute_bytes(_workspace()), job.target)
    finally:
        os.close(descriptor)


def _write_hashed(file: NewFile, stop: Event) -> str:
    digest = hashlib.sha256(file.header)
    descriptor = os.open(file.path, os.O_WRONLY)
    try:
        for job in file.jobs:
            position = job.target
            for piece in _read_pieces(job) if isinstance(job, Copy) else [job.compute_bytes(_workspace())]:
                if stop.is_set():
                    return ""
                digest.update(piece)
                position += _write_all(descriptor, piece, position)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _sha256(path: Path, stop: Event) -> str:
    """Of a finished file, read again while it is still in the page cache: its jobs may have ended in any order."""
    digest = hashlib.sha256()
    for piece in _read_pieces(Copy(path, 0, 0, path.stat().st_size)):
        if stop.is_set():
            break
        digest.update(piece)
    return digest.hexdigest()


def _write_all(descriptor: int, data: memoryview, offset: int) -> int:
    size = len(data)
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
    return size


def copy_range(job: Copy, descriptor: int) -> None:
    """Carry out ``job`` in the kernel, which shares blocks where the file system can; else by reading and writing."""
    source = os.open(job.path, os.O_RDONLY)
    done = 0
    try:
        while done < job.size and hasattr(os, "copy_file_range"):
            count = os.copy_file_range(source, descriptor, job.size - done, job.source + done, job.target + done)
            if count == 0:
                break
            done += count
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
    finally:
        os.close(source)
    if done < job.size:
        position = job.target + done
        for piece in _read_pieces(Copy(job.path, job.source + done, position, job.size - done)):
            position += _write_all(descriptor, piece, position)


def _read_pieces(job: Copy) -> Iterator[memoryview]:
    with open(job.path, "rb", buffering=0) as file:
        position, end = job.source, job.source + job.size
        while position < end:
            piece = os.pread(file.fileno(), min(8 << 20, end - position), position)
            if not piece:
                raise CheckpointError(f"{job.path} became shorter while it was read; is something else writing there?")
            position += len(piece)
            yield memoryview(piece)


def split(job: Copy) -> Iterator[Copy]:
    """``job`` in pieces small enough to share between the threads and to report progress."""
    for done in range(0, job.size, COPY):
        yield Copy(job.path, job.source + done, job.target + done, min(COPY, job.size - done))
