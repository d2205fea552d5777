"""Claims of the estimators: each recovers a direction that was planted, and its sign."""

from __future__ import annotations

import pytest
import torch

from steer_bake import registry
from steer_bake.errors import RecipeError
from steer_bake.estimators import Statistics, estimate
from steer_bake.estimators._covariance import covariance, pooled_solve, ridge_solve
from steer_bake.estimators.leace import Options as Whitening
from steer_bake.estimators.leace import eraser
from steer_bake.estimators.logistic_probe import fit
from steer_bake.estimators.mean_difference import mean_difference
from steer_bake.estimators.pca import pca
from steer_bake.estimators.wrmd import Options as Ridge
from steer_bake.estimators.wrmd import wrmd

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


# --- every estimator on one scene: noise whose variances differ ten thousandfold


def scene(
    seed: int, counts: tuple[int, int], length: float, width: int = 64, flipped: float = 0.0, pairs: bool = False
) -> tuple[torch.Tensor, Statistics, Statistics]:
    """A unit vector along a quiet axis of the noise, and two sides of ``counts`` prompts that differ by ``length``.

    The noise has a covariance of condition number 1e4; a share ``flipped`` of the prompts has the other side's label.
    ``pairs`` share most of their noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    axes, _ = torch.linalg.qr(normal(width, width))
    deviations = torch.logspace(-2, 0, width, dtype=torch.float64)
    direction = axes[:, width // 4]
    middle = 5 * normal(width)
    topic = (normal(counts[0], width) * deviations) @ axes.T
    sides = []
    for sign, count in zip((1, -1), counts, strict=True):
        labels = torch.full((count,), float(sign), dtype=torch.float64)
        labels[torch.rand(count, generator=generator) < flipped] *= -1
        noise = (normal(count, width) * deviations) @ axes.T
        noise = topic + 0.2 * noise if pairs else noise
        sides.append(middle + length / 2 * labels[:, None] * direction + noise)
    return direction.float(), *(statistics(side.float()) for side in sides)


def cosine(vector: torch.Tensor, direction: torch.Tensor) -> float:
    return float(vector.double() @ direction.double() / vector.double().norm() / direction.double().norm())


UNPAIRED = [name for name in registry.names("estimators") if name != "pca"]
CASES = {
    "anisotropic": {"counts": (300, 300), "length": 3.0},
    "imbalance": {"counts": (60, 600), "length": 3.0},
    "label noise": {"counts": (800, 800), "length": 1.0, "flipped": 0.1},
    "fewer prompts than dimensions": {"counts": (48, 40), "length": 3.0},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("name", UNPAIRED)
def test_every_estimator_recovers_a_planted_direction_and_its_sign(name: str, case: str) -> None:
    for seed in range(3):
        direction, positive, negative = scene(seed, **CASES[case])  # type: ignore[arg-type]
        # wrong labels make the covariance large along the direction itself: a small ridge would overdo it
        options = {"ridge": 0.3} if name in ("leace", "logistic_probe") and case == "label noise" else {}
        vector, scale = estimate(name, positive, negative, options=options)
        assert vector.dtype == torch.float32
        assert cosine(vector, direction) > (0.9 if name != "safesteer" else 0.85)
        assert scale > 0
        other, _ = estimate(name, negative, positive, options=options)
        assert cosine(other, direction) < -0.85


def test_pca_recovers_a_planted_direction_in_anisotropic_noise_with_flipped_pairs() -> None:
    """Its regime: where many pairs are the wrong way round the mean of their differences is lost, their axis is not."""
    direction, positive, negative = scene(0, (60, 60), 1.0, pairs=True)
    assert positive.rows is not None
    assert negative.rows is not None
    wrong = torch.arange(60) % 5 < 2
    one, other = (torch.where(wrong[:, None], left, right) for left, right in (
        (negative.rows, positive.rows), (positive.rows, negative.rows),
    ))  # fmt: skip
    sides = statistics(one), statistics(other)
    assert cosine(pca(*sides)[0], direction) > 0.97
    assert cosine(mean_difference(*sides)[0], direction) < 0.9


# --- the regime of each


@pytest.mark.parametrize("name", ["rmd", "wrmd", "logistic_probe", "leace"])
@pytest.mark.parametrize("counts", [(40, 40), (400, 400)], ids=["few prompts", "many prompts"])
def test_whitening_beats_the_mean_difference_where_noise_along_loud_axes_hides_the_difference(
    name: str, counts: tuple[int, int]
) -> None:
    gains = []
    for seed in range(5):
        direction, positive, negative = scene(seed, counts, 6.0 / counts[0] ** 0.5, width=128)
        plain = cosine(mean_difference(positive, negative)[0], direction)
        gains.append((cosine(estimate(name, positive, negative)[0], direction), plain))
    assert all(better > plain for better, plain in gains), gains
    assert sum(better for better, _ in gains) / 5 > sum(plain for _, plain in gains) / 5 + 0.05, gains


def test_the_mean_difference_beats_whitening_where_labels_are_wrong_and_the_sides_far_apart() -> None:
    """Wrong labels put the direction itself into the negatives' covariance, and the ridge estimators shrink it."""
    for seed in range(5):
        direction, positive, negative = scene(seed, (400, 400), 3.0, flipped=0.1)
        plain = cosine(mean_difference(positive, negative)[0], direction)
        assert plain > 0.99 > 0.8 > cosine(estimate("rmd", positive, negative)[0], direction)


