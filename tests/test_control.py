"""A control vector holds additions at the ends of layers and nothing else, bit for bit; llama.cpp computes hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFWriter

from steer_bake import control, interchange
from steer_bake.audit import audit
from steer_bake.checkpoint import Checkpoint
from steer_bake.cli import main
from steer_bake.errors import CheckpointError, NotFoldable
from steer_bake.interventions import Intervention
from steer_bake.llamacpp import validate_vector
from steer_bake.models import ModelRef, load_model
from steer_bake.plan import make_plan
from steer_bake.targets.gguf_vector import gguf_vector

from . import jobs, tiny
from .test_bake import ablate, add, clamp


def written(base: Path, out: Path, interventions: list[Intervention]) -> Path:
    opened = Checkpoint.open(base)
    return gguf_vector(make_plan(opened, interventions, target="gguf-vector"), opened, ModelRef(str(base), base), out)


def as_gguf(base: Path, path: Path) -> Path:
    """The tiny Llama in llama.cpp's own format, float32 and without a vocabulary."""
    model = load_model(base, dtype="float32")
    config, names = model.config, dict(model.state_dict())
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def add(ours: str, theirs: str, heads: int = 0) -> None:
        tensor = names[f"{ours}.weight"]
        if heads:  # rotated pairs are neighbours there
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{theirs}.weight", tensor.contiguous().numpy())

    add("model.embed_tokens", "token_embd")
    add("model.norm", "output_norm")
    add("lm_head", "output")
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        add(f"{ours}.input_layernorm", f"{theirs}.attn_norm")
        add(f"{ours}.self_attn.q_proj", f"{theirs}.attn_q", config.num_attention_heads)
        add(f"{ours}.self_attn.k_proj", f"{theirs}.attn_k", config.num_key_value_heads)
        add(f"{ours}.self_attn.v_proj", f"{theirs}.attn_v")
        add(f"{ours}.self_attn.o_proj", f"{theirs}.attn_output")
        add(f"{ours}.post_attention_layernorm", f"{theirs}.ffn_norm")
        for part in ("gate", "up", "down"):
            add(f"{ours}.mlp.{part}_proj", f"{theirs}.ffn_{part}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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


def test_it_is_not_written_into_the_base_and_takes_its_licence_along(llama: Path, tmp_path: Path) -> None:
    base = jobs.copy(llama, tmp_path / "base")
    (base / "LICENSE").write_text("take it")
    for inside in (base, base / "vector"):
        with pytest.raises(CheckpointError, match="own folder"):
            written(base, inside, [add("resid_post.1")])
    assert not (base / "vector").exists()
    folder = written(base, tmp_path / "out", [add("resid_post.1")])
    assert (folder / "LICENSE").read_text() == "take it"
    assert {path.name for path in folder.iterdir()} == {
        "LICENSE", control.FILE, "steering.json", "steering.safetensors"
    }  # fmt: skip


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


def test_a_recipe_for_a_control_vector_cannot_be_run(llama: Path, tmp_path: Path) -> None:
    path = jobs.write_recipe(tmp_path, llama, target={"name": "gguf-vector"})
    done = CliRunner().invoke(main, ["run", str(path), "-o", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert "extract RECIPE -o v.gguf" in done.output


def test_validating_one_takes_the_gguf_of_the_model(llama: Path, tmp_path: Path) -> None:
    folder = written(llama, tmp_path / "out", [add("resid_post.1")])
    done = CliRunner().invoke(main, ["validate", str(folder)])
    assert done.exit_code == 1
    assert "--gguf" in done.output


# --- llama.cpp itself


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_computes_what_the_hooks_compute(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is an extra that is compiled when it is installed")
    base = tiny.save_llama(tmp_path / "base", dtype=getattr(torch, dtype))
    steering = [add("resid_post.1", 6.0), add("resid_post.2", 6.0, 1), add("resid_post.3", 6.0, 2)]
    folder = written(base, tmp_path / "out", steering)
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [90, 80, 70, 60, 50]]
    report = validate_vector(folder, base, as_gguf(base, tmp_path / "model.gguf"), steering, rows)
    report.require()
    assert report.legs["llama.cpp"].max_over_std <= 1e-4
    assert report.legs["llama.cpp"].top1 == 1
    with pytest.raises(CheckpointError, match="is not there"):
        validate_vector(folder, base, tmp_path / "other.gguf", steering, rows)


def test_a_gguf_of_another_model_does_not_pass(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is an extra that is compiled when it is installed")
    base = tiny.save_llama(tmp_path / "base", dtype=torch.float32)
    other = as_gguf(tiny.save_llama(tmp_path / "other", dtype=torch.float32, seed=1), tmp_path / "other.gguf")
    folder = written(base, tmp_path / "out", [add("resid_post.1", 3.0)])
    report = validate_vector(folder, base, other, [add("resid_post.1", 3.0)], [[5, 6, 7, 8, 9, 10]])
    assert "effect" in {check.name for check in report.checks if not check.passed}
