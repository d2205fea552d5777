"""Edit a weight and store it so that what was removed stays removed.

Rounding every element to the nearest bfloat16 leaves errors that add up along the ablated direction: much of a small
edit is below half a unit in the last place and is simply rounded away. So the edit is steered while it is written: what
the rows stored so far still hold along the direction, the rows to come remove as well. What is left at the end is
cancelled by moving a few elements to their other neighbour.

Every column (axis 0) or row (axis 1) is edited on its own, by operations that IEEE 754 defines to the last bit and in a
fixed order: the result depends neither on threads nor on how the matrix was cut along its other axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

from .affine import Affine
from .errors import CheckpointError
from .workspace import Workspace

_TILE_ROWS = 8  # also the unit of the summation order, hence not to be derived from the shape
_TILE_COLUMNS = 8000  # a tile of float32, its product and their sums stay in a core's cache; fewer cost more calls
_BLOCK = 1 << 18  # elements that are transposed at a time
_LEGS = 16  # so many times on the way down a column the edit is steered
_LEAST_AHEAD = 8.0  # average rows that must lie ahead: correcting much with few of them would cost accuracy
_FINE_ROWS = 64  # per direction: half of largest weight, half spread over the smaller ones
_FINE_SPREAD = 3.0  # decades
_DEPENDENT = 1e-6  # a direction with less than this outside the others is one of them


@dataclass(frozen=True, eq=False)
class MatrixEdit:
    """An affine map of the residual stream, made ready for the weights that write it.

    ``x -> x + V gain (V_read^T x) + shift`` where the columns of ``V`` are orthonormal and the first of them,
    ``V_read``, span what the map reads: all that an ablation or a clamp removes, and all that the fitted coefficient of
    a partial ablation is measured on. They are what is protected.
    """

    vectors: Tensor  # [e, d, 1] float64, V^T
    gain: list[list[float]]  # [e][m]
    shift: Tensor | None  # [d, 1]
    legs: list[_Leg]
    fine: Tensor  # rows that may be moved at the end, by decreasing weight; empty where nothing is protected
    protect: bool

    @classmethod
    def of(cls, affine: Affine, *, protect: bool) -> MatrixEdit:
        """``protect``: errors cancel along what ``affine`` reads; otherwise each element is rounded to nearest."""
        read = _orthonormal(affine.right if affine.is_linear else affine.right[:, :0])
        left, shift = affine.left.double(), affine.shift.double()[:, None]
        basis = _orthonormal(torch.cat([read, left], dim=1)) if read.shape[1] else read
        inside = _products(basis, left), _products(read, affine.right.double())
        gain = _sum((inside[0][:, None] * inside[1][None, :]).movedim(-1, 0)) if read.shape[1] else read.T
        count = read.shape[1] if protect else 0
        return cls(
            basis.T[:, :, None].contiguous(),
            gain.tolist(),
            shift if affine.has_shift else None,
            [_Leg.of(rows, basis, count, shift) for rows in _legs(len(basis))] if count else [],
            _fine_rows(read) if count else torch.empty(0, dtype=torch.int64),
            bool(count),
        )

    def into(self, source: Tensor, target: Tensor, axis: int, memory: Workspace) -> None:
        """Write the edit of ``source`` to ``target``, which may be ``source`` itself where the dtypes are the same.

        Both are ``[d, n]`` (axis 0) or ``[n, d]`` (axis 1), of any floating dtype. Arithmetic is in float32, or in
        float64 where either is. NaN and infinity spoil their own column.

        Raises:
            CheckpointError: a finite element would lie beyond the largest float16 number.
        """
        for start in range(0, source.shape[1 - axis], _TILE_COLUMNS):
            old = source.narrow(1 - axis, start, min(_TILE_COLUMNS, source.shape[1 - axis] - start))
            new = target.narrow(1 - axis, start, old.shape[1 - axis])
            if axis == 0:
                self._columns(old, new, memory)
                continue
            columns = memory.take("columns", (old.shape[1], old.shape[0]), old.dtype)
            stored = columns if new.dtype == old.dtype else memory.take("stored", tuple(columns.shape), new.dtype)
            for rows, block, piece in _blocks(old, columns, memory):
                piece.copy_(block.copy_(rows.T))
            self._columns(columns, stored, memory)
            for rows, block, piece in _blocks(new, stored, memory):
                rows.copy_(block.copy_(piece).T)

    def _columns(self, source: Tensor, target: Tensor, memory: Workspace) -> None:
        wide = torch.float64 if torch.float64 in (source.dtype, target.dtype) else torch.float32
        run = _Run.over(source, target, self.vectors.to(wide), len(self.gain[0]) if self.gain else 0, memory)
        legs = [leg.tiles for leg in self.legs] or [slice(None)]
        held = [run.components(tiles) for tiles in legs]
        found = [sum(parts[1:], start=parts[0]) for parts in zip(*held, strict=True)]
        wanted = [sum(starmap(torch.mul, zip(found, row, strict=True)), torch.zeros(())) for row in self.gain]
        shift = None if self.shift is None else self.shift.to(wide)
        if not self.protect or target.dtype.itemsize > 2:  # float32 has no need of it
            run.store(slice(None), wanted, shift, measure=False)
            return
        before = source.index_select(0, self.fine)  # the target may be the source
        steered, error = wanted, [torch.zeros_like(one) for one in found]
        for leg, parts in zip(self.legs, held, strict=True):
            stored = run.store(leg.tiles, steered, shift, measure=True)
            error = [
                so_far + (there - aim)
                for so_far, there, aim in zip(error, stored, leg.aims(parts, wanted), strict=True)
            ]
            steered = leg.steered(wanted, error)
        self._finish(before, target, wanted, shift, error)

    def _finish(
        self, before: Tensor, target: Tensor, wanted: list[Tensor], shift: Tensor | None, error: list[Tensor]
    ) -> None:
        """Decide the fine rows one after another: take the other neighbour where that brings the error closer to 0."""
        total = torch.stack(error)  # [m, c]
        size = _sum(total.square())
        for rows, old in zip(torch.split(self.fine, _FINE_ROWS), torch.split(before, _FINE_ROWS), strict=True):
            weights = self.vectors[:, rows].float()
            exact = old.float()
            for weight, amount in zip(weights, wanted, strict=True):
                exact += weight * amount
            if shift is not None:
                exact += shift[rows]
            nearest = target.index_select(0, rows)
            other = _other_neighbour(nearest, exact)
            gap = other.float() - nearest.float()
            changes = torch.stack([gap * weight for weight in weights[: len(error)]], dim=1)
            moved = torch.zeros_like(gap, dtype=torch.bool)
            for change, better in zip(changes, moved, strict=True):
                there = total + change
                closer = _sum(there.square())
                torch.lt(closer, size, out=better)
                total = torch.where(better, there, total)
                size = torch.where(better, closer, size)
            target.index_copy_(0, rows, torch.where(moved, other, nearest))


@dataclass(frozen=True, eq=False)
class _Leg:
    """A stretch of rows, after which the edit is steered."""

    tiles: slice
    overlap: list[list[float]]  # [m][e] V_read^T V over these rows
    shift: list[float]  # [m] V_read^T shift over these rows
    ahead: list[float]  # [m] squared weight of the rows behind this leg; 0 where that is too little to correct with

    @classmethod
    def of(cls, rows: slice, basis: Tensor, count: int, shift: Tensor) -> _Leg:
        here, later = basis[rows], basis[rows.stop :, :count]
        ahead = _sum(later.square()) if len(later) else torch.zeros(count)
        enough = ahead * len(basis) >= _LEAST_AHEAD
        return cls(
            slice(rows.start // _TILE_ROWS, -(-rows.stop // _TILE_ROWS)),
            _products(here[:, :count], here).tolist(),
            _products(here[:, :count], shift[rows])[:, 0].tolist(),
            torch.where(enough, ahead, 0.0).tolist(),
        )

    def aims(self, held: list[Tensor], wanted: list[Tensor]) -> Iterator[Tensor]:
        """What the exact edit of these rows holds along each protected direction."""
        for aim, row, shift in zip(held, self.overlap, self.shift, strict=True):
            for amount, share in zip(wanted, row, strict=True):
                aim = aim + amount * share
            yield aim + shift

    def steered(self, wanted: list[Tensor], error: list[Tensor]) -> list[Tensor]:
        """``wanted``, and the errors so far taken out by the rows ahead."""
        out = list(wanted)
        for index, (one, ahead) in enumerate(zip(error, self.ahead, strict=True)):
            if ahead:
                out[index] = wanted[index] - torch.nan_to_num(one / ahead, 0.0, 0.0, 0.0)
        return out


@dataclass(frozen=True, eq=False)
class _Run:
    """Some columns on their way from ``source`` to ``target``, a tile of rows at a time."""

    source: tuple[Tensor, ...]  # tiles [_TILE_ROWS, c]; the last may have fewer rows
    target: tuple[Tensor, ...]
    weights: list[tuple[Tensor, ...]]  # [e] of tiles [_TILE_ROWS, 1]
    tile: Tensor  # [_TILE_ROWS, c]
    product: Tensor
    sums: list[Tensor]  # [m] of [_TILE_ROWS, c]

    @classmethod
    def over(cls, source: Tensor, target: Tensor, vectors: Tensor, read: int, memory: Workspace) -> _Run:
        def take(use: str) -> Tensor:
            return memory.take(use, (_TILE_ROWS, source.shape[1]), vectors.dtype)

        return cls(
            torch.split(source, _TILE_ROWS),
            torch.split(target, _TILE_ROWS),
            [torch.split(vector, _TILE_ROWS) for vector in vectors],
            take("tile"),
            take("product"),
            [take(f"sum {index}") for index in range(read)],
        )

    def components(self, tiles: slice) -> list[Tensor]:
        """Along each direction that is read: what the source holds in ``tiles``; ``[m]`` of ``[c]``."""
        for one in self.sums:
            one.zero_()
        for index in range(*tiles.indices(len(self.source))) if self.sums else ():
            self._add_components(index, self.tile[: len(self.source[index])].copy_(self.source[index]))
        return [_sum(one) for one in self.sums]

    def store(self, tiles: slice, amounts: list[Tensor], shift: Tensor | None, *, measure: bool) -> list[Tensor]:
        """Write ``tiles`` with ``amounts`` [e] of [c] of the vectors added; what is now stored along each direction."""
        for one in self.sums:
            one.zero_()
        for index in range(*tiles.indices(len(self.source))):
            rows = len(self.source[index])
            exact, product = self.tile[:rows], self.product[:rows]
            exact.copy_(self.source[index])
            for weights, amount in zip(self.weights, amounts, strict=True):
                exact += torch.mul(weights[index], amount, out=product)
            if shift is not None:
                exact += shift[index * _TILE_ROWS : index * _TILE_ROWS + rows]
            stored = self.target[index].copy_(exact)
            if stored.dtype is torch.float16:
                check_range(stored, exact)
            if measure:
                self._add_components(index, exact.copy_(stored))
        return [_sum(one) for one in self.sums]

    def _add_components(self, index: int, values: Tensor) -> None:
        rows = len(values)
        for sums, weights in zip(self.sums, self.weights, strict=False):
            sums[:rows] += torch.mul(values, weights[index], out=self.product[:rows])


def residual(stored: Tensor, original: Tensor, direction: Tensor, axis: int) -> float:
    """``|r^T W'| / |r^T W|``: how much of ``direction`` an edited weight still writes; in float64.

    ``stored`` and ``original`` have one shape; ``direction`` is ``[d]``, or ``[d, m]`` for m directions at once.
    """
    columns = direction.double().reshape(direction.shape[0], -1)
    return float(_along(stored, columns, axis).norm() / _along(original, columns, axis).norm())


def _along(weight: Tensor, columns: Tensor, axis: int) -> Tensor:
    """``R^T W`` in float64, by pieces of the free axis: no float64 copy of a large matrix."""
    flat = weight.movedim(axis, -1).reshape(-1, len(columns))
    starts = range(0, len(flat), _TILE_COLUMNS)
    return torch.cat([flat[start : start + _TILE_COLUMNS].double() @ columns for start in starts])


def _blocks(rows: Tensor, columns: Tensor, memory: Workspace) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pieces of ``rows`` [n, d] and of ``columns`` [d, n] that match, and a block [d, k] in between.

    Transposing is fast from and to contiguous memory that a core's cache holds.
    """
    size = max(1, _BLOCK // max(1, len(columns)))
    for part, piece in zip(torch.split(rows, size), torch.split(columns, size, dim=1), strict=True):
        yield part, memory.take("block", tuple(piece.shape), piece.dtype), piece


def _legs(width: int) -> list[slice]:
    size = max(1, width // _TILE_ROWS // _LEGS) * _TILE_ROWS
    return [slice(start, min(width, start + size)) for start in range(0, width, size)]


def _fine_rows(basis: Tensor) -> Tensor:
    """Rows by decreasing weight: those of largest weight, then weights spread evenly on a logarithmic scale."""
    weight, order = _sum(basis.T.square()).sqrt().sort(descending=True, stable=True)
    half = min(len(order), _FINE_ROWS * basis.shape[1] // 2)
    wanted = weight[0] * torch.logspace(0, -_FINE_SPREAD, half, dtype=weight.dtype)
    spread = torch.searchsorted(-weight, -wanted).clamp_(max=len(order) - 1)
    return order[torch.unique(torch.cat([torch.arange(half), spread]))]


def _other_neighbour(nearest: Tensor, exact: Tensor) -> Tensor:
    """The next number from ``nearest`` on the side where ``exact`` lies; ``nearest`` itself where they are equal."""
    # Adding 1 to the bits of a float moves it away from zero, whatever its sign.
    step = (exact.abs() - nearest.float().abs()).sign_().to(torch.int16)
    return step.add_(nearest.view(torch.int16)).view(nearest.dtype)


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the span of ``vectors`` [d, k], float64 ``[d, m]``; Gram-Schmidt in a fixed order."""
    found: list[Tensor] = []
    for vector in vectors.double().unbind(1):
        length = _sum(vector.square()).sqrt()
        for _ in range(2):  # the second round removes what the first left by cancellation
            for one in found:
                vector = vector - one * _sum(one * vector)
        left = _sum(vector.square()).sqrt()
        if left > _DEPENDENT * length:
            found.append(vector / left)
    return torch.stack(found, dim=1) if found else vectors[:, :0].double()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right``, summed in a fixed order."""
    return _sum(left[:, :, None] * right[:, None, :])


def _sum(values: Tensor) -> Tensor:
    """Sum over the first axis in an order that its length alone decides (a matrix product's depends on threads)."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        folded = values[:half].clone()
        folded[: len(values) - half] += values[half:]
        values = folded
    return values[0]


def check_range(stored: Tensor, exact: Tensor) -> None:
    """Refuse where ``stored`` became infinite and ``exact`` is not."""
    if bool(stored.sum(dtype=torch.float32).isfinite()):
        return
    beyond = exact[stored.isinf() & exact.isfinite()]
    if len(beyond):
        raise CheckpointError(
            f"the edited weight holds {float(beyond.abs().max()):.6g}, beyond the largest {stored.dtype} number "
            f"{torch.finfo(stored.dtype).max:.6g}; lower the coefficient, or start from a checkpoint in bfloat16"
        )
