"""``(Sigma + lambda I)^-1`` times a vector, by whichever form is the smaller system.

With fewer rows than dimensions ``Sigma = A^T A`` with ``A`` [n, d], and the n x n system ``G = lambda I + A A^T`` gives
the same answer (Woodbury): ``(v - A^T G^-1 A v) / lambda``. Everything is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import RecipeError
from . import Statistics


def ridge_solve(side: Statistics, right: Tensor, ridge: float, relative: bool) -> Tensor:
    """``(Sigma + lambda I)^-1 right`` [d] float64, ``Sigma`` the weighted covariance of ``side``.

    ``lambda`` is ``ridge``, times ``trace(Sigma) / d`` where it is ``relative``.

    Raises:
        RecipeError: lambda is no positive number (a relative one is 0 where all prompts are alike).
    """
    spread = _spread(side) if side.rows is not None and side.count < side.rows.shape[1] else None
    return _solve(spread, None if spread is not None else covariance(side), right.double(), ridge, relative)


def pooled_solve(one: Statistics, other: Statistics, right: Tensor, ridge: float, relative: bool) -> Tensor:
    """As :func:`ridge_solve` with the covariance within both sides, each with its share of the prompts."""
    total = one.count + other.count
    shares = one.count / total, other.count / total
    if one.rows is not None and other.rows is not None and total < one.rows.shape[1]:
        spread = torch.cat([math.sqrt(share) * _spread(side) for share, side in zip(shares, (one, other), strict=True)])
        return _solve(spread, None, right.double(), ridge, relative)
    pooled = shares[0] * covariance(one) + shares[1] * covariance(other)
    return _solve(None, pooled, right.double(), ridge, relative)


def covariance(side: Statistics) -> Tensor:
    """The weighted covariance [d, d] float64 of ``side``."""
    if side.covariance is not None:
        return side.covariance
    rows = _spread(side)
    return rows.T @ rows


def _spread(side: Statistics) -> Tensor:
    """``A`` [count, d] with ``A^T A`` the covariance."""
    if side.rows is None:
        raise ValueError("neither rows nor a covariance were collected for this side")
    weights = side.rows.new_ones(side.count, dtype=torch.float64) if side.weights is None else side.weights.double()
    return (weights / weights.sum()).sqrt()[:, None] * (side.rows.double() - side.centre)


def _solve(spread: Tensor | None, dense: Tensor | None, right: Tensor, ridge: float, relative: bool) -> Tensor:
    width = right.shape[0]
    trace = float(spread.square().sum()) if spread is not None else float(dense.trace()) if dense is not None else 0.0
    amount = ridge * trace / width if relative else ridge
    if not (math.isfinite(amount) and amount > 0):
        raise RecipeError(
            f"the ridge is {amount:g}, and must be a positive number; raise 'ridge', or give prompts that differ"
        )
    if spread is not None:
        gram = spread @ spread.T
        gram.diagonal().add_(amount)
        found: Tensor = (right - spread.T @ torch.linalg.solve(gram, spread @ right)) / amount
        return found
    assert dense is not None
    found = torch.linalg.solve(dense + amount * torch.eye(width, dtype=dense.dtype), right)
    return found
