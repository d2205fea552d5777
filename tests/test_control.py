"""A control vector holds additions at the ends of layers and nothing else, bit for bit; llama.cpp computes hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from steer_bake import control, interchange
from steer_bake.audit import audit
from steer_bake.checkpoint import Checkpoint
from steer_bake.cli import main
from steer_bake.errors import NotFoldable
from steer_bake.interventions import Intervention
from steer_bake.models import ModelRef
from steer_bake.plan import make_plan
from steer_bake.targets.gguf_vector import gguf_vector

from . import jobs
from .test_bake import ablate, add, clamp


def written(base: Path, out: Path, interventions: list[Intervention]) -> Path:
    opened = Checkpoint.open(base)
    return gguf_vector(make_plan(opened, interventions, target="gguf-vector"), opened, ModelRef(str(base), base), out)


def test_what_is_added_at_a_layer_is_one_vector(llama: Path, tmp_path: Path) -> None:
    steering = [add("resid_post.1"), add("resid_pre.2", 2.0, 4), add("mlp_out.3", 1.0, 5)]
    folder = written(llama, tmp_path / "out", steering)
    found = interchange.read(folder / control.FILE)
    assert set(found) == {"direction.1", "direction.3"}
    both = steering[0].affine.shift + steering[1].affine.shift
    assert torch.allclose(found["direction.1"], both, atol=1e-6)
    assert torch.equal(found["direction.3"], steering[2].affine.shift)


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        (add("resid_post.0"), "begin with layer 1"),
        (add("resid_pre.0"), "adds a constant at the end of a layer"),
        (add("resid_mid.1"), "adds a constant at the end of a layer"),
        (add("attn_out.1"), "adds a constant at the end of a layer"),
        (ablate("writers"), "adds a constant at the end of a layer"),
        (clamp("attn_out.1"), "adds a constant at the end of a layer"),
    ],
    ids=lambda one: f"{one.name} {one.site}" if isinstance(one, Intervention) else "",
)
def test_everything_else_is_refused(llama: Path, steering: Intervention, words: str) -> None:
    with pytest.raises(NotFoldable, match=words):
        make_plan(Checkpoint.open(llama), [steering], target="gguf-vector")


@pytest.mark.tampered
def test_the_audit_compares_every_vector(llama: Path, tmp_path: Path) -> None:
    folder = written(llama, tmp_path / "out", [add("resid_post.1")])
    base = Checkpoint.open(llama)
    assert audit(folder, base, hash_files=True).passed
    vectors = {1: 1.01 * add("resid_post.1").affine.shift}
    interchange.write_control_vector(folder / control.FILE, vectors, "llama")
    failed = {check.name for check in audit(folder, base).checks if not check.passed}
    assert {"tensors", "files"} <= failed


def test_bake_writes_one_on_the_command_line(llama: Path, tmp_path: Path) -> None:
    jobs.write_directions(tmp_path / "v.safetensors")
    given = ["--vector", str(tmp_path / "v.safetensors"), "--sites", "resid_post.1", "--target", "gguf-vector"]
    done = CliRunner().invoke(main, ["bake", str(llama), *given, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "--control-vector" in done.output
    assert CliRunner().invoke(main, ["audit", str(tmp_path / "out")]).exit_code == 0