def borderline(seed: int) -> tuple[torch.Tensor, list[Statistics], list[Statistics]]:
    """Half of the positives are borderline: score 0.2, a fifth of the difference, and a topic of their own.

    The answer is the direction, the two sides without weights, and the two weighted by score, with the neutral side.
    """
    direction, positive, negative = scene(seed, (200, 200), 3.0)
    generator = torch.Generator().manual_seed(seed + 100)
    topic = torch.randn(64, generator=generator)
    topic = 3 * topic / topic.norm()
    assert positive.rows is not None
    assert negative.rows is not None
    rows = positive.rows.clone()
    rows[::2] += topic - 1.2 * direction
    weights = torch.ones(200, dtype=torch.float64)
    weights[::2] = 0.2
    weighted = weighted_statistics(rows, weights)
    middle = statistics((positive.rows + negative.rows) / 2)
    return direction, [statistics(rows), negative], [weighted, negative, middle]


def weighted_statistics(rows: torch.Tensor, weights: torch.Tensor) -> Statistics:
    centre = weights @ rows.double() / weights.sum()
    return Statistics(len(rows), rows.mean(0), float(rows.norm(dim=1).mean()), rows, weights, centre)


@pytest.mark.parametrize("name", ["wmd", "wrmd"])
def test_weights_beat_the_plain_mean_where_borderline_prompts_have_a_topic_of_their_own(name: str) -> None:
    for seed in range(5):
        direction, plain, weighted = borderline(seed)
        unweighted = "rmd" if name == "wrmd" else "mean_difference"
        options = {"ridge": 1.0} if name == "wrmd" else {}
        better = cosine(estimate(name, *weighted, options=options)[0], direction)
        worse = cosine(estimate(unweighted, *plain, options=options)[0], direction)
        assert better > worse + 0.05
        assert better > 0.9


def test_wmd_takes_each_side_by_its_direction_from_the_neutral_mean() -> None:
    """A side that lies ten times as far counts no more: what it has in common with the other side cancels."""
    one, other = torch.eye(8)[0], torch.eye(8)[1]
    origin = torch.full((8,), 3.0)
    sides = [statistics((origin + vector).expand(5, 8)) for vector in (10 * one, other)]
    vector, _ = estimate("wmd", *sides, statistics(origin.expand(5, 8)))
    torch.testing.assert_close(vector / vector.norm(), (one - other) / 2**0.5)
    with pytest.raises(RecipeError, match="same mean as the neutral prompts"):
        estimate("wmd", *sides, sides[0])


def test_categorical_beats_the_mean_difference_on_a_sparse_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    direction = torch.zeros(256)
    direction[torch.randperm(256, generator=generator)[:10]] = torch.tensor([1.0, -1.0] * 5)
    rows = [torch.randn(30, 256, generator=generator) + sign * direction for sign in (1, -1)]
    sides = [statistics(one) for one in rows]
    vector, scale = estimate("categorical", *sides, options={"top_k": 10})
    assert cosine(vector, direction) > 0.97 > 0.85 > cosine(mean_difference(*sides)[0], direction)
    assert int((vector != 0).sum()) == 10
    assert scale == pytest.approx(float(vector.norm()))
    assert int((estimate("categorical", *sides)[0] != 0).sum()) == 200, "the paper's K"
    with pytest.raises(RecipeError, match="at least one entry"):
        estimate("categorical", *sides, options={"top_k": 0})


