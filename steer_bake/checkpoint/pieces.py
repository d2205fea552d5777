"""An edit cut into pieces that depend on no other piece: bounded memory, and work for both cores.

Where a piece ends does not change a bit (see rounding), and :func:`recompute` makes the same bits in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..rounding import MatrixEdit, check_range
from ..workspace import Workspace
from .edit import Edit, check_edit
from .folder import Checkpoint, read_exactly
from .header import TORCH_DTYPES, nbytes

#: Preparing takes milliseconds, and many slabs share an affine map.
_prepared = lru_cache(maxsize=16)(MatrixEdit.of)

#: Bytes of rows that are read and written at a time where rows do not depend on each other.
SLAB = 32 << 20
#: Bytes that the kernel is asked to copy at a time.
COPY = 64 << 20


@dataclass(frozen=True)
class Copy:
    """``size`` bytes of the file ``path`` from ``source`` on go to byte ``target`` of the output file."""

    path: Path
    source: int
    target: int
    size: int

    def split(self) -> Iterator[Copy]:
        """In pieces small enough to share between the threads and to report progress."""
        for done in range(0, self.size, COPY):
            yield Copy(self.path, self.source + done, self.target + done, min(COPY, self.size - done))


@dataclass(frozen=True, eq=False)
class Block:
    """Some of the values that an edit appends, in one run in the output."""

    values: Tensor  # [n]
    dtype: str  # that is stored
    target: int  # byte offset in the output file

    @property
    def size(self) -> int:
        return nbytes(self.dtype, tuple(self.values.shape))

    def compute(self, memory: Workspace) -> Tensor:
        """The values in the stored dtype."""
        return _nearest(self.values, TORCH_DTYPES[self.dtype]).contiguous()  # zeros may be one zero, many times


@dataclass(frozen=True, eq=False)
class Slab:
    """A piece of an edited tensor, in one run in the source and in the output."""

    base: Checkpoint
    edit: Edit
    dtype: str  # that is stored
    start: int  # the element that it begins with, of those that the map applies to
    target: int  # byte offset in the output file
    shape: tuple[int, int]  # of the piece of the source
    axis: int  # of the two
    protect: bool
    beside: Tensor | None = None  # [n, k]: the piece is n rows, and each of them goes on with k appended values

    @property
    def size(self) -> int:
        beside = 0 if self.beside is None else nbytes(self.dtype, tuple(self.beside.shape))
        return nbytes(self.dtype, self.shape) + beside

    def compute(self, memory: Workspace) -> Tensor:
        """The new values in the stored dtype; valid until ``memory`` is used again."""
        stored = self._edited(memory)
        if self.beside is None:
            return stored
        rows, new = self.beside.shape
        old = stored.numel() // rows
        grown = memory.take("grown", (rows, old + new), stored.dtype)
        grown[:, :old] = stored.reshape(rows, old)
        grown[:, old:] = _nearest(self.beside, stored.dtype)
        return grown

    def _edited(self, memory: Workspace) -> Tensor:
        dtype, affine = TORCH_DTYPES[self.dtype], self.edit.affine
        if self.edit.source is None:
            return self._new(memory.take("in", self.shape, dtype).zero_())
        values = self._read(memory)
        if self.edit.scale != 1:
            wide = torch.promote_types(values.dtype, torch.float32)
            values = memory.take("scaled", self.shape, wide).copy_(values).mul_(self.edit.scale)
        if affine.is_identity:
            return values if values.dtype == dtype else _nearest(values, dtype)
        out = values if values.dtype == dtype else memory.take("out", self.shape, dtype)
        protect = self.protect and len(self.edit.shape) > 1  # a vector has too few elements to choose from
        _prepared(affine, protect=protect).into(values, out, self.axis, memory)
        return out

    def _new(self, values: Tensor) -> Tensor:
        """What a tensor without a source holds, written over the zeros ``values``; rounded to nearest."""
        first = self.start // self.shape[1] if self.axis == 1 else 0  # the row that this piece begins with
        if self.edit.affine.has_shift:
            shift = _nearest(self.edit.affine.shift, values.dtype)
            here = values.shape[1 - self.axis]
            wanted = self.edit.only or (0, first + here)
            start, stop = (min(max(0, end - first), here) for end in wanted)
            part = values.narrow(1 - self.axis, start, stop - start)
            part.copy_(shift[:, None] if self.axis == 0 else shift)
        for one in self.edit.diagonals:
            skipped = max(0, first - one.row)
            row, column = one.row + skipped - first, one.column + skipped
            length = min(one.length - skipped, len(values) - row)
            if length > 0:
                values[row : row + length, column : column + length].fill_diagonal_(one.value)
        return values

    def _read(self, memory: Workspace) -> Tensor:
        assert self.edit.source is not None
        info = self.base.tensors[self.edit.source]
        values = memory.take("in", self.shape, TORCH_DTYPES[info.dtype])
        flat, done = values.reshape(-1), 0
        with open(self.base.folder / info.file, "rb") as file:
            for first, count in self.edit.runs(self.start, flat.numel()):
                offset = info.start + nbytes(info.dtype, (first,))
                read_exactly(file.fileno(), flat[done : done + count], offset, info.file)
                done += count
        return values


def _nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    stored = values.to(dtype)
    if dtype is torch.float16:
        check_range(stored, values)
    return stored


def pieces(base: Checkpoint, edit: Edit, target: int, dtype: str, protect: bool) -> Iterator[Copy | Slab | Block]:
    """``edit`` in pieces that fill the output from byte ``target`` on, in this order.

    ``protect``: errors of rounding cancel along what the edit removes; otherwise each element is rounded to nearest.
    """
    plan, total = _Pieces(base, edit, dtype, protect), math.prod(edit.old_shape)
    if edit.appended is None:
        yield from plan.alone(0, total, target)
        return
    ndim = len(edit.shape)
    along = edit.appended.axis % ndim
    run = math.prod(edit.old_shape[along:])  # old values, behind which new ones come
    new = edit.appended.values.float().reshape(math.prod(edit.shape[:along]), -1)
    if edit.axis % ndim < along:  # the runs are parts of vectors of the stream
        yield from plan.beside(new, run, total, target)
        return
    for index, values in enumerate(new):
        yield from plan.alone(index * run, run, target)
        target += nbytes(dtype, (run,))
        yield Block(values, dtype, target)
        target += nbytes(dtype, tuple(values.shape))


@dataclass(frozen=True, eq=False)
class _Pieces:
    base: Checkpoint
    edit: Edit
    dtype: str
    protect: bool

    def alone(self, first: int, count: int, target: int) -> Iterator[Copy | Slab]:
        """``count`` elements of the source from element ``first`` on, with nothing in between.

        Seen as ``[outer, d, inner]``: a matrix whose columns are vectors of the stream (a Linear weight) is one slab
        per outer index; rows that are vectors of the stream (an embedding, a Conv1D weight, a bias) are taken many at
        a time.
        """
        info = None if self.edit.source is None else self.base.tensors[self.edit.source]
        stays = self.edit.rows is None or self.edit.rows.is_run
        same = info is not None and info.dtype == self.dtype and self.edit.affine.is_identity and self.edit.scale == 1
        if info is not None and same and stays:
            [(start, _)] = self.edit.runs(first, count)
            size = nbytes(self.dtype, (count,))
            yield Copy(self.base.folder / info.file, info.start + nbytes(self.dtype, (start,)), target, size)
            return
        width, inner = self._vectors()
        rows = 1 if inner > 1 else max(1, SLAB // max(1, nbytes(self.dtype, (width,))))
        for done in range(0, count, rows * width * inner) if width * inner else ():
            here = min(rows, (count - done) // (width * inner))
            shape = (width, inner) if inner > 1 else (here, width)
            yield self._slab(first + done, target + nbytes(self.dtype, (done,)), shape)

    def beside(self, new: Tensor, run: int, total: int, target: int) -> Iterator[Slab]:
        """The source's ``total`` elements, with a row of ``new`` behind each ``run`` of them."""
        width, inner = self._vectors()
        unit = width * inner  # elements that depend on each other
        if self.edit.affine.is_identity:
            unit = min(total, max(1, SLAB // max(1, nbytes(self.dtype, (run,)))) * run)
        for first in range(0, total, unit) if unit else ():
            count = min(unit, total - first)
            here = new[first // run : (first + count) // run]
            yield self._slab(first, target, (width, inner) if count == width * inner else (count // run, run), here)
            target += nbytes(self.dtype, (count + here.numel(),))

    def _vectors(self) -> tuple[int, int]:
        shape = self.edit.old_shape or (1,)
        axis = self.edit.axis % len(shape)
        return shape[axis], math.prod(shape[axis + 1 :])

    def _slab(self, first: int, target: int, shape: tuple[int, int], beside: Tensor | None = None) -> Slab:
        axis = 0 if self._vectors()[1] > 1 or beside is not None else 1
        return Slab(self.base, self.edit, self.dtype, first, target, shape, axis, self.protect, beside)


def recompute(base: Checkpoint, edit: Edit, dtype: str | None = None, *, protect: bool = True) -> Tensor:
    """The tensor that ``edit`` makes, in memory: the same bits that :func:`write_edited` writes.

    ``dtype`` replaces the edit's own; ``protect`` as there.
    """
    check_edit(base, edit)
    out = torch.empty(edit.shape, dtype=TORCH_DTYPES[dtype or edit.dtype])
    memory, raw = Workspace(), out.reshape(-1).view(torch.uint8)
    for piece in pieces(base, edit, 0, dtype or edit.dtype, protect):
        part = raw[piece.target : piece.target + piece.size]
        if isinstance(piece, Copy):
            with open(piece.path, "rb") as file:
                read_exactly(file.fileno(), part, piece.source, piece.path.name)
        else:
            part.copy_(piece.compute(memory).reshape(-1).view(torch.uint8))
    return out
