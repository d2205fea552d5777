"""Logistic regression on standardised activations (scikit-learn), its strength chosen by the loss on validation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import RecipeError
from . import Samples

#: Inverse strengths of the L2 penalty, of which one is chosen.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def logistic(train: Samples, validation: Samples) -> tuple[Tensor, float]:
    """Raises RecipeError where scikit-learn is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise RecipeError(
            "the probe 'logistic' needs scikit-learn: pip install 'steer-bake[probes]', or use the probe 'lda'"
        ) from error
    mean = train.values.mean(0)
    deviation = train.values.std(0).clamp_min(1e-6)
    rows, weights = ((train.values - mean) / deviation).numpy(), (train.weights * len(train.values)).numpy()
    found: list[tuple[float, Tensor, float]] = []
    for strength in _STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=300).fit(rows, train.positive.numpy(), sample_weight=weights)
        probe = torch.from_numpy(model.coef_[0]).float() / deviation
        bias = float(model.intercept_[0]) - float(probe @ mean)
        logits = (validation.values @ probe + bias).double()
        loss = functional.binary_cross_entropy_with_logits(
            logits, validation.positive.double(), weight=validation.weights, reduction="sum"
        )
        found.append((float(loss), probe, bias))
    _, probe, bias = min(found, key=lambda one: one[0])
    return probe, bias