def test_categorical_zeroes_small_entries_of_the_means_and_not_of_the_difference() -> None:
    one, other = torch.tensor([[0.5, 3.0, 0.4]]), torch.tensor([[0.2, 2.8, -0.4]])
    vector, _ = estimate("categorical", statistics(one), statistics(other), options={"threshold": 0.45})
    torch.testing.assert_close(vector, torch.tensor([0.5, 0.2, 0.0]))


def test_safesteer_leaves_out_the_half_of_the_unsafe_prompts_that_says_nothing() -> None:
    """Its regime: half of the pool is not what its label says. The mean difference then has half the length."""
    direction, safe, unsafe = scene(3, (400, 200), 8.0)
    assert safe.rows is not None
    assert unsafe.rows is not None
    pool = statistics(torch.cat([unsafe.rows, safe.rows[:200]]))
    pure = statistics(safe.rows[200:])
    vector, scale = estimate("safesteer", pure, pool)
    plain, short = mean_difference(pure, pool)
    assert scale == pytest.approx(8.0, rel=0.05)
    assert short == pytest.approx(4.0, rel=0.1)
    assert cosine(vector, direction) > cosine(plain, direction)
    unpruned, _ = estimate("safesteer", pure, pool, options={"prune": False})
    torch.testing.assert_close(unpruned, plain, atol=1e-5, rtol=1e-5)


def test_safesteer_in_pairs_prunes_by_the_length_of_each_difference() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([1.0, 5.0, 2.0, 6.0, 3.0, 7.0])[:, None] * torch.eye(4)[1]
    vector, scale = estimate("safesteer", statistics(rows + steps), statistics(rows), options={"paired": True})
    torch.testing.assert_close(vector, 6 * torch.eye(4)[1])
    assert scale == pytest.approx(6.0)
    with pytest.raises(RecipeError, match="as many of each"):
        estimate("safesteer", statistics(rows), statistics(rows[1:]), options={"paired": True})


# --- the ridge


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_woodbury_form_equals_the_dense_solve(relative: bool, weighted: bool) -> None:
    _, positive, negative = scene(1, (50, 40), 2.0, width=96)
    assert negative.rows is not None
    weights = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    side = weighted_statistics(negative.rows, weights) if weighted else negative
    moved = positive.centre - side.centre
    dense = Statistics(side.count, side.mean, side.norm, None, None, side.centre, covariance(side))
    one, other = (ridge_solve(each, moved, 0.01, relative) for each in (side, dense))
    assert float((one - other).norm() / other.norm()) < 1e-6
    exact = covariance(side) + 0.01 * torch.eye(96) * (covariance(side).trace() / 96 if relative else 1)
    torch.testing.assert_close(exact @ one, moved, rtol=1e-6, atol=1e-8)


def test_pooled_covariance_in_both_forms_is_the_same() -> None:
    _, positive, negative = scene(2, (30, 50), 2.0, width=96)
    dense = [
        Statistics(one.count, one.mean, one.norm, weighted_mean=one.centre, covariance=covariance(one))
        for one in (positive, negative)
    ]
    moved = positive.centre - negative.centre
    one, other = pooled_solve(positive, negative, moved, 0.01, True), pooled_solve(*dense, moved, 0.01, True)
    assert float((one - other).norm() / other.norm()) < 1e-6


def test_a_relative_ridge_means_the_same_in_a_stream_ten_times_as_large() -> None:
    _, positive, negative = scene(0, (200, 200), 1.0)
    assert positive.rows is not None
    assert negative.rows is not None
    large = [statistics(10 * one) for one in (positive.rows, negative.rows)]
    for relative, least, most in ((True, 0.99999, 1.1), (False, -1.0, 0.995)):
        options = {"ridge": 0.1, "relative": relative}
        cos = cosine(
            estimate("wrmd", positive, negative, options=options)[0], estimate("wrmd", *large, options=options)[0]
        )
        assert least < cos < most


