"""Claims about direction-aware rounding: what it gains, what it costs, and that it is a function of its input alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steer_bake import rounding
from steer_bake.affine import Affine, compose
from steer_bake.errors import CheckpointError
from steer_bake.rounding import MatrixEdit, residual
from steer_bake.workspace import Workspace


def _directions(width: int, count: int = 1, seed: int = 1) -> Tensor:
    return torch.linalg.qr(torch.randn(width, count, generator=torch.Generator().manual_seed(seed)))[0]


def _ablation(direction: Tensor, strength: float = 1.0) -> Affine:
    return Affine(-strength * direction, direction, torch.zeros(len(direction)))


def _weight(shape: tuple[int, ...], kind: str, dtype: torch.dtype, axis: int = 0) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.05
    if kind == "outliers":  # as in trained models: heavy tails, rows of different size along the residual axis
        weight = torch.distributions.StudentT(torch.tensor(4.0)).sample(shape) * 0.03
        sizes = torch.exp(0.5 * torch.randn(shape[axis]))
        weight = weight * (sizes[:, None] if axis == 0 else sizes)
    return weight.to(dtype)


def _edited(weight: Tensor, dtype: torch.dtype, affine: Affine, axis: int) -> Tensor:
    stored = torch.empty_like(weight, dtype=dtype)
    MatrixEdit.of(affine, protect=True).into(weight, stored, axis, Workspace())
    return stored


def _error(stored: Tensor, exact: Tensor) -> float:
    return float((stored.double() - exact.double()).norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("width", "count"), [(576, 1), (576, 2), (576, 4), (2048, 1)])
def test_residual_is_twenty_times_smaller_at_a_tenth_more_error(
    width: int, count: int, axis: int, kind: str, dtype: torch.dtype
) -> None:
    shape = (width, 512) if axis == 0 else (512, width)
    weight, directions = _weight(shape, kind, dtype, axis), _directions(width, count)
    exact = _ablation(directions)(weight.float(), axis)
    plain, aware = exact.to(dtype), _edited(weight, dtype, _ablation(directions), axis)
    assert aware.dtype == dtype
    assert aware.shape == exact.shape
    assert residual(plain, weight, directions, axis) >= 20 * residual(aware, weight, directions, axis)
    assert _error(aware, exact) <= 1.1 * _error(plain, exact)


def test_each_of_two_composed_ablations_is_protected() -> None:
    first, second = (_directions(576, seed=seed) for seed in (1, 2))
    both = compose([_ablation(first), _ablation(second)], 576)
    weight = _weight((576, 256), "gaussian", torch.bfloat16)
    exact = both(weight.float(), 0)
    plain, aware = exact.bfloat16(), _edited(weight, torch.bfloat16, both, 0)
    assert residual(plain, weight, second, 0) >= 20 * residual(aware, weight, second, 0)


def test_partial_ablation_keeps_its_coefficient() -> None:
    direction = _directions(576)[:, 0]
    weight = _weight((576, 512), "gaussian", torch.bfloat16)
    partial = _ablation(direction[:, None], strength=0.3)
    exact = partial(weight.float(), 0)
    before = direction.double() @ weight.double()

    def miss(stored: Tensor) -> float:
        return float((direction.double() @ (stored.double() - exact.double())).norm() / before.norm())

    assert miss(exact.bfloat16()) >= 20 * miss(_edited(weight, torch.bfloat16, partial, 0))


def test_what_the_map_writes_may_lie_outside_what_it_reads() -> None:
    left, right = _directions(576, 3, seed=2), _directions(576, 3)
    affine = Affine(left, right, torch.randn(576, generator=torch.Generator().manual_seed(0)))
    weight = _weight((576, 512), "gaussian", torch.bfloat16)
    exact = affine(weight.double(), 0)
    assert (_edited(weight.double(), torch.float64, affine, 0) - exact).abs().max() < 1e-9
    assert (_edited(weight, torch.float32, affine, 0) - exact).abs().max() < 1e-6
    plain, aware = exact.bfloat16(), _edited(weight, torch.bfloat16, affine, 0)

    def miss(stored: Tensor) -> float:
        return float((right.double().T @ (stored.double() - exact)).norm())

    assert miss(plain) >= 20 * miss(aware)
    assert _error(aware, exact) <= 1.1 * _error(plain, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
def test_no_element_moves_far(dtype: torch.dtype, kind: str) -> None:
    """All but tiny elements become one of their two neighbours; those stay within the typical spacing of the column."""
    weight, affine = _weight((576, 512), kind, dtype), _ablation(_directions(576))
    exact = affine(weight.float(), 0)
    aware = _edited(weight, dtype, affine, 0).float()
    spacing = 2.0 ** exact.abs().log2().floor() * torch.finfo(dtype).eps
    typical = spacing.square().mean(0).sqrt()
    moved = (aware - exact).abs()
    assert (moved <= spacing + typical).all()
    assert (moved <= spacing).float().mean() > 0.97


@pytest.mark.parametrize("axis", [0, 1])
def test_threads_and_chunks_do_not_change_a_bit(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    affine = _ablation(_directions(640, 2))
    weight = _weight((640, 2300) if axis == 0 else (2300, 640), "outliers", torch.bfloat16, axis)

    def edited(weight: Tensor, axis: int = axis) -> Tensor:
        return _edited(weight, torch.bfloat16, affine, axis)

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(edited(weight))
    finally:
        torch.set_num_threads(before)
    found.append(torch.cat([edited(one) for one in weight.split([1, 2, 997, 300, 1000], dim=1 - axis)], dim=1 - axis))
    found.append(edited(weight.T.contiguous(), 1 - axis).T)
    found.append(edited(weight.float()))
    in_place = weight.clone()
    MatrixEdit.of(affine, protect=True).into(in_place, in_place, axis, Workspace())
    found.append(in_place)
    monkeypatch.setattr(rounding, "_TILE_COLUMNS", 999)
    monkeypatch.setattr(rounding, "_BLOCK", 7001)
    found.append(edited(weight))
    for other in found[1:]:
        assert torch.equal(found[0].contiguous().view(torch.int16), other.contiguous().view(torch.int16))


def test_nothing_to_protect_is_rounded_to_nearest() -> None:
    weight = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    shift = Affine(torch.zeros(64, 0), torch.zeros(64, 0), torch.ones(64))
    for affine in (Affine.identity(64), shift):
        assert torch.equal(_edited(weight, torch.bfloat16, affine, 0), affine(weight, 0).bfloat16())


def test_without_protection_each_element_is_rounded_to_nearest() -> None:
    affine = Affine(-_directions(64), _directions(64), torch.ones(64))
    weight = _weight((64, 100), "gaussian", torch.bfloat16)
    stored = torch.empty_like(weight)
    MatrixEdit.of(affine, protect=False).into(weight, stored, 0, Workspace())
    exact = affine(weight.double(), 0)
    assert ((stored.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-7).all()


def test_a_direction_that_is_one_coordinate_needs_no_flip() -> None:
    axis_vector = torch.zeros(64, 1)
    axis_vector[5] = 1.0
    affine, weight = _ablation(axis_vector), _weight((64, 50), "gaussian", torch.bfloat16)
    assert torch.equal(_edited(weight, torch.bfloat16, affine, 0), affine(weight.float(), 0).bfloat16())


def test_a_value_beyond_the_dtype_is_refused() -> None:
    weight = torch.ones(64, 10)
    weight[3, 4] = 70000.0
    with pytest.raises(CheckpointError, match=r"beyond the largest torch.float16 number 65504"):
        _edited(weight, torch.float16, _ablation(_directions(64)), 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_column(value: float) -> None:
    affine, weight = _ablation(_directions(64)), _weight((64, 10), "gaussian", torch.float16)
    spoiled = weight.clone()
    spoiled[3, 4] = value
    clean, stored = _edited(weight, torch.float16, affine, 0), _edited(spoiled, torch.float16, affine, 0)
    others = torch.arange(10) != 4
    assert torch.equal(stored[:, others], clean[:, others])
    assert not stored[3, 4].isfinite()


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_residual_is_the_ratio_of_norms(axis: int) -> None:
    torch.manual_seed(0)
    stored, original, direction = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8)
    edited, before = ((weight if axis == 0 else weight.T).double() for weight in (stored, original))
    expected = float((direction.double() @ edited).norm() / (direction.double() @ before).norm())
    assert residual(stored, original, direction, axis) == pytest.approx(expected, rel=1e-12)
