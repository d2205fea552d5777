"""What becomes of one tensor, and whether that fits the base."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from ..affine import Affine
from ..errors import CheckpointError
from .folder import Checkpoint
from .header import FLOATS


@dataclass(frozen=True, eq=False)
class Appended:
    """More rows or columns behind those that a tensor has: the weights of further neurons.

    They are stored as they are, each rounded to the nearest value of the tensor's dtype; no affine map touches them.
    """

    values: Tensor  # float32, of the tensor's shape but for ``axis``
    axis: int


@dataclass(frozen=True)
class Diagonal:
    """``value`` at ``(row + i, column + i)`` of a matrix for ``i`` in ``range(length)``."""

    row: int
    column: int
    length: int
    value: float


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a matrix, or elements of a vector, in another order within every block of them.

    Row ``i`` of a block is its row ``order[i]``; a block has as many rows as ``order`` has numbers.
    """

    start: int
    stop: int
    order: tuple[int, ...] = (0,)

    @property
    def is_run(self) -> bool:
        """True where they stay in their order."""
        return self.order == tuple(range(len(self.order)))

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Of these rows, ``count`` from the ``first`` on: stretches (first row, rows) of the tensor they are from."""
        if self.is_run:
            yield self.start + first, count
            return
        block, begin, length = len(self.order), 0, 0
        for row in range(first, first + count):
            old = self.start + row - row % block + self.order[row % block]
            if old != begin + length:
                if length:
                    yield begin, length
                begin, length = old, 0
            length += 1
        if length:
            yield begin, length


@dataclass(frozen=True, eq=False)
class Edit:
    """New content of one tensor: ``affine`` applied along ``axis`` to the tensor ``source`` (to zeros where None).

    ``tensor`` is the name in the output. Where ``source`` is the same tensor the edit is in place; where the base has
    no tensor of that name it goes into the one extra shard (an untied head, a new bias, a carrier layer's matrices).
    ``shape`` is that of the output: the source's or the zeros', longer along ``appended.axis`` by what is appended.
    Before the map, ``rows`` are taken out of the source and multiplied by ``scale``.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str  # safetensors spelling
    affine: Affine
    axis: int = 0
    source: str | None = None
    appended: Appended | None = None
    # Of a new matrix, zero but for what these say:
    only: tuple[int, int] | None = None  # the vectors (columns for axis 0) that the shift goes to; None: all
    diagonals: tuple[Diagonal, ...] = ()
    # Of a tensor with a source:
    rows: Rows | None = None  # None: all of them
    scale: float = 1.0

    @property
    def keeps_values(self) -> bool:
        """True where what is taken from the source stays as it was stored: all of it or some, with more behind it."""
        return self.source is not None and self.affine.is_identity and self.scale == 1

    def runs(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Of what the map applies to, ``count`` elements from the ``first`` on: stretches of the source's elements.

        Where ``rows`` change their order these are whole rows.
        """
        width = math.prod(self.old_shape[1:])
        if self.rows is None:
            yield first, count
        elif self.rows.is_run:
            yield self.rows.start * width + first, count
        else:
            for row, rows in self.rows.runs(first // width, count // width):
                yield row * width, rows * width

    @property
    def old_shape(self) -> tuple[int, ...]:
        """The part of ``shape`` that the affine map applies to: all but what is appended."""
        if self.appended is None:
            return self.shape
        axis = self.appended.axis % len(self.shape)
        return *self.shape[:axis], self.shape[axis] - self.appended.values.shape[axis], *self.shape[axis + 1 :]


def check_edit(base: Checkpoint, edit: Edit) -> None:
    """Refuse an edit that does not fit ``base``.

    Raises:
        CheckpointError: the source is missing, has another shape, or is quantised; or what is appended does not fit.
    """
    what = f"the edit of {edit.tensor!r}"
    _check_appended(edit, what)
    if edit.source is not None and (edit.only or edit.diagonals):
        raise CheckpointError(f"{what} says what a new matrix holds, and has a source; plan again")
    shape = edit.old_shape or (1,)  # a single number is a vector of one
    if not -len(shape) <= edit.axis < len(shape) or shape[edit.axis] != edit.affine.width:
        raise CheckpointError(
            f"{what} is {edit.affine.width} wide, axis {edit.axis} of {list(shape)} is not; plan again"
        )
    if edit.source is not None and edit.source not in base.tensors:
        raise CheckpointError(
            f"{what} needs {edit.source!r}, which {base.folder} does not hold; {_full_precision(base)}"
        )
    stored = edit.dtype if edit.source is None else base.tensors[edit.source].dtype
    for dtype in (stored, edit.dtype):
        if dtype not in FLOATS:
            raise CheckpointError(f"{what} would touch {dtype} values, which are quantised; {_full_precision(base)}")
    if edit.source is None:
        if edit.rows is not None or edit.scale != 1:
            raise CheckpointError(f"{what} takes rows of a tensor or multiplies it, and names none; plan again")
        return
    found = _taken_shape(base.tensors[edit.source].shape, edit.rows)
    if found != edit.old_shape:
        taken = "" if edit.rows is None else f", of which rows {edit.rows.start} to {edit.rows.stop} are taken"
        raise CheckpointError(
            f"{what} has shape {list(shape)} but {edit.source!r} has {list(base.tensors[edit.source].shape)}{taken}; "
            "plan again for this base"
        )


def _taken_shape(shape: tuple[int, ...], rows: Rows | None) -> tuple[int, ...] | None:
    """What ``rows`` of a tensor of ``shape`` are together; None where it has no such rows."""
    if rows is None:
        return shape
    count, block = rows.stop - rows.start, len(rows.order)
    there = len(shape) in (1, 2) and 0 <= rows.start < rows.stop <= shape[0]
    ordered = sorted(rows.order) == list(range(block)) and block > 0 and count % block == 0
    return (count, *shape[1:]) if there and ordered else None


def _check_appended(edit: Edit, what: str) -> None:
    if edit.appended is None:
        return
    values, axis = edit.appended.values, edit.appended.axis
    fits = len(edit.shape) == values.ndim and -values.ndim <= axis < values.ndim
    if fits:
        sizes = enumerate(zip(edit.shape, values.shape, strict=True))
        fits = all(new <= size if index == axis % values.ndim else new == size for index, (size, new) in sizes)
    if not fits or not values.is_floating_point():
        raise CheckpointError(
            f"{what} appends {values.dtype} values of shape {list(values.shape)} along axis {axis}, which do not fit "
            f"into {list(edit.shape)}; plan again"
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
