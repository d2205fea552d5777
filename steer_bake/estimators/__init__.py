"""How a direction is computed from activations: each file is one function of the statistics of two prompt sets.

``<name>(positive: Statistics, negative: Statistics) -> (vector [d], scale)``: ``vector`` points from negative to
positive and need not be normalised; ``scale`` is its natural length in stream units. A module that needs every row and
not only the moments says ``NEEDS_ROWS = True``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was measured at one site over the prompts of one label, in float32 or wider."""

    count: int
    mean: Tensor  # [d]
    norm: float  # mean of |h| over the prompts
    rows: Tensor | None = None  # [count, d] in prompt order, only where an estimator needs them
