"""The pieces of a bake on two cores: while one thread waits for the disk or the kernel, the other computes.

Pieces know their place in the output, so their order does not matter. Only running ones hold memory: at most two slabs.
What is written is hashed and flushed behind them, in the order of the file, while it is still in the page cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event, local

import torch

from ..errors import CheckpointError
from ..workspace import Workspace
from .folder import as_bytes
from .pieces import Block, Copy, Slab
from .publishing import sync

WORKERS = 2
HASHERS = 2  # a file has one of them
#: Bytes below which neighbouring pieces are one task: an additive bake has hundreds of tiny ones.
TASK = 8 << 20
#: Bytes that are hashed at a time: few enough to be in a core's cache when they are.
HASHED = 1 << 20
#: Bytes after which a file is flushed while more of it is still to come.
FLUSHED = 256 << 20

#: The kernel cannot copy between these two files; reading and writing can.
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF)

Piece = Copy | Slab | Block


@dataclass(frozen=True, eq=False)
class NewFile:
    """A file to write: ``header`` at its beginning, then ``pieces``, which fill it up to ``size`` in this order."""

    path: Path
    header: bytes
    size: int
    pieces: Sequence[Piece]

    def tasks(self) -> Iterator[list[Piece]]:
        """``pieces``, small neighbours together."""
        task: list[Piece] = []
        size = 0
        for piece in self.pieces:
            if task and size + piece.size > TASK:
                yield task
                task, size = [], 0
            task.append(piece)
            size += piece.size
        yield task


def write_files(files: Sequence[NewFile], progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """Write ``files`` and fsync them; the sha256 of each by file name.

    ``progress`` is called in this thread with bytes (done, total). On any exception running pieces are waited for.
    """
    total, done, stop = sum(file.size for file in files), 0, Event()
    threads = torch.get_num_threads()
    waiting: dict[Future[None], tuple[_Growing, int]] = {}
    with ExitStack() as pools:
        flusher = pools.enter_context(ThreadPoolExecutor(1, "flush"))
        hashers = [pools.enter_context(ThreadPoolExecutor(1, "hash")) for _ in range(HASHERS)]
        # one thread of torch's own per worker: two workers with two each would fight over two cores
        workers = ThreadPoolExecutor(WORKERS, "bake", initializer=torch.set_num_threads, initargs=(1,))
        pool = pools.enter_context(workers)  # the last: it is the first to end
        grown: list[_Growing] = []
        try:
            for number, file in enumerate(files):
                grown.append(_Growing(file, hashers[number % HASHERS], flusher, stop))
                for index, task in enumerate(grown[-1].tasks):
                    while len(waiting) >= 2 * WORKERS:
                        done += _collect(waiting)
                        if progress is not None:
                            progress(done, total)
                    waiting[pool.submit(_write, file.path, task, stop)] = grown[-1], index
            while waiting:
                done += _collect(waiting)
                if progress is not None:
                    progress(done, total)
            hashes = {one.file.path.name: one.finish() for one in grown}
        except BaseException:
            stop.set()
            for future in waiting:
                future.cancel()
            raise
        finally:
            torch.set_num_threads(threads)
    return hashes


class _Growing:
    """A file on its way: how far it is written without a gap, and the hash up to there."""

    def __init__(self, file: NewFile, hasher: ThreadPoolExecutor, flusher: ThreadPoolExecutor, stop: Event) -> None:
        self.file, self.tasks = file, list(file.tasks())
        self._hasher, self._flusher, self._stop = hasher, flusher, stop
        self._ready: set[int] = set()  # tasks that are done
        self._whole = 0  # so many of the first tasks are all done
        self._end = 0  # bytes that they are
        self._asked = self._flushed = 0  # of those, the ones that the hasher and the flusher have been told of
        self._hashed = 0  # the hasher's own
        self._digest = hashlib.sha256()
        self._behind: list[Future[None]] = []
        descriptor = os.open(file.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        try:
            _write_all(descriptor, memoryview(file.header), 0)
        finally:
            os.close(descriptor)

    def written(self, index: int) -> int:
        """Task ``index`` is done: hash and flush what is complete; its bytes."""
        self._ready.add(index)
        while self._whole in self._ready:
            self._end += self._size(self._whole)
            self._whole += 1
        last = self._whole == len(self.tasks)
        if self._end > self._asked:
            self._asked = self._end
            self._behind.append(self._hasher.submit(self._hash, self._end))
        if last or self._end - self._flushed >= FLUSHED:
            self._flushed = self._end
            self._behind.append(self._flusher.submit(sync, self.file.path))
        return self._size(index)

    def finish(self) -> str:
        """Wait for the disk; the sha256."""
        for future in self._behind:
            future.result()
        return self._digest.hexdigest()

    def _size(self, index: int) -> int:
        return sum(piece.size for piece in self.tasks[index]) + (0 if index else len(self.file.header))

    def _hash(self, end: int) -> None:
        for piece in _read_pieces(Copy(self.file.path, self._hashed, 0, end - self._hashed)):
            if self._stop.is_set():
                return
            self._digest.update(piece)
            self._hashed += len(piece)


def _collect(waiting: dict[Future[None], tuple[_Growing, int]]) -> int:
    """Wait for at least one task; the bytes that were written."""
    count = 0
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        growing, index = waiting.pop(future)
        future.result()
        count += growing.written(index)
    return count


_thread = local()


def _workspace() -> Workspace:
    if not hasattr(_thread, "workspace"):
        _thread.workspace = Workspace()  # goes when the thread ends
    found: Workspace = _thread.workspace
    return found


def _write(path: Path, task: Sequence[Piece], stop: Event) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for piece in task:
            if stop.is_set():
                return
            if isinstance(piece, Copy):
                copy_range(piece, descriptor)
            else:
                _write_all(descriptor, as_bytes(piece.compute(_workspace())), piece.target)
    finally:
        os.close(descriptor)


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
    """The bytes that ``job`` would copy; each piece is valid until the next is asked for."""
    buffer = memoryview(bytearray(min(HASHED, job.size)))
    with open(job.path, "rb", buffering=0) as file:
        position, end = job.source, job.source + job.size
        while position < end:
            count = os.preadv(file.fileno(), [buffer[: end - position]], position)
            if not count:
                raise CheckpointError(f"{job.path} became shorter while it was read; is something else writing there?")
            position += count
            yield buffer[:count]
