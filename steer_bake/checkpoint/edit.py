"""Edited tensors, streamed: read a slab, apply the affine map, round once, write; both cores busy, memory bounded.

Every sum over the residual axis is a tree of elementwise additions whose shape depends on the width alone. The result
therefore does not depend on threads, blocks or the linear-algebra library, and an audit can demand the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..affine import Affine
from ..errors import CheckpointError
from ..rounding import round_into
from .folder import Checkpoint, as_bytes, read_exactly
from .header import FLOATS, TORCH_DTYPES, nbytes

#: Elements that are edited at a time, in float32: they and the products stay in a core's cache.
BLOCK = 1 << 19
#: Vectors of the stream that are rounded at a time: rounding along a direction costs much per call.
ROUNDED = 1000
#: Bytes of rows that are read and written at a time where rows do not depend on each other.
SLAB = 16 << 20
#: Bytes that the kernel is asked to copy at a time.
COPY = 64 << 20

#: (exact [n, m] in float32 or float64, dtype to store, affine, axis) -> rounded [n, m].
Rounding = Callable[[Tensor, torch.dtype, Affine, int], Tensor]


@dataclass(frozen=True)
class Diagonal:
    """``value`` at ``(row + i, column + i)`` of a matrix for ``i`` in ``range(length)``."""

    row: int
    column: int
    length: int
    value: float


@dataclass(frozen=True, eq=False)
class Edit:
    """New content of one tensor: ``affine`` applied along ``axis`` to the tensor ``source`` (to zeros where None).

    ``tensor`` is the name in the output. Where ``source`` is the same tensor the edit is in place; where the base has
    no tensor of that name it goes into the one extra shard (an untied head, a new bias, a carrier layer's matrices).
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str  # safetensors spelling
    affine: Affine
    axis: int = 0
    source: str | None = None
    # Of a new matrix, zero but for what these say:
    only: tuple[int, int] | None = None  # the vectors (columns for axis 0) that the shift goes to; None: all
    diagonals: tuple[Diagonal, ...] = ()


def plain_rounding(exact: Tensor, dtype: torch.dtype, affine: Affine, axis: int) -> Tensor:
    """Each element to the nearest value of ``dtype``; raises CheckpointError beyond the largest float16 number."""
    rounded = exact.to(dtype)
    if dtype is torch.float16 and bool((rounded.isinf() & exact.isfinite()).any()):
        raise CheckpointError("an edited weight does not fit float16; use a smaller coefficient or a bfloat16 base")
    return rounded


def check_edit(base: Checkpoint, edit: Edit) -> None:
    """Refuse an edit that does not fit ``base``.

    Raises:
        CheckpointError: the source is missing, has another shape, or is quantised.
    """
    what = f"the edit of {edit.tensor!r}"
    if not -len(edit.shape) <= edit.axis < len(edit.shape) or edit.shape[edit.axis] != edit.affine.width:
        raise CheckpointError(
            f"{what} is {edit.affine.width} wide, axis {edit.axis} of {list(edit.shape)} is not; plan again"
        )
    if edit.source is not None and edit.source not in base.tensors:
        raise CheckpointError(
            f"{what} needs {edit.source!r}, which {base.folder} does not hold; {_full_precision(base)}"
        )
    stored = edit.dtype if edit.source is None else base.tensors[edit.source].dtype
    for dtype in (stored, edit.dtype):
        if dtype not in FLOATS:
            raise CheckpointError(f"{what} would touch {dtype} values, which are quantised; {_full_precision(base)}")
    if edit.source is not None and base.tensors[edit.source].shape != edit.shape:
        found = list(base.tensors[edit.source].shape)
        raise CheckpointError(
            f"{what} has shape {list(edit.shape)} but {edit.source!r} has {found}; plan again for this base"
        )


def _full_precision(base: Checkpoint) -> str:
    quantised = base.config.get("quantization_config")
    if not isinstance(quantised, dict):
        return "bake a base stored in bfloat16, float16 or float32, and quantise the result"
    method = quantised.get("quant_method", "quantised")
    return (
        f"this is a {method} checkpoint (config.json: quantization_config): bake the full-precision model it was "
        "made from (usually the base_model on its card) and quantise the result"
    )


def recompute(base: Checkpoint, edit: Edit, dtype: str | None = None, rounding: Rounding = round_into) -> Tensor:
    """The tensor that ``edit`` makes, in memory: the same bits that :func:`stream` writes.

    ``dtype`` replaces the edit's own; ``rounding`` is how exact values become stored ones.
    """
    check_edit(base, edit)
    out = torch.empty(edit.shape, dtype=TORCH_DTYPES[dtype or edit.dtype])
    memory, raw = Workspace(), out.reshape(-1).view(torch.uint8)
    for slab in slabs(base, edit, 0, dtype or edit.dtype, rounding):
        values = slab.compute(memory).reshape(-1).view(torch.uint8)
        raw[slab.target : slab.target + values.numel()] = values
    return out


class Workspace:
    """Memory that one thread uses again and again: fresh pages cost more than the arithmetic done in them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary content, in the memory that an earlier one for the same ``use`` had."""
        size = math.prod(shape) * dtype.itemsize
        if use not in self._buffers or self._buffers[use].shape[0] < size:
            self._buffers[use] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[use][:size].view(dtype).reshape(shape)


@dataclass(frozen=True, eq=False)
class Slab:
    """A piece of an edited tensor that depends on no other piece; contiguous in the source and in the output."""

    base: Checkpoint
    edit: Edit
    dtype: str  # that is stored
    source: int | None  # byte offset in the source's file
    target: int  # byte offset in the output file
    shape: tuple[int, int]
    axis: int  # of the two
    rounding: Rounding
    first: int = 0  # of the rows of a matrix, the one that this piece begins with

    @property
    def size(self) -> int:
        return nbytes(self.dtype, self.shape)

    def compute_bytes(self, memory: Workspace) -> memoryview:
        """The new values as bytes, as they go into the file; valid until ``memory`` is used again."""
        return as_bytes(self.compute(memory))

    def compute(self, memory: Workspace) -> Tensor:
        """The new values, shape ``shape``, in the stored dtype; valid until ``memory`` is used again."""
        out_dtype = TORCH_DTYPES[self.dtype]
        if self.source is None:
            return self._new(memory.take("in", self.shape, out_dtype).zero_())
        values = self._read(memory)
        out = values if values.dtype == out_dtype else memory.take("out", self.shape, out_dtype)
        group = BLOCK // self.edit.affine.width + 1 if self.rounding is plain_rounding else ROUNDED
        across = 1 - self.axis
        for old, new in zip(_cut(values, group, across), _cut(out, group, across), strict=True):
            exact = self._exact(old, memory)
            new.copy_(self.rounding(exact, out_dtype, self.edit.affine, self.axis) if out_dtype.itemsize < 4 else exact)
        return out

    def _new(self, values: Tensor) -> Tensor:
        """What a tensor without a source holds, written over the zeros ``values``; rounded to nearest."""
        if self.edit.affine.has_shift:
            start, stop = self.edit.only or (0, values.shape[1 - self.axis])
            shift = self.edit.affine.shift[None]
            if values.dtype.itemsize < 4:
                shift = self.rounding(shift, values.dtype, self.edit.affine, 1)
            values.narrow(1 - self.axis, start, stop - start).copy_(_along(shift[0], self.axis))
        for one in self.edit.diagonals:
            skipped = max(0, self.first - one.row)
            row, column = one.row + skipped - self.first, one.column + skipped
            length = min(one.length - skipped, len(values) - row)
            if length > 0:
                values[row : row + length, column : column + length].fill_diagonal_(one.value)
        return values

    def _exact(self, values: Tensor, memory: Workspace) -> Tensor:
        """The edit of ``values`` before it is rounded."""
        wide = torch.float64 if values.dtype is torch.float64 else torch.float32
        size, across = BLOCK // self.edit.affine.width + 1, 1 - self.axis
        exact = memory.take("exact", tuple(values.shape), wide)
        for old, new in zip(_cut(values, size, across), _cut(exact, size, across), strict=True):
            block = memory.take("block", tuple(old.shape), wide) if size < values.shape[across] else new
            apply(self.edit.affine, block.copy_(old), self.axis, memory.take("product", tuple(old.shape), wide))
            if block is not new:
                new.copy_(block)
        return exact

    def _read(self, memory: Workspace) -> Tensor:
        assert self.edit.source is not None
        assert self.source is not None
        info = self.base.tensors[self.edit.source]
        values = memory.take("in", self.shape, TORCH_DTYPES[info.dtype])
        with open(self.base.folder / info.file, "rb") as file:
            read_exactly(file.fileno(), values, self.source, info.file)
        return values


def _cut(x: Tensor, size: int, axis: int) -> Iterator[Tensor]:
    for start in range(0, x.shape[axis], size):
        yield x.narrow(axis, start, min(size, x.shape[axis] - start))


def slabs(base: Checkpoint, edit: Edit, target: int, dtype: str, rounding: Rounding) -> Iterator[Slab]:
    """``edit`` cut into independent pieces, to be written from byte ``target`` on.

    Seen as ``[outer, d, inner]``: a matrix whose columns are vectors of the stream (a Linear weight) is one slab per
    outer index; rows that are vectors of the stream (an embedding, a Conv1D weight, a bias) are taken many at a time.
    """
    axis = edit.axis % len(edit.shape)
    width, inner = edit.shape[axis], math.prod(edit.shape[axis + 1 :])
    outer = math.prod(edit.shape[:axis])
    info = base.tensors[edit.source] if edit.source is not None else None
    size_in, size_out = nbytes(info.dtype, (1,)) if info else 0, nbytes(dtype, (1,))
    rows = 1 if inner > 1 else max(1, SLAB // max(1, width * size_out))
    for start in range(0, outer, rows) if width * inner else ():
        first = start * width * inner
        yield Slab(
            base,
            edit,
            dtype,
            None if info is None else info.start + first * size_in,
            target + first * size_out,
            (width, inner) if inner > 1 else (min(rows, outer - start), width),
            0 if inner > 1 else 1,
            rounding,
            0 if inner > 1 else start,
        )


def apply(affine: Affine, x: Tensor, axis: int, scratch: Tensor) -> None:
    """``x + L(R^T x) + shift`` along ``axis`` of ``x`` [n, m], in place, in a fixed order; ``scratch`` is like ``x``.

    Multiplication and addition are separate calls: a fused one rounds otherwise, and only some code paths have it.
    """
    left, right, shift = affine.left.to(x), affine.right.to(x), affine.shift.to(x)
    parts = [_project(x, vector, axis, scratch) for vector in right.unbind(1)]
    for vector, part in zip(left.unbind(1), parts, strict=True):
        x += torch.mul(_along(vector, axis), part, out=scratch)
    if affine.has_shift:
        x += _along(shift, axis)


def _project(x: Tensor, vector: Tensor, axis: int, scratch: Tensor) -> Tensor:
    """``vector^T x`` along ``axis``, kept with size 1: the last half is added to the first until one is left."""
    torch.mul(x, _along(vector, axis), out=scratch)
    count = x.shape[axis]
    while count > 1:
        half = count // 2
        scratch.narrow(axis, 0, half).add_(scratch.narrow(axis, count - half, half))
        count -= half
    return scratch.narrow(axis, 0, 1).clone()


def _along(vector: Tensor, axis: int) -> Tensor:
    return vector[:, None] if axis == 0 else vector[None, :]
