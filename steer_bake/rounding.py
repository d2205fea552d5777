"""Direction-aware rounding: store an edited weight so that what was removed stays removed.

Rounding every element to the nearest bfloat16 leaves errors that add up along the ablated direction: much of a small
edit is below half a unit in the last place and is simply rounded away. The error of one element is free to be either of
two values, so the elements of a column can be rounded such that their errors cancel along the direction.

Every column (axis 0) or row (axis 1) is rounded on its own, by operations that IEEE 754 defines to the last bit and
in a fixed order: the result depends neither on threads nor on how the matrix was cut along its other axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .affine import Affine
from .errors import CheckpointError

#: A tile has under 32768 elements: torch then works in the calling thread, with no barrier that waits for a busy core.
_TILE_ROWS = 16  # also the unit of the summation order, hence not to be derived from the shape
_TILE_COLUMNS = 2000
_COARSE_ROWS = (128, 2048)  # rows of largest weight, shifted together: d/8, but at least and at most so many
_COARSE_STEPS = 2
_FINE_ROWS = 128  # half of largest weight, half spread over the smaller ones, decided one by one
_NOISE = 0.045  # squared error of rounding log-uniform numbers, over (machine epsilon x norm)^2: 0.375 / (12 ln 2)
_BUDGET = 0.3  # of that may be added in one column; a whole matrix takes about 0.03
_DEPENDENT = 1e-4  # a direction with less than this outside the others is one of them


def round_into(exact: Tensor, dtype: torch.dtype, affine: Affine, axis: int) -> Tensor:
    """``exact`` in ``dtype``, each element one of its two neighbours, errors cancelling along what ``affine`` reads.

    Protected is the span of ``affine.right``: it holds all that an ablation or a clamp removes, and all that the fitted
    coefficient of a partial ablation is measured on. Vectors, and anything under an affine without a linear part, are
    rounded to nearest. NaN and infinity in ``exact`` are stored as they are.

    Args:
        exact: float32, ``[d, n]`` (axis 0), ``[n, d]`` (axis 1), or a stack of such matrices; the edited weight.
        dtype: torch.float32 (returned as it is), torch.bfloat16 or torch.float16.
        axis: the residual axis, of ``d`` components.

    Raises:
        CheckpointError: a finite element lies beyond the largest number of ``dtype``.
    """
    if dtype == exact.dtype:
        return exact
    stored = torch.empty_like(exact, dtype=dtype)
    basis = _orthonormal(affine.right) if exact.ndim > 1 and affine.is_linear else affine.right[:, :0]
    if not basis.shape[1]:
        return _checked(stored.copy_(exact), exact)
    rows = _Rows.of(basis)
    for source, target in _matrices(exact, stored, axis % exact.ndim):
        for start in range(0, source.shape[1], _TILE_COLUMNS):
            part = slice(start, start + _TILE_COLUMNS)
            columns = source[:, part]
            columns = columns if columns.stride(1) == 1 else columns.contiguous()
            target[:, part] = _round_columns(columns, dtype, basis, rows)
    return stored


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


def _matrices(exact: Tensor, stored: Tensor, axis: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of views ``[d, n]``, residual axis first."""
    if exact.ndim > 2:
        free = 0 if axis else 1
        pairs = zip(exact.unbind(free), stored.unbind(free), strict=True)
        return [pair for one in pairs for pair in _matrices(*one, axis - 1 if axis else 0)]
    return [(exact, stored) if axis == 0 else (exact.T, stored.T)]


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of the residual axis that may leave the nearest value, chosen from the directions alone."""

    index: Tensor  # [K] rows, by decreasing weight; the first ``coarse`` take part in the coarse steps
    weight: Tensor  # [K, m] their components of the protected directions
    coarse: int
    power: Tensor  # [m, 1] sum of squared weights over the coarse rows
    fine: list[int]  # positions in ``index``, in the order in which they are decided

    @classmethod
    def of(cls, basis: Tensor) -> _Rows:
        size = _sum(basis.T.square())
        order = torch.argsort(size, descending=True, stable=True)
        few, many = _COARSE_ROWS
        coarse = min(len(order), many, max(few, len(order) // 8 // _TILE_ROWS * _TILE_ROWS))
        tail = _spread(size[order].sqrt(), coarse, _FINE_ROWS // 2)
        index = torch.cat([order[:coarse], order[tail]])
        weight = basis[index]
        power = _sum(weight[:coarse].square())[:, None]
        heads = min(coarse, _FINE_ROWS - len(tail))
        return cls(index, weight, coarse, power, [*range(heads), *range(coarse, len(index))])


def _spread(size: Tensor, start: int, count: int) -> Tensor:
    """Up to ``count`` positions of ``size`` (decreasing) from ``start`` on, logarithms of the values spread evenly."""
    left = len(size) - start
    if left <= count:
        return torch.arange(start, len(size))
    wanted = size[start] * torch.logspace(0, -3, count)
    nearest = torch.searchsorted(-size[start:].contiguous(), -wanted)
    latest = left - count + torch.arange(count)
    distinct = torch.cummax(nearest - torch.arange(count), 0).values + torch.arange(count)
    return start + torch.minimum(distinct, latest)


def _round_columns(exact: Tensor, dtype: torch.dtype, basis: Tensor, rows: _Rows) -> Tensor:
    """``exact`` [d, c] in ``dtype``: rounded to nearest, then single elements flipped to their other neighbour."""
    stored = torch.empty_like(exact, dtype=dtype)
    state = _State.after_plain_rounding(exact, stored, basis)
    if not state.error.isfinite().all():
        _checked(stored, exact)
    tiles = [_Tile.of(exact, stored, rows, start) for start in range(0, len(rows.index), _TILE_ROWS)]
    state = _coarse(state, tiles, rows)
    _fine(state, tiles, rows)
    for tile in tiles:
        stored.index_copy_(0, tile.index, torch.where(tile.flipped, tile.other, tile.nearest))
    return stored


@dataclass(frozen=True, eq=False)
class _State:
    """Where the columns stand."""

    error: Tensor  # [m, c] rounding error along each protected direction
    room: Tensor  # [c] by how much the squared rounding error may still grow

    @classmethod
    def after_plain_rounding(cls, exact: Tensor, stored: Tensor, basis: Tensor) -> _State:
        """Round ``exact`` into ``stored`` and measure; one pass over both."""
        along = [exact.new_zeros(_TILE_ROWS, exact.shape[1]) for _ in basis.T]
        square, error, product = (torch.zeros_like(along[0]) for _ in range(3))
        for start in range(0, len(exact), _TILE_ROWS):
            part = exact[start : start + _TILE_ROWS]
            count = len(part)
            nearest = stored[start : start + count].copy_(part)
            torch.sub(error[:count].copy_(nearest), part, out=error[:count])
            for sums, weight in zip(along, basis[start : start + count].T, strict=True):
                sums[:count] += torch.mul(error[:count], weight[:, None], out=product[:count])
            square[:count] += torch.mul(part, part, out=product[:count])
        room = _sum(square) * (_BUDGET * _NOISE * torch.finfo(stored.dtype).eps ** 2)
        return cls(torch.stack([_sum(sums) for sums in along]), room)


@dataclass(frozen=True, eq=False)
class _Tile:
    """Some of the rows that may flip, and what a flip changes."""

    index: Tensor  # [k] rows
    weight: Tensor  # [k, m]
    nearest: Tensor  # [k, c]
    other: Tensor  # [k, c] the neighbour on the other side of the exact value; the same where that is representable
    middle: Tensor  # [k, c] from the exact value to the middle of the two, signed
    change: list[Tensor]  # m of [k, c]: what a flip adds to the error along each protected direction
    cost: Tensor  # [k, c] by how much a flip makes the squared error grow; never negative
    flipped: Tensor  # [k, c] bool, filled in by the two stages

    @classmethod
    def of(cls, exact: Tensor, stored: Tensor, rows: _Rows, start: int) -> _Tile:
        index, weight = rows.index[start : start + _TILE_ROWS], rows.weight[start : start + _TILE_ROWS]
        value, nearest = exact.index_select(0, index), stored.index_select(0, index)
        rounded = nearest.float()
        # Adding 1 to the bits of a float moves it away from zero, whatever its sign.
        step = (value.abs() - rounded.abs()).sign_().to(torch.int16)
        other = step.add_(nearest.view(torch.int16)).view(stored.dtype)
        gap = other.float().sub_(rounded)
        middle = rounded.sub_(value).add_(gap * 0.5)
        cost = (gap * middle).mul_(2.0)  # (error + gap)^2 - error^2
        change = [gap * column[:, None] for column in weight.T]
        return cls(index, weight, nearest, other, middle, change, cost, torch.zeros_like(gap, dtype=torch.bool))


def _coarse(start: _State, tiles: list[_Tile], rows: _Rows) -> _State:
    """Shift the coarse rows by a multiple of the direction and flip what the shift carries over the middle.

    For a given change along the direction these are the flips that cost least: the multiple is the Lagrange multiplier
    of that least-squares problem. The first step takes the columns to answer linearly, the next corrects by what they
    answered.
    """
    tiles = tiles[: -(-rows.coarse // _TILE_ROWS)]
    best, size = start, _sum(start.error.square())
    shift = -start.error / rows.power
    for _ in range(_COARSE_STEPS):
        flips = [_beyond(tile, shift) for tile in tiles]
        change, cost = _effect(tiles, flips)
        error, room = start.error + change, start.room - cost
        closer = _sum(error.square())
        better = (closer < size).logical_and_(room >= 0)
        best = _State(torch.where(better, error, best.error), torch.where(better, room, best.room))
        size = torch.where(better, closer, size)
        for flip, tile in zip(flips, tiles, strict=True):
            torch.where(better, flip, tile.flipped, out=tile.flipped)
        shift = shift / (-change / start.error).clamp_(0.5, 2.0)
    return best


def _beyond(tile: _Tile, shift: Tensor) -> Tensor:
    """Which elements of ``tile`` a shift by ``weight . shift`` carries over the middle: bool ``[k, c]``."""
    moved = shift[0] * tile.weight[:, :1]
    for one in range(1, len(shift)):
        moved += shift[one] * tile.weight[:, one, None]
    return moved.div_(tile.middle) > 1.0


def _effect(tiles: list[_Tile], flips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What flipping ``flips`` changes: the error along each direction ``[m, c]``, and the squared error ``[c]``."""
    width, none = flips[0].shape[1], torch.zeros(())
    sums = [torch.zeros(_TILE_ROWS, width) for _ in range(len(tiles[0].change) + 1)]
    for tile, flip in zip(tiles, flips, strict=True):
        for total, values in zip(sums, [*tile.change, tile.cost], strict=True):
            total[: len(flip)] += torch.where(flip, values, none)
    *change, cost = (_sum(total) for total in sums)
    return torch.stack(change), cost


