"""Claims about direction-aware rounding: what it gains, what it costs, and that it is a function of its input alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steer_bake.affine import Affine, compose
from steer_bake.errors import CheckpointError
from steer_bake.rounding import residual, round_into


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
    plain, aware = exact.to(dtype), round_into(exact, dtype, _ablation(directions), axis)
    assert aware.dtype == dtype
    assert aware.shape == exact.shape
    assert residual(plain, weight, directions, axis) >= 20 * residual(aware, weight, directions, axis)
    assert _error(aware, exact) <= 1.1 * _error(plain, exact)


def test_each_of_two_composed_ablations_is_protected() -> None:
    first, second = (_directions(576, seed=seed) for seed in (1, 2))
    both = compose([_ablation(first), _ablation(second)], 576)
    weight = _weight((576, 256), "gaussian", torch.bfloat16)
    exact = both(weight.float(), 0)
    plain, aware = exact.bfloat16(), round_into(exact, torch.bfloat16, both, 0)
    assert residual(plain, weight, second, 0) >= 20 * residual(aware, weight, second, 0)


def test_partial_ablation_keeps_its_coefficient() -> None:
    direction = _directions(576)[:, 0]
    weight = _weight((576, 512), "gaussian", torch.bfloat16)
    partial = _ablation(direction[:, None], strength=0.3)
    exact = partial(weight.float(), 0)
    before = direction.double() @ weight.double()

    def miss(stored: Tensor) -> float:
        return float((direction.double() @ (stored.double() - exact.double())).norm() / before.norm())

    assert miss(exact.bfloat16()) >= 20 * miss(round_into(exact, torch.bfloat16, partial, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_element_is_one_of_the_two_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    exact = torch.randn(128, 200) * torch.logspace(-9, 3, 200)
    exact[::7] = exact[::7].to(dtype).float()  # exactly representable
    exact[::11] = 0.0
    exact[5], exact[6] = -0.4 * smallest, 0.4 * smallest  # rounds to zero: the neighbour is the smallest subnormal
    largest = torch.finfo(dtype).max
    exact[0, :9], exact[1, :9] = largest, -largest
    exact[2, :9] = largest * (1 + torch.finfo(dtype).eps / 8)  # its other neighbour is infinity
    aware = round_into(exact, dtype, _ablation(_directions(128)), 0).float()
    assert aware.isfinite().all()
    nearest = exact.to(dtype)
    toward, down = torch.full_like(exact, float("inf")), torch.full_like(exact, -float("inf"))
    step = torch.where(nearest.float() < exact, toward, down)
    if dtype == torch.bfloat16:
        neighbour = torch.nextafter(nearest, step.bfloat16()).float()
    else:  # numpy has the half-precision one
        numpy = pytest.importorskip("numpy")
        with numpy.errstate(over="ignore"):
            neighbour = torch.from_numpy(numpy.nextafter(nearest.numpy(), step.half().numpy())).float()
    representable = nearest.float() == exact
    assert ((aware == nearest.float()) | ((aware == neighbour) & ~representable)).all()
    assert (aware != nearest.float()).any()


@pytest.mark.parametrize("axis", [0, 1])
def test_threads_and_chunks_do_not_change_a_bit(axis: int) -> None:
    directions = _directions(640, 2)
    shape = (640, 2300) if axis == 0 else (2300, 640)
    affine = _ablation(directions)
    exact = affine(_weight(shape, "outliers", torch.bfloat16, axis).float(), axis)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(round_into(exact, torch.bfloat16, affine, axis))
    finally:
        torch.set_num_threads(before)
    pieces = exact.split([1, 2, 997, 300, 1000], dim=1 - axis)
    found.append(torch.cat([round_into(piece, torch.bfloat16, affine, axis) for piece in pieces], dim=1 - axis))
    found.append(round_into(exact.T.contiguous(), torch.bfloat16, affine, 1 - axis).T)
    for other in found[1:]:
        assert torch.equal(found[0].contiguous().view(torch.int16), other.contiguous().view(torch.int16))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_stack_of_matrices_is_rounded_matrix_by_matrix(axis: int) -> None:
    shape = [3, 4, 5]
    shape[axis] = 64
    affine = _ablation(_directions(64))
    exact = affine(torch.randn(shape, generator=torch.Generator().manual_seed(0)), axis)
    stored = round_into(exact, torch.bfloat16, affine, axis)
    flat = exact.movedim(axis, 0).reshape(64, -1)
    expected = round_into(flat, torch.bfloat16, affine, 0)
    assert torch.equal(stored.movedim(axis, 0).reshape(64, -1), expected)


def test_nothing_to_protect_is_rounded_to_nearest() -> None:
    exact = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    shift = Affine(torch.zeros(64, 0), torch.zeros(64, 0), torch.ones(64))
    for affine in (Affine.identity(64), shift):
        assert torch.equal(round_into(exact, torch.bfloat16, affine, 0), exact.bfloat16())
    assert torch.equal(round_into(exact[:, 0], torch.bfloat16, _ablation(_directions(64)), 0), exact[:, 0].bfloat16())


def test_float32_is_not_rounded() -> None:
    exact = torch.randn(64, 10)
    assert round_into(exact, torch.float32, _ablation(_directions(64)), 0) is exact


def test_a_direction_that_is_one_coordinate_needs_no_flip() -> None:
    axis_vector = torch.zeros(64, 1)
    axis_vector[5] = 1.0
    exact = _ablation(axis_vector)(_weight((64, 50), "gaussian", torch.bfloat16).float(), 0)
    assert torch.equal(round_into(exact, torch.bfloat16, _ablation(axis_vector), 0), exact.bfloat16())


def test_a_value_beyond_the_dtype_is_refused() -> None:
    exact = torch.ones(64, 10)
    exact[3, 4] = 70000.0
    with pytest.raises(CheckpointError, match=r"70000.*65504"):
        round_into(exact, torch.float16, _ablation(_directions(64)), 0)


def test_not_a_number_stays_in_its_column() -> None:
    affine = _ablation(_directions(64))
    exact = affine(_weight((64, 10), "gaussian", torch.bfloat16).float(), 0)
    spoiled = exact.clone()
    spoiled[3, 4] = float("nan")
    clean, stored = round_into(exact, torch.bfloat16, affine, 0), round_into(spoiled, torch.bfloat16, affine, 0)
    others = torch.arange(10) != 4
    assert torch.equal(stored[:, others], clean[:, others])
    assert stored[3, 4].isnan()
    assert int(stored.isnan().sum()) == 1


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_residual_is_the_ratio_of_norms(axis: int) -> None:
    torch.manual_seed(0)
    stored, original, direction = torch.randn(8, 8), torch.randn(8, 8), torch.randn(8)
    edited, before = ((weight if axis == 0 else weight.T).double() for weight in (stored, original))
    expected = float((direction.double() @ edited).norm() / (direction.double() @ before).norm())
    assert residual(stored, original, direction, axis) == pytest.approx(expected, rel=1e-12)
