"""How the probe of a gate is fitted: each file is one function of what the MLP reads on two kinds of prompts.

``<name>(train: Samples) -> (probe [d], bias)``: the logit ``probe . x + bias`` is high where the gate shall open. Its
scale and the threshold are settled afterwards, on other prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Samples:
    """Activations at one site: one row for each token that generation passes through."""

    values: Tensor  # [n, d] float32
    positive: Tensor  # [n] bool
    prompt: Tensor  # [n] long: the number of the prompt that a row is of
    last: Tensor  # [n] bool: the prompt's last token, behind which the answer begins

    @property
    def weights(self) -> Tensor:
        """[n] float64: every prompt of a kind weighs the same, both kinds the same, 1 in all."""
        tokens = torch.bincount(self.prompt).double()[self.prompt]
        weights = 1 / tokens
        for side in (self.positive, ~self.positive):
            weights[side] /= 2 * weights[side].sum()
        return weights

    def apart(self) -> tuple[Samples, Samples]:
        """Without every fourth prompt of either kind, and these: for choosing a strength. Of few prompts, all twice."""
        aside = torch.zeros(len(self.prompt), dtype=torch.bool)
        for side in (self.positive, ~self.positive):
            fourth = torch.unique(self.prompt[side])[3::4]
            if not len(fourth):
                return self, self
            aside |= torch.isin(self.prompt, fourth)
        return self._only(~aside), self._only(aside)

    def _only(self, rows: Tensor) -> Samples:
        return Samples(self.values[rows], self.positive[rows], self.prompt[rows], self.last[rows])


def auroc(scores: Tensor, positive: Tensor, weights: Tensor) -> float:
    """The chance that a positive row scores higher than a negative one, ties counting half; all [n]."""
    order = scores[~positive].argsort()
    negative = scores[~positive][order]
    below = torch.cat([weights.new_zeros(1), weights[~positive][order].cumsum(0)])
    lower, upper = (below[torch.searchsorted(negative, scores[positive], right=right)] for right in (False, True))
    wins = (weights[positive] * (lower + upper) / 2).sum()
    return float(wins / (weights[positive].sum() * below[-1]))


def youden(logits: Tensor, positive: Tensor, weights: Tensor) -> float:
    """The threshold with the most true less false positives; in the middle of the gap where it lies in one. All [n]."""
    order = logits.argsort()
    ordered = logits[order]
    signed = torch.where(positive, weights / weights[positive].sum(), -weights / weights[~positive].sum())[order]
    above = signed.flip(0).cumsum(0).flip(0)  # true less false positives where everything from here on fires
    distinct = torch.ones(len(ordered), dtype=torch.bool)
    distinct[1:] = ordered[1:] > ordered[:-1]
    best = int(torch.where(distinct, above, above.new_tensor(-2.0)).argmax())
    return float(ordered[best] if best == 0 else (ordered[best] + ordered[best - 1]) / 2)
