"""Claims of selection.py and transfer.py: the paper's formulas, and a choice that obeys its constraint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_bake.direction import Direction, unit
from steer_bake.errors import RecipeError
from steer_bake.interventions import intervene
from steer_bake.models import load_model
from steer_bake.prompts import Encoded, Prompt, encode
from steer_bake.refusal import Event
from steer_bake.selection import (
    Configuration,
    LayerScore,
    answer_log_probability,
    grid,
    layer_score,
    quantile_scales,
    ranked,
    select,
    usable,
)
from steer_bake.sites import Site
from steer_bake.steering import steer
from steer_bake.transfer import separation

from . import tiny

SITES = [Site("resid_post", layer) for layer in range(tiny.LAYERS)]


# --- formulas


def test_layer_score_is_correlation_minus_the_confidence_on_the_wrong_side() -> None:
    c = torch.tensor([0.9, 0.5, -0.5, -1.0])
    found = layer_score(torch.tensor([9.0, 5.0, -5.0, -10.0]), c)
    assert (found.correlation, found.error) == (pytest.approx(1.0), 0.0)
    wrong = layer_score(torch.tensor([9.0, -5.0, -5.0, -10.0]), c)
    assert wrong.error == pytest.approx((0.5**2 / 4) ** 0.5), "mean over all prompts of c where the sign is wrong"
    assert wrong.score == wrong.correlation - wrong.error
    assert layer_score(-torch.tensor([9.0, 5.0, -5.0, -10.0]), c).correlation == pytest.approx(-1.0)
    with pytest.raises(RecipeError, match="whose refusal confidence differs"):
        layer_score(torch.arange(4), torch.ones(4))


def test_quantile_scales_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    c = torch.rand(500, generator=generator) * 2 - 1
    p = torch.where(c > 0, 3 * c, 7 * c)
    assert quantile_scales(p, c) == (pytest.approx(3.0, rel=1e-5), pytest.approx(7.0, rel=1e-5))
    assert quantile_scales(-p, c) == (pytest.approx(0, abs=0.5), pytest.approx(0, abs=1.0))
    assert quantile_scales(p, c.abs() + 0.1) == (1.0, 1.0), "an empty side makes both 1"


@pytest.mark.parametrize(("layers", "kept"), [(48, 45), (24, 22), (4, 3), (1, 1)])
def test_the_deepest_five_percent_are_dropped_as_in_the_authors_code(layers: int, kept: int) -> None:
    assert usable(layers) == kept


def test_layers_are_ranked_by_score_and_deep_ones_left_out() -> None:
    scores = {site: LayerScore(r, 0.0) for site, r in zip(SITES, (0.5, 0.9, 0.5, 1.0), strict=True)}
    assert ranked(scores, 4) == [SITES[1], SITES[0], SITES[2]], "layer 3 of 4 is too deep; equal scores by depth"
    with pytest.raises(RecipeError, match="no site is before layer 3"):
        ranked({SITES[3]: LayerScore(1.0, 0.0)}, 4)


def test_separation_is_the_share_of_pairs_in_order() -> None:
    one, other = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 1.0])
    assert separation(one, other).auc == pytest.approx(5.5 / 6)
    assert separation(other, one).auc == pytest.approx(0.5 / 6)
    assert separation(one + 5, other + 5).distance == pytest.approx(separation(one, other).distance)
    assert separation(torch.ones(3), torch.zeros(2)).distance == float("inf")


# --- two natural lengths, and the reposition


def test_a_negative_coefficient_takes_the_negative_scale_and_a_clamp_counts_from_the_neutral_mean() -> None:
    vector = unit(torch.arange(1.0, 5.0))[0]
    one = Direction(vector, SITES[0], scale=3.0, scale_negative=5.0, neutral=2.0)
    assert intervene("add", one, SITES[0], 0.5).amount == 1.5
    assert intervene("add", one, SITES[0], -0.5).amount == -2.5
    assert intervene("ablate", one, SITES[0], 1.0).amount == 1.0
    clamp = intervene("clamp", one, SITES[0], -0.5)
    h, origin = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), 2.0 * vector
    paper = h - ((h - origin) @ vector)[:, None] * vector - 0.5 * 5.0 * vector
    torch.testing.assert_close(clamp.affine(h), paper)


# --- the choice


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return load_model(llama, dtype="float32")


def encoded(*texts: str) -> list[Encoded]:
    return encode(tiny.tokenizer(), [Prompt((("user", text),)) for text in texts])


def directions() -> dict[Site, Direction]:
    generator = torch.Generator().manual_seed(0)
    return {site: Direction(unit(torch.randn(tiny.WIDTH, generator=generator))[0], site, 2.0) for site in SITES}


REFUSED, CONVERSATIONS = encoded("No!", "Why not?"), [(one, (5, 6, 7)) for one in encoded("Hello.", "What is a tree?")]


def test_the_choice_is_the_least_change_among_those_that_reach_the_target(model: Any) -> None:
    event = Event.of([(token,) for token in range(0, 200, 2)])

    def confidence(model: Any, prompts: Sequence[Encoded]) -> torch.Tensor:
        return event.confidence(model, prompts)

    found = select(
        model, directions(), SITES[:2], grid((1, 2), (-2.0, -0.5, 0.5, 2.0), ("add", "clamp")), REFUSED, CONVERSATIONS,
        confidence, target=0.01,
    )  # fmt: skip
    assert len(found.trials) == 16
    enough = [trial for trial in found.trials if trial.drop >= 0.01]
    assert 0 < len(enough) < 16
    assert found.chosen.change == min(trial.change for trial in enough) > min(trial.change for trial in found.trials)
    one = found.chosen.configuration
    assert found.chosen.sites == tuple(str(site) for site in SITES[: one.top])
    with steer(model, one.interventions(SITES[:2], directions())):
        after = float(confidence(model, REFUSED).mean())
    assert found.confidence - after == pytest.approx(found.chosen.drop, abs=1e-9)
    with pytest.raises(RecipeError, match="no configuration lowers the refusal confidence"):
        select(model, directions(), SITES[:2], [Configuration(1, 0.01)], REFUSED, CONVERSATIONS, confidence, target=1.5)


def test_answer_log_probability_is_teacher_forced_and_a_mean_over_tokens(model: Any) -> None:
    [one] = encoded("Hello.")
    answer = (5, 6, 7)
    found = answer_log_probability(model, [(one, answer)])
    logs = model(input_ids=torch.tensor([one.ids + answer])).logits[0].log_softmax(-1)
    expected = sum(float(logs[len(one.ids) - 1 + n, token]) for n, token in enumerate(answer)) / 3
    assert float(found) == pytest.approx(expected, rel=1e-5)
