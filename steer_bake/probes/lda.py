"""Ridge linear discriminant: ``(S + lambda tr(S)/d I)^-1 (m1 - m0)``, S the covariance within the two kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Samples, auroc

#: Of the ridge, in mean variances; one is chosen by the area under the curve on prompts kept aside.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def lda(train: Samples) -> tuple[Tensor, float]:
    """The midpoint between the two means has logit 0."""
    most, aside = train.apart()
    areas = [
        auroc(aside.values @ probe, aside.positive, aside.weights) for probe, _ in (_fitted(most, r) for r in _RIDGES)
    ]
    return _fitted(train, _RIDGES[areas.index(max(areas))])


def _fitted(train: Samples, ridge: float) -> tuple[Tensor, float]:
    means, within = [], torch.zeros(train.values.shape[1], train.values.shape[1], dtype=torch.float64)
    for side in (train.positive, ~train.positive):
        rows, weights = train.values[side].double(), train.weights[side]
        mean = (weights[:, None] * rows).sum(0) / weights.sum()
        within += (weights[:, None] * (rows - mean)).T @ (rows - mean)
        means.append(mean)
    amount = ridge * float(within.diagonal().mean()) * torch.eye(len(within), dtype=torch.float64)
    probe = torch.linalg.solve(within + amount, means[0] - means[1])
    return probe.float(), -float(probe @ (means[0] + means[1])) / 2
