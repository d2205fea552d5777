"""A baked folder, strictly reloaded, computes what the hooks compute; and the plan says exactly what was done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_bake import manifest
from steer_bake.checkpoint import Checkpoint
from steer_bake.direction import Direction, unit
from steer_bake.errors import CheckpointError, NotFoldable, RecipeError, UnknownArchitecture
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef, load_model
from steer_bake.plan import make_plan
from steer_bake.reload_worker import greedy, load_strict, logits
from steer_bake.sites import LAYER_POINTS, Site
from steer_bake.steering import steer
from steer_bake.targets.checkpoint import checkpoint

from . import tiny

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [90, 80, 70, 60, 50]]
PAD = 258
# Max logit gap in units of std(logits), float32. Rounding noise of four layers is 1e-6 to 4e-6.
TOLERANCE = 1e-5


def vector(seed: int) -> Direction:
    return Direction(unit(torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed)))[0], None)


def add(site: str, amount: float = 3.0, seed: int = 0) -> Intervention:
    return intervene("add", vector(seed), at(site), amount, "unit")


def ablate(site: str, amount: float = 1.0, seed: int = 1) -> Intervention:
    return intervene("ablate", vector(seed), at(site), amount)


def clamp(site: str, amount: float = 2.0, seed: int = 2) -> Intervention:
    return intervene("clamp", vector(seed), at(site), amount, "unit")


def at(text: str) -> Site:
    point, _, layer = text.partition(".")
    return Site(point, int(layer) if layer else None)


SHIFTS = ("resid_pre.0", "resid_pre.2", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1", "resid_post.3")
CASES = {
    **{f"add at {site}": [add(site)] for site in SHIFTS},
    "add at every layer": [add(f"resid_post.{layer}", 1.0, layer) for layer in range(tiny.LAYERS)],
    "two vectors at one site": [add("resid_post.1"), add("resid_post.1", 2.0, 5)],
    **{f"ablate at {site}": [ablate(site)] for site in ("writes", "writers", "attn_out.2", "mlp_out.2", "resid_pre.0")},
    "half an ablation": [ablate("writes", 0.5)],
    "clamp at writes": [clamp("writes")],
    "clamp at attn_out": [clamp("attn_out.1")],
    "clamp at resid_pre.0": [clamp("resid_pre.0")],
    "two ablations": [ablate("writes"), ablate("writes", seed=7)],
    "ablate and add, not orthogonal": [ablate("writes", seed=0), add("resid_post.1")],
    "clamp and add": [clamp("writes"), add("resid_mid.2"), add("resid_post.2", seed=2)],
    "add before ablate at one write": [add("mlp_out.1", seed=1), ablate("mlp_out.1")],
    "everything": [
        add("resid_post.0"),
        clamp("writes"),
        ablate("attn_out.1"),
        add("resid_pre.0", seed=4),
        ablate("writers"),
    ],
}

#: What is baked where any bake will do: biases alone; and matrices too, the added vector along the clamped direction.
CONSTANT = [add("resid_post.1"), add("resid_mid.2", 2.0, 4)]
COMBINED = [clamp("writes", 2.0, 0), add("resid_post.1")]


def baked(base: Path, out: Path, interventions: list[Intervention], **options: bool) -> Path:
    opened = Checkpoint.open(base)
    return checkpoint(make_plan(opened, interventions), opened, ModelRef(str(base), base), out, **options)


def gap(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference - other).abs().max() / reference.std())


@pytest.fixture(scope="module")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(**options: object) -> Path:
        name = repr(sorted(options.items(), key=str))
        if name not in made:
            made[name] = tiny.save_llama(tmp_path_factory.mktemp("base"), **options)  # type: ignore[arg-type]
        return made[name]

    return make


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("biased", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("case", CASES)
def test_bake_equals_hook(make_base: Callable[..., Path], tmp_path: Path, case: str, tied: bool, biased: bool) -> None:
    base = make_base(tied=tied, biased=biased, dtype=torch.float32, shard_size="20KB" if tied else "1GB")
    out = baked(base, tmp_path / "out", CASES[case])
    reloaded, problems = load_strict(str(out), "float32")
    assert problems == []
    model = load_model(base, dtype="float32")
    plain = logits(model, ROWS, PAD)
    with steer(model, CASES[case]):
        hooked, decoded = logits(model, ROWS, PAD), greedy(model, ROWS, PAD, 12)
    assert gap(hooked, logits(reloaded, ROWS, PAD)) <= TOLERANCE
    assert torch.equal(decoded, greedy(reloaded, ROWS, PAD, 12))
    assert gap(hooked, plain) > 0.05  # a bake that does nothing would pass the lines above


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_shift_is_stored_rounded_once_in_the_models_own_dtype(
    make_base: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    out = Checkpoint.open(baked(make_base(dtype=dtype), tmp_path / "out", [add("resid_post.1")]))
    stored = out.read("model.layers.1.mlp.down_proj.bias")
    assert stored.dtype is dtype
    assert torch.equal(stored, (3.0 * vector(0).vector).to(dtype))


def test_every_bias_the_flag_creates_is_written_as_zeros_in_every_layer(llama: Path, tmp_path: Path) -> None:
    out = Checkpoint.open(baked(llama, tmp_path / "out", [add("resid_post.1"), add("resid_mid.2")]))
    assert (out.config["mlp_bias"], out.config["attention_bias"]) == (True, True)
    biases = {name for name in out.tensors if name.endswith("bias")}
    assert len(biases) == tiny.LAYERS * 7
    full = {"model.layers.1.mlp.down_proj.bias", "model.layers.2.self_attn.o_proj.bias"}
    for name in biases:
        assert bool(out.read(name).any()) == (name in full)


def test_only_the_flag_that_is_needed_is_set(llama: Path) -> None:
    assert make_plan(Checkpoint.open(llama), [add("resid_post.1")]).config_changes == {"mlp_bias": True}
    assert make_plan(Checkpoint.open(llama), [ablate("writers")]).config_changes == {}


def test_a_tied_head_keeps_the_old_embedding(tied_llama: Path, tmp_path: Path) -> None:
    base, out = Checkpoint.open(tied_llama), Checkpoint.open(baked(tied_llama, tmp_path / "out", [clamp("writes")]))
    assert out.config["tie_word_embeddings"] is False
    assert torch.equal(out.read("lm_head.weight"), base.read("model.embed_tokens.weight"))
    assert not torch.equal(out.read("model.embed_tokens.weight"), base.read("model.embed_tokens.weight"))


def test_one_tensor_is_edited_once_whatever_reaches_it(llama: Path) -> None:
    plan = make_plan(Checkpoint.open(llama), CASES["everything"])
    names = [edit.tensor for edit in plan.edits]
    assert len(names) == len(set(names))


def test_a_plan_needs_no_weights(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    file = copy / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as handle:  # the header stays; every weight becomes a hole
        size = file.stat().st_size
        handle.truncate(header)
        handle.truncate(size)
    for case in CASES.values():
        assert make_plan(Checkpoint.open(copy), case).sha256 == make_plan(Checkpoint.open(llama), case).sha256


def test_two_plans_differ_where_their_vectors_do(llama: Path) -> None:
    base = Checkpoint.open(llama)
    plans = {make_plan(base, [add("resid_post.1", amount)]).sha256 for amount in (3.0, 3.03, -3.0)}
    assert len(plans) == 3


@pytest.mark.parametrize("point", [point for point in LAYER_POINTS if point.startswith("resid")])
@pytest.mark.parametrize("name", ["ablate", "clamp"])
def test_a_projection_in_the_middle_of_the_stream_is_refused_with_the_sites_that_work(
    llama: Path, point: str, name: str
) -> None:
    with pytest.raises(NotFoldable, match="'writes'"):
        make_plan(Checkpoint.open(llama), [intervene(name, vector(0), Site(point, 2))])


@pytest.mark.parametrize("model_type", ["qwen2", "mistral"])
def test_a_class_without_a_bias_slot_refuses_shifts_and_takes_ablations(
    llama: Path, tmp_path: Path, model_type: str
) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    base = Checkpoint.open(copy)
    with pytest.raises(NotFoldable, match="no bias"):
        make_plan(base, [add("resid_post.1")], "keep_class")  # another class would have one
    assert make_plan(base, [ablate("writes")]).edits
    assert make_plan(base, [add("resid_pre.0")]).edits


def test_an_unknown_model_type_is_refused(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(UnknownArchitecture, match=r"unheard_of.*transformers"):
        make_plan(Checkpoint.open(copy), [add("resid_post.1")])


def test_a_vector_or_layer_that_does_not_fit_is_refused(llama: Path) -> None:
    base = Checkpoint.open(llama)
    wide = intervene("add", Direction(unit(torch.ones(7))[0], None), Site("resid_post", 1), 1.0, "unit")
    for wrong, words in ((wide, "7 components"), (add("resid_post.9"), "layers 0 to 3")):
        with pytest.raises(RecipeError, match=words):
            make_plan(base, [wrong])
    with pytest.raises(RecipeError, match="no intervention"):
        make_plan(base, [])


# --- the manifest


def test_the_manifest_gives_back_the_interventions(llama: Path, tmp_path: Path) -> None:
    given = CASES["everything"]
    found = manifest.read(baked(llama, tmp_path / "out", given)).interventions
    again = make_plan(Checkpoint.open(llama), found)
    assert again.sha256 == make_plan(Checkpoint.open(llama), given).sha256
    by_name = {(one.name, one.site): one for one in found}
    for one in given:
        assert torch.equal(by_name[one.name, one.site].affine.shift, one.affine.shift)


@pytest.mark.parametrize(("case", "linked"), [("add at resid_post.1", 1), ("ablate at writes", 0)])
def test_the_manifest_lists_every_file_with_a_hash_of_what_we_wrote(
    llama: Path, tmp_path: Path, case: str, linked: int
) -> None:
    out = baked(llama, tmp_path / "out", CASES[case])
    records = {record["name"]: record for record in manifest.read(out).content["files"]}
    assert set(records) == {path.name for path in out.iterdir()} - {manifest.JSON_FILE, manifest.VECTORS_FILE}
    for name, record in records.items():
        assert record["size"] == (out / name).stat().st_size
        if record["sha256"] is not None:
            assert record["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        else:
            assert record["header_hash"] == Checkpoint.open(out).header_hash(name)
    assert sum(record["sha256"] is None for record in records.values()) == linked  # the base's own shard


@pytest.mark.tampered
def test_a_manifest_whose_vectors_were_exchanged_is_refused(llama: Path, tmp_path: Path) -> None:
    out = baked(llama, tmp_path / "out", [add("resid_post.1")])
    tensors = load_file(out / manifest.VECTORS_FILE)
    save_file({name: -tensor for name, tensor in tensors.items()}, out / manifest.VECTORS_FILE)
    with pytest.raises(CheckpointError, match="do not belong together"):
        manifest.read(out)


@pytest.mark.tampered
def test_a_manifest_that_names_no_site_is_refused(llama: Path, tmp_path: Path) -> None:
    out = baked(llama, tmp_path / "out", [add("resid_post.1")])
    text = (out / manifest.JSON_FILE).read_text()
    (out / manifest.JSON_FILE).write_text(text.replace('"resid_post.1"', '"foo.1"'))
    with pytest.raises(CheckpointError, match=r"damaged.*foo\.1"):
        manifest.read(out)


def test_baking_a_baked_folder_is_refused_unless_stacked(llama: Path, tmp_path: Path) -> None:
    first = baked(llama, tmp_path / "first", [add("resid_post.1")])
    with pytest.raises(CheckpointError, match="--stack"):
        baked(first, tmp_path / "second", [add("resid_post.2")])
    assert not (tmp_path / "second").exists()
    second = baked(first, tmp_path / "second", [add("resid_post.1")], stack=True)
    assert manifest.read(second).content["stacked_on"]["plan"]["interventions"]
    twice = Checkpoint.open(second).read("model.layers.1.mlp.down_proj.bias").float()
    assert torch.allclose(twice, 6.0 * vector(0).vector, rtol=1e-2)


def test_a_dropped_in_architecture_file_is_enough(llama: Path, tmp_path: Path) -> None:
    from steer_bake import architectures

    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "another.py").write_text(
        "from dataclasses import replace\nfrom steer_bake.architectures.llama import llama\n"
        "another = (replace(llama[0], model_types=('another_llama',)),)\n"
    )
    architectures.__path__.append(str(folder))
    try:
        known = architectures.claimed()
        assert replace(known["another_llama"], model_types=known["llama"].model_types) == known["llama"]
    finally:
        architectures.__path__.remove(str(folder))
