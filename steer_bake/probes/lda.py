"""Ridge linear discriminant: ``(S + lambda tr(S)/d I)^-1 (m1 - m0)``, S the covariance within the two kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Samples, auroc

#: Of the ridge, in mean variances; one is chosen by the area under the curve on validation.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0)


def lda(train: Samples, validation: Samples) -> tuple[Tensor, float]:
    """The midpoint between the two means has logit 0."""
    means, within = [], torch.zeros(train.values.shape[1], train.values.shape[1], dtype=torch.float64)
    for side in (train.positive, ~train.positive):
        rows, weights = train.values[side].double(), train.weights[side]
        mean = (weights[:, None] * rows).sum(0) / weights.sum()
        within += (weights[:, None] * (rows - mean)).T @ (rows - mean)
        means.append(mean)
    ridge = float(within.diagonal().mean()) * torch.eye(len(within), dtype=torch.float64)
    found: list[tuple[float, Tensor, float]] = []
    for amount in _RIDGES:
        probe = torch.linalg.solve(within + amount * ridge, means[0] - means[1])
        bias = -float(probe @ (means[0] + means[1])) / 2
        area = auroc(validation.values.double() @ probe, validation.positive, validation.weights)
        found.append((area, probe.float(), bias))
    _, probe, bias = max(found, key=lambda one: one[0])
    return probe, bias
