"""The normal of a linear probe: logistic regression between the two sides, with a ridge penalty.

``min_w,b  mean_i w_i log(1 + exp(-y_i (w.h_i + b))) + lambda/2 |w|^2``, both sides with the same total weight however
many prompts each has. The probe that gates the steering of arXiv 2603.13359 (equations 5 and 6) is this one, there
fitted by AdamW; here by Newton steps to the optimum, which with a penalty exists and is unique.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RecipeError
from . import Statistics

NEEDS_ROWS = True

_STEPS = 100  # Newton needs about ten; a problem that needs more is as good as solved


@dataclass(frozen=True)
class Options:
    ridge: float = 0.01  # lambda as a multiple of trace(covariance) / d


@dataclass(frozen=True, eq=False)
class Probe:
    """``sigmoid(weight . h + bias)`` is the probability of the positive side."""

    weight: Tensor  # [d] float64
    bias: float

    def __call__(self, rows: Tensor) -> Tensor:
        """The log odds [n] of ``rows`` [n, d]."""
        return rows.double() @ self.weight + self.bias


def logistic_probe(positive: Statistics, negative: Statistics, options: Options | None = None) -> tuple[Tensor, float]:
    """The weight [d] of the probe; the scale is the distance of the means along it.

    Raises:
        RecipeError: the ridge is not positive, or all prompts are alike.
    """
    probe = fit(positive, negative, (options or Options()).ridge)
    moved = positive.mean.double() - negative.mean.double()
    return probe.weight.float(), float(moved @ probe.weight) / float(probe.weight.norm())


def fit(positive: Statistics, negative: Statistics, ridge: float = Options.ridge) -> Probe:
    """The probe (raises as :func:`logistic_probe` does)."""
    if positive.rows is None or negative.rows is None:
        raise ValueError("a probe needs the rows of both sides")
    rows = torch.cat([positive.rows, negative.rows]).double()
    middle = rows.mean(0)
    # With fewer rows than dimensions the optimum lies in their span: the problem is solved there.
    _, sizes, axes = torch.linalg.svd(rows - middle, full_matrices=False)
    penalty = ridge * float(sizes.square().sum()) / rows.shape[0] / rows.shape[1]
    if not penalty > 0:
        raise RecipeError("logistic_probe: the ridge must be positive and the prompts must differ")
    inner = torch.cat([(rows - middle) @ axes.T, rows.new_ones(len(rows), 1)], dim=1)  # [n, r + 1]
    sign = torch.cat([torch.ones(positive.count), -torch.ones(negative.count)]).double()
    share = torch.cat([torch.full((side.count,), 0.5 / side.count) for side in (positive, negative)]).double()
    found = _newton(inner, sign, share, penalty)
    weight = axes.T @ found[:-1]
    return Probe(weight, float(found[-1] - middle @ weight))


def _newton(inner: Tensor, sign: Tensor, share: Tensor, penalty: float) -> Tensor:
    penalties = torch.full((inner.shape[1],), penalty, dtype=torch.float64)
    penalties[-1] = 1e-9  # next to nothing, so that the bias stays free and the system solvable

    def loss(at: Tensor) -> float:
        terms = torch.nn.functional.softplus(-sign * (inner @ at))
        return float(share @ terms + (penalties * at.square()).sum() / 2)

    at, here = inner.new_zeros(inner.shape[1]), float("inf")
    for _ in range(_STEPS):
        here = loss(at)
        odds = torch.sigmoid(-sign * (inner @ at))
        gradient = -inner.T @ (share * sign * odds) + penalties * at
        curve = inner.T @ ((share * odds * (1 - odds))[:, None] * inner) + torch.diag(penalties)
        step, size = torch.linalg.solve(curve, gradient), 1.0
        while size > 1e-6 and loss(at - size * step) > here:
            size /= 2
        at = at - size * step
        if float(gradient.norm()) < 1e-9 or here - loss(at) < 1e-14:
            break
    return at
