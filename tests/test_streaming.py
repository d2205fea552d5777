"""Validation with the weights left on disk: the same figures, the same failures, and memory that stays small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig

from steer_bake import recipe, streaming
from steer_bake.direction import Direction, unit
from steer_bake.errors import CheckpointError
from steer_bake.interventions import Intervention, intervene
from steer_bake.reload_worker import greedy, load_strict, logits
from steer_bake.sites import Site
from steer_bake.validate import Report, validate

from . import tiny
from .test_bake import COMBINED, CONSTANT, PAD, baked
from .test_validate import OPTIONS, ROWS, bias_removed, matrix_left_unedited

ROOT = Path(__file__).parent.parent


def both(folder: Path, base: Path, interventions: list[Intervention]) -> tuple[Report, Report]:
    """The ordinary report and the one with the weights on disk."""
    one, other = (
        validate(folder, base, interventions, ROWS, **OPTIONS, stream=stream)  # type: ignore[arg-type]
        for stream in (False, True)
    )
    return one, other


def assert_same(one: Any, other: Any, place: str = "report") -> None:
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{place}.{index}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-6, nan_ok=True), place
    else:
        assert one == other, place


@pytest.mark.parametrize("kind", ["constant", "combined"])
def test_streaming_measures_what_the_ordinary_validation_measures(
    llama: Path, tied_llama: Path, tmp_path: Path, kind: str
) -> None:
    """An untied model in one file with biases added; a tied one in shards, ablated, clamped and added to."""
    base, interventions = (llama, CONSTANT) if kind == "constant" else (tied_llama, COMBINED)
    ordinary, streamed = both(baked(base, tmp_path / "out", interventions), base, interventions)
    assert streamed.passed
    assert_same(ordinary.as_json(), streamed.as_json())


@pytest.mark.tampered
@pytest.mark.parametrize("break_it", [bias_removed, matrix_left_unedited], ids=lambda one: one.__name__)
def test_streaming_finds_what_the_ordinary_validation_finds(
    llama: Path, tied_llama: Path, tmp_path: Path, break_it: Any
) -> None:
    base, interventions = (tied_llama, COMBINED) if break_it is matrix_left_unedited else (llama, CONSTANT)
    folder = baked(base, tmp_path / "out", interventions)
    break_it(folder, base)
    ordinary, streamed = both(folder, base, interventions)
    assert not streamed.passed
    assert_same(ordinary.as_json(), streamed.as_json())


@pytest.mark.tampered
def test_a_shape_that_does_not_fit_is_a_failed_load_and_no_crash(llama: Path, tmp_path: Path) -> None:
    folder = baked(llama, tmp_path / "out", CONSTANT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    report = validate(folder, llama, CONSTANT, ROWS[:2], pad_id=PAD, decode_prompts=1, decode_tokens=2, stream=True)
    [load] = [check for check in report.checks if check.name == "strict load (float32)"]
    assert not load.passed
    assert "mismatch" in load.detail


def test_every_pass_over_the_model_moves_the_bar(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    validate(
        baked(llama, tmp_path / "out", CONSTANT), llama, CONSTANT, ROWS, pad_id=PAD, decode_prompts=1, decode_tokens=2,
        stream=True, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    [total] = {total for _, total in seen}
    done = [done for done, _ in seen]
    assert done == sorted(done)
    assert done[-1] == total
    assert len(set(done)) > 10


# --- the model itself


def same_logits(folder: Path) -> None:
    whole, problems = load_strict(str(folder), "float32")
    streamed, found = load_strict(str(folder), "float32", stream=True)
    assert found == problems == []
    assert torch.equal(logits(whole, ROWS[:4], PAD), logits(streamed, ROWS[:4], PAD))
    assert torch.equal(greedy(whole, ROWS[:2], PAD, 6), greedy(streamed, ROWS[:2], PAD, 6))
    assert streamed.generation_config.to_dict() == whole.generation_config.to_dict()


def test_a_head_that_the_config_calls_tied_and_the_file_does_not(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "both")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    same_logits(folder)


def test_a_checkpoint_of_the_bare_decoder_and_no_generation_config(tied_llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tied_llama)
    model.model.save_pretrained(tmp_path / "bare")
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "bare" / "model.safetensors")
    same_logits(tmp_path / "bare")


def test_between_two_passes_no_weight_is_in_memory(llama: Path) -> None:
    model, _ = load_strict(str(llama), "float32", stream=True)
    for _ in range(2):
        assert all(parameter.stride() == (0,) * parameter.ndim for parameter in model.parameters())
        assert all(parameter.untyped_storage().nbytes() == 4 for parameter in model.parameters())
        logits(model, ROWS[:1], PAD)


def test_a_weight_used_outside_its_module_is_nan_and_never_a_small_error(llama: Path) -> None:
    model, _ = load_strict(str(llama), "float32", stream=True)
    assert torch.nn.functional.linear(torch.ones(1, tiny.WIDTH), model.lm_head.weight).isnan().all()


def test_a_disk_too_small_for_the_logits_is_said_before_anything_is_computed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = baked(llama, tmp_path / "out", CONSTANT)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10_000))
    with pytest.raises(CheckpointError, match=r"0\.0 GB are free; point TMPDIR"):
        validate(folder, llama, CONSTANT, ROWS, pad_id=PAD, stream=True)


def test_what_transformers_changes_on_loading_is_refused(llama: Path, tmp_path: Path) -> None:
    MixtralConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=8,
    ).save_pretrained(tmp_path)
    assert "merges tensors" in str(streaming.why_not(str(tmp_path)))
    folder = shutil.copytree(llama, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is quantised: leave out --stream"):
        validate(folder, folder, CONSTANT, ROWS, pad_id=PAD, stream=True)
    assert streaming.why_not(str(llama)) is None


def test_a_recipe_can_ask_for_it() -> None:
    text = "{model: m, direction: {load: v.safetensors}, intervention: {sites: '1'}, validate: {stream: true}}"
    assert recipe.parse(text).validation.stream
    assert not recipe.Validate().stream


# --- memory

LAYERS, WIDTH, INNER = 12, 1024, 2816  # 310 MB in bfloat16, 620 MB in float32
# What the libraries alone take, and the larger peak of this process and of the one that reloads, in MiB. What getrusage
# says of a process begins with its parent's peak (here pytest's); VmHWM does not.
MEASURE = """
import json, re, resource, sys
from pathlib import Path
import torch
from steer_bake.reload_worker import greedy, load_strict
from steer_bake.validate import validate
from tests.test_bake import PAD
from tests.test_streaming import wide_addition

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
greedy(load_strict(sys.argv[3], "float32")[0], [[5, 6, 7, 8], [9, 10]], PAD, 2)  # transformers imports what it needs
wanted, libraries = wide_addition(), peak()
report = validate(
    Path(sys.argv[1]), Path(sys.argv[2]), wanted, [[5, 6, 7, 8], [9, 10]], pad_id=PAD, decode_prompts=1,
    decode_tokens=2, stream=True,
)
reloading = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([report.passed, libraries, max(peak(), reloading)]))
"""


def wide_addition() -> list[Intervention]:
    direction = Direction(unit(torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)))[0], None)
    return [intervene("add", direction, Site("resid_post", 1), 8.0, "unit")]


def many_layers(folder: Path) -> Path:
    """A Llama whose layers are all alike, with a tiny vocabulary."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tiny.randomise(LlamaForCausalLM(config), 0).to(torch.bfloat16).save_pretrained(folder)
    one = load_file(folder / "model.safetensors")
    every = dict(one)
    for name, tensor in one.items():
        every |= {name.replace(".layers.0.", f".layers.{n}."): tensor.clone() for n in range(LAYERS)}
    save_file(every, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": LAYERS}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_memory_holds_a_tensor_and_not_the_model(llama: Path, tmp_path: Path) -> None:
    base = many_layers(tmp_path / "base")
    out = baked(base, tmp_path / "out", wide_addition())
    command = [sys.executable, "-c", MEASURE, str(out), str(base), str(llama)]
    # Tensors of this size come from the heap of glibc, which was seen to keep 190 MiB of what had been freed; those
    # above 32 MiB never do. So that what is held is measured, these do not either.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env=environment)
    passed, libraries, peak = json.loads(done.stdout.splitlines()[-1])
    assert passed
    assert (base / "model.safetensors").stat().st_size > 300e6
    # Measured: 22 MiB, two of the largest tensors in float32.
    assert peak - libraries < 60, f"{peak:.0f} MiB, {libraries:.0f} of them before anything was loaded"