def _fine(state: _State, tiles: list[_Tile], rows: _Rows) -> None:
    """Decide the fine rows one after another: flip an element, or back, where that brings the error closer to 0."""
    error, room, size = state.error.clone(), state.room.clone(), _sum(state.error.square())
    moved, none = torch.empty_like(error), torch.zeros(())
    better, allowed = (torch.empty_like(room, dtype=torch.bool) for _ in range(2))
    for tile, chosen in _by_tile(tiles, rows.fine):
        back = torch.where(tile.flipped[chosen], -1.0, 1.0)
        changes = torch.stack([values[chosen] * back for values in tile.change], dim=1)
        costs = tile.cost[chosen] * back
        for flipped, change, cost in zip(tile.flipped[chosen], changes, costs, strict=True):
            torch.add(error, change, out=moved)
            closer = _sum(moved.square())
            torch.lt(closer, size, out=better)
            better &= torch.le(cost, room, out=allowed)
            torch.where(better, moved, error, out=error)
            torch.where(better, closer, size, out=size)
            room -= torch.where(better, cost, none)
            flipped ^= better


def _by_tile(tiles: list[_Tile], positions: list[int]) -> Iterator[tuple[_Tile, slice]]:
    """``positions`` among the rows of ``tiles``, increasing, as runs inside one tile."""
    for number, tile in enumerate(tiles):
        inside = [position - number * _TILE_ROWS for position in positions if position // _TILE_ROWS == number]
        if inside:
            yield tile, slice(inside[0], inside[-1] + 1)


def _orthonormal(vectors: Tensor) -> Tensor:
    """An orthonormal basis of the span of ``vectors`` [d, k], float32 ``[d, m]``; Gram-Schmidt in a fixed order."""
    found: list[Tensor] = []
    for vector in vectors.double().unbind(1):
        length = _sum(vector.square()).sqrt()
        for _ in range(2):  # the second round removes what the first left by cancellation
            for one in found:
                vector = vector - one * _sum(one * vector)
        left = _sum(vector.square()).sqrt()
        if left > _DEPENDENT * length:
            found.append(vector / left)
    return torch.stack(found, dim=1).float() if found else vectors[:, :0]


def _sum(values: Tensor) -> Tensor:
    """Sum over the first axis in an order that its length alone decides (a matrix product's depends on threads)."""
    while len(values) > 1:
        half = (len(values) + 1) // 2
        folded = values[:half].clone()
        folded[: len(values) - half] += values[half:]
        values = folded
    return values[0]


def _checked(stored: Tensor, exact: Tensor) -> Tensor:
    """``stored``, or a refusal where it became infinite and ``exact`` is not."""
    beyond = exact[stored.isinf() & exact.isfinite()]
    if len(beyond):
        raise CheckpointError(
            f"the edited weight holds {float(beyond.abs().max()):.6g}, beyond the largest {stored.dtype} number "
            f"{torch.finfo(stored.dtype).max:.6g}; lower the coefficient, or start from a checkpoint in bfloat16"
        )
    return stored