def test_a_ridge_that_is_not_positive_is_refused() -> None:
    _, positive, negative = scene(0, (20, 20), 1.0)
    with pytest.raises(RecipeError, match="must be a positive number"):
        estimate("rmd", positive, negative, options={"ridge": 0.0})


def test_equation_4_is_read_with_centred_activations() -> None:
    """As printed, h is not centred and m_N is: that adds o o^T to the covariance and suppresses the direction of o."""
    generator = torch.Generator().manual_seed(0)
    width = 24
    origin = 10 * torch.eye(width, dtype=torch.float64)[0]
    along = origin / 10
    rows = [origin + sign * along + 0.3 * torch.randn(2000, width, generator=generator).double() for sign in (1, -1)]
    weights = [torch.rand(2000, generator=generator, dtype=torch.float64) for _ in rows]
    means = [weight @ (one - origin) / weight.sum() for one, weight in zip(rows, weights, strict=True)]
    moved, share = means[0] - means[1], (weights[1] / weights[1].sum())[:, None]

    def solved(spread: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(spread.T @ (share * spread) + 0.01 * torch.eye(width).double(), moved)

    as_printed, centred = solved(rows[1] - means[1]), solved(rows[1] - origin - means[1])
    sides = [weighted_statistics(one.float(), weight) for one, weight in zip(rows, weights, strict=True)]
    vector, _ = wrmd(*sides, options=Ridge(ridge=0.01))
    assert cosine(vector, centred) > 0.9999999
    assert cosine(vector, origin) > 0.97 > 0.5 > cosine(as_printed, origin)


# --- probes and erasers


def test_the_probe_is_the_optimum_of_its_loss() -> None:
    _, positive, negative = scene(0, (80, 40), 0.5, width=32)
    probe = fit(positive, negative, ridge=0.05)
    assert positive.rows is not None
    assert negative.rows is not None
    rows = torch.cat([positive.rows, negative.rows]).double()
    spread = float((rows - rows.mean(0)).square().sum()) / len(rows) / 32
    weight, bias = (
        probe.weight.clone().requires_grad_(),
        torch.tensor(probe.bias, dtype=torch.float64, requires_grad=True),
    )
    losses = [
        torch.nn.functional.softplus(-sign * (side.double() @ weight + bias)).mean() / 2
        for sign, side in ((1, positive.rows), (-1, negative.rows))
    ]
    (losses[0] + losses[1] + 0.05 * spread * weight.square().sum() / 2).backward()
    assert weight.grad is not None
    assert float(weight.grad.norm()) < 1e-7
    assert abs(float(bias.grad)) < 1e-7  # type: ignore[arg-type]
    assert float((probe(positive.rows) > 0).double().mean()) > 0.9


def test_after_the_eraser_the_means_are_equal_and_other_components_stay() -> None:
    direction, positive, negative = scene(4, (300, 300), 2.0)
    assert positive.rows is not None
    assert negative.rows is not None
    affine = eraser(positive, negative, Whitening(ridge=1e-6))
    one, other = affine(positive.rows), affine(negative.rows)
    assert float((one.mean(0) - other.mean(0)).norm()) < 1e-3
    pooled = statistics(one - one.mean(0)), statistics(other - other.mean(0))
    orthogonal = positive.rows - (positive.rows - positive.rows.mean(0)) @ direction[:, None] * direction
    moved = float((affine(positive.rows) - positive.rows).norm())
    plain = float((orthogonal - positive.rows - (one.mean(0) - positive.rows.mean(0))).norm())
    assert moved <= plain * 1.05, "no further than the orthogonal projection that does the same to the means"
    assert pooled[0].count == 300
    with pytest.raises(RecipeError, match="nothing to erase"):
        eraser(positive, positive)


def test_unknown_options_are_met_with_the_nearest_one() -> None:
    _, positive, negative = scene(0, (10, 10), 1.0)
    with pytest.raises(RecipeError, match="no option 'rdige': did you mean 'ridge'"):
        estimate("wrmd", positive, negative, options={"rdige": 1.0})
    with pytest.raises(RecipeError, match="give a bool like False"):
        estimate("wrmd", positive, negative, options={"relative": 1})
    with pytest.raises(RecipeError, match="mean_difference has no options"):
        estimate("mean_difference", positive, negative, options={"ridge": 1.0})
    assert estimate("rmd", positive, negative, options={"ridge": 1})[1] > 0, "an integer is a number"
