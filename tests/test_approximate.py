"""Ablation in families that normalise what a sublayer writes: never silently, and with its error on the certificate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_bake import card, manifest
from steer_bake.checkpoint import Checkpoint, write_edited
from steer_bake.direction import Direction, unit
from steer_bake.errors import NotFoldable
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef
from steer_bake.plan import make_plan
from steer_bake.recipe import Target
from steer_bake.reload_worker import load_strict
from steer_bake.sites import Site
from steer_bake.steering import steer
from steer_bake.targets.checkpoint import checkpoint
from steer_bake.validate import Report, validate

from . import zoo

#: Wide enough that what the norm divides by hardly changes: its error falls with the width.
WIDE: dict[str, Any] = {"hidden_size": 256}
TYPES = ("gemma2", "gemma3_text", "olmo2", "olmo3", "glm4", "exaone4", "flex_olmo")


def ablation(site: str = "writes", width: int = 256, name: str = "ablate") -> Intervention:
    vector = unit(torch.randn(width, generator=torch.Generator().manual_seed(3)))[0]
    return intervene(name, Direction(vector, None), Site.named(site))


def bake(folder: Path, out: Path, wanted: Intervention) -> Path:
    base = Checkpoint.open(folder)
    return checkpoint(make_plan(base, [wanted], "approximate"), base, ModelRef("tiny", folder), out)


def certified(folder: Path, out: Path, wanted: Intervention) -> Report:
    rows = zoo.ids(16, batch=3).tolist()
    return validate(out, folder, [wanted], rows, pad_id=zoo.PAD, decode_tokens=4)


@pytest.mark.parametrize("model_type", TYPES)
def test_an_ablation_behind_a_norm_is_refused_unless_an_approximation_is_asked_for(
    model_type: str, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path / "base", **WIDE)
    base = Checkpoint.open(tmp_path / "base")
    with pytest.raises(NotFoldable, match="--prefer approximate"):
        make_plan(base, [ablation()])
    plan = make_plan(base, [ablation()], "approximate")
    assert plan.is_approximate
    assert {one.representation for one in plan.decisions if one.approximate} == {"behind_norm"}


@pytest.mark.parametrize("model_type", TYPES)
def test_nothing_of_the_direction_reaches_the_stream(model_type: str, tmp_path: Path) -> None:
    """Whatever else is off, this is exact: the norm's output has no component along what is ablated."""
    zoo.save(model_type, tmp_path / "base", **WIDE)
    report = certified(tmp_path / "base", bake(tmp_path / "base", tmp_path / "out", ablation()), ablation())
    streams = [check for check in report.checks if check.name.startswith("stream")]
    assert streams
    assert all(check.passed for check in streams), streams


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [*((one, torch.float32) for one in TYPES), ("gemma2", torch.bfloat16), ("olmo2", torch.bfloat16)],
    ids=str,
)
def test_the_certificate_says_how_far_off_it_is_and_passes_only_where_that_is_little(
    model_type: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path / "base", dtype=dtype, **WIDE)
    report = certified(tmp_path / "base", bake(tmp_path / "base", tmp_path / "out", ablation()), ablation())
    assert report.passed, [check for check in report.checks if not check.passed]
    said = next(check for check in report.checks if check.name == "function, approximate (float32)")
    assert "NOT exact" in said.detail
    assert said.value is not None
    assert said.limit is not None
    assert 1e-9 < said.value < said.limit
    assert not any("rank_one" in check.name or "constants" in check.name for check in report.checks)


def test_a_plan_that_is_exact_stays_exact_under_that_preference(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "base", **WIDE)
    plan = make_plan(Checkpoint.open(tmp_path / "base"), [ablation()], "approximate")
    assert not plan.is_approximate
    assert {one.representation for one in plan.decisions} == {"embedding_rows", "rank_one"}


def test_a_norm_with_weights_near_zero_does_not_blow_it_up(tmp_path: Path) -> None:
    """Dividing by the norm's weight would: the folded matrix must stay of the size of the one it replaces."""
    zoo.save("olmo2", tmp_path / "base", **WIDE)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensor[7] = 1e-7
    save_file(tensors, file, metadata={"format": "pt"})
    base = Checkpoint.open(tmp_path / "base")
    plan = make_plan(base, [ablation()], "approximate")
    sizes = [float(edit.affine.left.norm() * edit.affine.right.norm()) for edit in plan.edits if edit.axis == 0]
    assert sizes
    assert max(sizes) < 3
    report = certified(tmp_path / "base", bake(tmp_path / "base", tmp_path / "out", ablation()), ablation())
    assert report.passed, [check for check in report.checks if not check.passed]


def test_it_is_closer_than_the_edit_that_ignores_the_norm(tmp_path: Path) -> None:
    zoo.save("olmo2", tmp_path / "base", **WIDE)
    base = Checkpoint.open(tmp_path / "base")
    plan = make_plan(base, [ablation()], "approximate")
    plain = ablation().affine
    naive = [edit if "norm" in edit.tensor or edit.axis else replace(edit, affine=plain) for edit in plan.edits]
    tokens = zoo.ids(16, batch=2)
    errors = {}
    model, _ = load_strict(str(tmp_path / "base"), "float32")
    with steer(model, [ablation()]), torch.no_grad():
        hooked = model(input_ids=tokens).logits
    for name, edits in {"folded": plan.edits, "naive": naive}.items():
        (tmp_path / name).mkdir()
        write_edited(base, edits, tmp_path / name, config_changes={})
        baked, problems = load_strict(str(tmp_path / name), "float32")
        assert not problems
        with torch.no_grad():
            errors[name] = float((baked(input_ids=tokens).logits - hooked).square().mean())
    assert errors["folded"] < errors["naive"] / 2


def test_a_clamp_behind_a_norm_keeps_its_shift_exact(tmp_path: Path) -> None:
    zoo.save("gemma2", tmp_path / "base", **WIDE)
    wanted = ablation(name="clamp")
    plan = make_plan(Checkpoint.open(tmp_path / "base"), [wanted], "approximate")
    assert plan.is_approximate
    assert certified(tmp_path / "base", bake(tmp_path / "base", tmp_path / "out", wanted), wanted).passed


def test_the_folder_remembers_that_it_is_an_approximation_and_the_card_says_so(tmp_path: Path) -> None:
    zoo.save("olmo2", tmp_path / "base", **WIDE)
    out = bake(tmp_path / "base", tmp_path / "out", ablation())
    assert manifest.read(out).prefer == "approximate"
    report = {
        **{"passed": True, "prompts": 1, "tokens": 3, "checks": []},
        "interventions": [{"name": "ablate", "site": "writes", "amount": None, "dose": None}],
        "plan_sha256": manifest.read(out).content["plan_sha256"],
    }
    assert "**Not exact.**" in card.render(out, report, None, None)
    assert Target(prefer="approximate").prefer == "approximate"
