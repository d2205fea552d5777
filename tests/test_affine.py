"""The algebra that hook and bake share."""

from __future__ import annotations

import pytest
import torch

from steer_bake.affine import Affine, compose
from steer_bake.interventions.ablate import ablate
from steer_bake.interventions.add import add
from steer_bake.interventions.clamp import clamp

WIDTH = 16


def unit(seed: int) -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def stream(seed: int = 9) -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_add_adds_the_length_asked_for() -> None:
    moved = add(unit(0), 2.5)(stream()) - stream()
    assert torch.allclose(moved.norm(dim=-1), torch.tensor(2.5))


def test_ablate_scales_the_component_by_one_minus_lambda() -> None:
    r, h = unit(0), stream()
    for strength in (1.0, 0.25, -1.0):
        assert torch.allclose(ablate(r, strength)(h) @ r, (1 - strength) * (h @ r), atol=1e-6)


def test_clamp_sets_the_component_and_leaves_the_rest() -> None:
    r, h = unit(0), stream()
    out = clamp(r, -3.0)(h)
    assert torch.allclose(out @ r, torch.tensor(-3.0), atol=1e-5)
    rest = out - (out @ r)[..., None] * r
    assert torch.allclose(rest, h - (h @ r)[..., None] * r, atol=1e-5)


def test_composition_is_one_after_the_other() -> None:
    steps = [clamp(unit(0), 2.0), add(unit(1), 1.5), ablate(unit(2), 0.5), clamp(unit(3), -1.0)]
    h = stream()
    one_by_one = h
    for step in steps:
        one_by_one = step(one_by_one)
    assert torch.allclose(compose(steps, WIDTH)(h), one_by_one, atol=1e-5)
    assert not torch.allclose(compose(steps[::-1], WIDTH)(h), one_by_one, atol=1e-2)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_the_residual_axis_may_lie_anywhere(axis: int) -> None:
    affine = compose([clamp(unit(0), 2.0), add(unit(1), 1.5)], WIDTH)
    h = stream()
    assert torch.allclose(affine(h.movedim(-1, axis), axis), affine(h).movedim(-1, axis), atol=1e-6)


def test_a_matrix_edited_along_axis_0_maps_as_hook_after_matrix() -> None:
    weight, x = torch.randn(WIDTH, 7), torch.randn(3, 7)
    affine = compose([ablate(unit(0), 1.0), ablate(unit(1), 0.3)], WIDTH)
    assert torch.allclose(x @ affine(weight, 0).T, affine(x @ weight.T), atol=1e-5)


def test_fixed_functionals_are_what_an_ablation_removes() -> None:
    first, second = unit(0), unit(1)
    found = compose([ablate(first, 1.0), ablate(second, 1.0)], WIDTH).fixed_functionals()
    assert found.shape == (WIDTH, 1)  # the second ablation brings a little of the first direction back
    assert float((found[:, 0] @ second).abs()) == pytest.approx(1.0, abs=1e-5)
    assert ablate(first, 0.5).fixed_functionals().shape[1] == 0
    assert Affine.identity(WIDTH).fixed_functionals().shape[1] == 0
    assert add(first, 1.0).fixed_functionals().shape[1] == 0


def test_what_an_affine_says_of_itself() -> None:
    r = unit(0)
    assert (add(r, 1.0).has_shift, add(r, 1.0).is_linear) == (True, False)
    assert (ablate(r, 1.0).has_shift, ablate(r, 1.0).is_linear) == (False, True)
    assert add(r, 0.0).is_identity
    assert ablate(r, 0.0).is_identity
    assert not clamp(r, 0.0).without_linear().is_linear
    assert clamp(r, 0.0).is_linear
    assert torch.equal(add(r, 3.0).divided_by(2.0).shift, add(r, 1.5).shift)
