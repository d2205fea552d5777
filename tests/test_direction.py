"""Direction files: round trips, other people's vectors, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steer_bake import direction
from steer_bake.direction import Direction, orthogonal_to, unit
from steer_bake.errors import RecipeError
from steer_bake.interventions import intervene
from steer_bake.sites import Site


def test_a_direction_survives_its_file(tmp_path: Path) -> None:
    made = [
        Direction(unit(torch.randn(8))[0], Site("resid_post", layer), 2.5, 40.0, "org/model", "a" * 40, "pca", "b" * 64)
        for layer in (3, 4)
    ]
    direction.save(made, tmp_path / "d.safetensors")
    found = {one.site: one for one in direction.load(tmp_path / "d.safetensors")}
    for one in made:
        assert torch.equal(found[one.site].vector, one.vector)
        assert found[one.site].provenance() == one.provenance()


def test_a_bare_vector_becomes_a_unit_vector_with_its_length_as_scale(tmp_path: Path) -> None:
    vector = torch.tensor([3.0, 4.0, 0.0])
    save_file({"v": vector, "resid_post.2": vector.clone().reshape(1, 3)}, tmp_path / "v.safetensors")
    bare, at_site = sorted(direction.load(tmp_path / "v.safetensors"), key=lambda one: one.site is not None)
    assert (bare.site, at_site.site) == (None, Site("resid_post", 2))
    assert bare.scale == pytest.approx(5.0)
    assert torch.allclose(bare.vector, vector / 5)


def test_a_file_that_holds_no_vector_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"m": torch.ones(3, 3)}, tmp_path / "matrix.safetensors")
    save_file({"z": torch.zeros(3)}, tmp_path / "zero.safetensors")
    save_file({"n": torch.full((3,), float("nan"))}, tmp_path / "nan.safetensors")
    for name, words in (
        ("text", "not a readable"), ("matrix", "shape"), ("zero", "is zero"), ("nan", "NaN"), ("none", "not a readable")
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            direction.load(tmp_path / f"{name}.safetensors")


def test_orthogonal_to_removes_every_given_component() -> None:
    vector, *others = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    rest = orthogonal_to(vector, others)
    for other in others:
        assert abs(float(rest @ other)) < 1e-5
    assert torch.equal(orthogonal_to(vector, []), vector)


def test_the_amount_follows_the_units() -> None:
    one = Direction(unit(torch.ones(4))[0], Site("resid_post", 1), scale=3.0, stream_norm=50.0)
    amounts = {
        units: intervene("add", one, Site("resid_post", 1), 0.5, units).amount for units in ("scale", "unit", "dose")
    }
    assert amounts == {"scale": 1.5, "unit": 0.5, "dose": 25.0}
    assert intervene("add", one, Site("resid_post", 1), 0.5, "dose").dose == pytest.approx(0.5)
    assert intervene("ablate", one, Site("writes"), 0.5).amount == 0.5
    with pytest.raises(RecipeError, match="stream norm"):
        intervene("add", Direction(one.vector, None), Site("resid_post", 1), 0.5, "dose")
    with pytest.raises(RecipeError, match="did you mean 'ablate'"):
        intervene("ablat", one, Site("writes"))
    with pytest.raises(RecipeError, match="finite"):
        intervene("add", one, Site("resid_post", 1), float("nan"))
