"""Logistic regression on standardised activations (scikit-learn); its strength is chosen on prompts kept aside."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import RecipeError
from . import Samples

#: Inverse strengths of the L2 penalty, of which one is chosen.
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def logistic(train: Samples) -> tuple[Tensor, float]:
    """Raises RecipeError where scikit-learn is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise RecipeError(
            "the probe 'logistic' needs scikit-learn: pip install 'steer-bake[probes]', or use the probe 'lda'"
        ) from error
    most, aside = train.apart()
    losses = [_loss(*_fitted(LogisticRegression, most, strength), aside) for strength in _STRENGTHS]
    return _fitted(LogisticRegression, train, _STRENGTHS[losses.index(min(losses))])


def _fitted(kind: Any, train: Samples, strength: float) -> tuple[Tensor, float]:
    mean = train.values.mean(0)
    deviation = train.values.std(0).clamp_min(1e-6)
    rows, weights = ((train.values - mean) / deviation).numpy(), (train.weights * len(train.values)).numpy()
    with warnings.catch_warnings():
        # The weakest penalties take longer than that, and longer would only overfit more: prompts kept aside decide.
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        model = kind(C=strength, max_iter=300).fit(rows, train.positive.numpy(), sample_weight=weights)
    probe = torch.from_numpy(model.coef_[0]).float() / deviation
    return probe, float(model.intercept_[0]) - float(probe @ mean)


def _loss(probe: Tensor, bias: float, aside: Samples) -> float:
    logits = (aside.values @ probe + bias).double()
    return float(
        functional.binary_cross_entropy_with_logits(
            logits, aside.positive.double(), weight=aside.weights, reduction="sum"
        )
    )
