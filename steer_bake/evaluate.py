"""Behaviour before and after: the same prompts through two models, labelled by a judge, with intervals.

Sets that measure safety keep labels only, never answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from .answering import answers as answers  # a comparison begins with them

_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Share:
    """How many of ``total`` answers carry a label, with a 95 % interval."""

    hits: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.hits / self.total


@dataclass(frozen=True)
class Comparison:
    """One prompt set, base against baked."""

    prompt_set: str
    label: str
    base: Share
    baked: Share
    difference: float  # baked - base
    low: float
    high: float
    labels: Mapping[str, tuple[int, int]]  # every label the judge gave: counts for base and baked

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(prompt_set: str, label: str, base: Sequence[str], baked: Sequence[str]) -> Comparison:
    """Two lists of labels of the same prompts, as shares of ``label`` and their paired difference."""
    hits = [(before == label, after == label) for before, after in zip(base, baked, strict=True)]
    low, high = paired_interval(
        sum(after and not before for before, after in hits),
        sum(before and not after for before, after in hits),
        len(hits),
    )
    shares = [wilson(sum(side), len(hits)) for side in zip(*hits, strict=True)]
    seen = sorted({*base, *baked})
    return Comparison(
        prompt_set, label, shares[0], shares[1], shares[1].share - shares[0].share, low, high,
        {one: (list(base).count(one), list(baked).count(one)) for one in seen},
    )  # fmt: skip


def wilson(hits: int, total: int) -> Share:
    """A share with its 95 % score interval (Wilson 1927)."""
    share, z2 = hits / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return Share(hits, total, max(0.0, centre - half), min(1.0, centre + half))


def paired_interval(gained: int, lost: int, total: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares of the same prompts (Bonett and Price 2012, adjusted Wald)."""
    up, down, size = (gained + 1) / (total + 2), (lost + 1) / (total + 2), total + 2
    half = _Z95 * math.sqrt((up + down - (up - down) ** 2) / size)
    return max(-1.0, up - down - half), min(1.0, up - down + half)
