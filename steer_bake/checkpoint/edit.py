"""What becomes of one tensor, and whether that fits the base."""

from __future__ import annotations

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


@dataclass(frozen=True, eq=False)
class Edit:
    """New content of one tensor: ``affine`` applied along ``axis`` to the tensor ``source`` (to zeros where None).

    ``tensor`` is the name in the output. Where ``source`` is the same tensor the edit is in place; where the base has
    no tensor of that name it goes into the one extra shard (an untied head, a new bias, a carrier layer's matrices).
    ``shape`` is that of the output: the source's, longer along ``appended.axis`` where something is appended.
    """

    tensor: str
    shape: tuple[int, ...]
    dtype: str  # safetensors spelling
    affine: Affine
    axis: int = 0
    source: str | None = None
    appended: Appended | None = None
    part: tuple[int, int] | None = None  # the rows of the source that this tensor begins as; None: all of it
    # Of a new matrix, zero but for what these say:
    only: tuple[int, int] | None = None  # the vectors (columns for axis 0) that the shift goes to; None: all
    diagonals: tuple[Diagonal, ...] = ()

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
    found = () if edit.source is None else base.tensors[edit.source].shape
    if edit.part is not None and found:
        first, stop = edit.part
        found = (stop - first, *found[1:]) if 0 <= first < stop <= found[0] else ()
    if edit.source is not None and found != edit.old_shape:
        raise CheckpointError(
            f"{what} has shape {list(shape)} but {edit.source!r} has {list(found)}; plan again for this base"
        )


def _check_appended(edit: Edit, what: str) -> None:
    if edit.appended is None:
        return
    values, axis = edit.appended.values, edit.appended.axis
    if edit.source is None:
        raise CheckpointError(f"{what} appends to a tensor that the base does not hold; name its source")
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
