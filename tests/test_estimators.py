"""Claims of the estimators: each recovers a direction that was planted, and its sign."""

from __future__ import annotations

import pytest
import torch

from steer_bake import registry
from steer_bake.errors import RecipeError
from steer_bake.estimators import Statistics
from steer_bake.estimators.mean_difference import mean_difference
from steer_bake.estimators.pca import pca

WIDTH, PAIRS, LENGTH = 64, 400, 3.0


def statistics(rows: torch.Tensor) -> Statistics:
    return Statistics(len(rows), rows.mean(0), float(rows.norm(dim=1).mean()), rows)


def planted(seed: int, spread: float = 0.5) -> tuple[torch.Tensor, Statistics, Statistics]:
    """A unit vector and two sides that differ by ``LENGTH`` of it, in noise whose axes differ in size a hundredfold.

    What a pair has in common (its topic) is much larger than the difference.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    direction = normal(WIDTH)
    direction /= direction.norm()
    axes, _ = torch.linalg.qr(normal(WIDTH, WIDTH))
    noise = (axes * torch.logspace(-2, 0, WIDTH)) @ axes.T * spread
    topic = 20 * normal(WIDTH) + 5 * normal(PAIRS, WIDTH)
    sides = [topic + sign * LENGTH / 2 * direction + normal(PAIRS, WIDTH) @ noise for sign in (1, -1)]
    return direction, statistics(sides[0]), statistics(sides[1])


@pytest.mark.parametrize("name", ["mean_difference", "pca"])
@pytest.mark.parametrize("seed", range(5))
def test_planted_direction_is_recovered_with_its_sign_and_length(name: str, seed: int) -> None:
    direction, positive, negative = planted(seed)
    estimate = registry.load("estimators", name)
    vector, scale = estimate(positive, negative)
    assert vector.dtype == torch.float32
    assert float(vector @ direction / vector.norm()) > 0.99
    assert scale == pytest.approx(LENGTH, rel=0.05)
    swapped, _ = estimate(negative, positive)
    assert float(swapped @ direction / swapped.norm()) < -0.99


def test_mean_difference_moves_one_mean_onto_the_other() -> None:
    _, positive, negative = planted(0)
    vector, scale = mean_difference(positive, negative)
    torch.testing.assert_close(negative.mean + vector, positive.mean)
    torch.testing.assert_close(negative.mean + scale * vector / vector.norm(), positive.mean)


def test_pca_takes_pairs_and_not_the_largest_axis_of_either_side() -> None:
    """The pairs' common part has the most variance by far; only their difference counts."""
    direction, positive, negative = planted(1)
    assert positive.rows is not None
    largest = torch.linalg.svd(positive.rows - positive.rows.mean(0)).Vh[0]
    vector, _ = pca(positive, negative)
    assert abs(float(vector @ direction)) > 0.99 > 0.5 > abs(float(largest @ direction))


def test_pca_is_not_centred() -> None:
    """Equal differences have no variance: a centred component would miss them, or be whatever the rounding is."""
    direction = torch.zeros(WIDTH)
    direction[7] = 1
    rows = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0))
    vector, scale = pca(statistics(rows + 2 * direction), statistics(rows))
    assert float(vector @ direction) == pytest.approx(1, abs=1e-5)
    assert scale == pytest.approx(2, rel=1e-5)


def test_pca_refuses_sides_that_are_no_pairs() -> None:
    _, positive, negative = planted(0)
    assert positive.rows is not None
    with pytest.raises(RecipeError, match="399 positive and 400 negative"):
        pca(statistics(positive.rows[1:]), negative)
    with pytest.raises(RecipeError, match="do not differ"):
        pca(positive, positive)


def test_pca_says_that_it_needs_rows() -> None:
    assert registry.module("estimators", "pca").NEEDS_ROWS
    assert not getattr(registry.module("estimators", "mean_difference"), "NEEDS_ROWS", False)
