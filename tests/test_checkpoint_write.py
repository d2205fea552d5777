"""Writing: base plus edits and nothing else, linked where it can be, and the base never touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer_bake import rounding as rounding_module
from steer_bake.affine import Affine
from steer_bake.checkpoint import Checkpoint, Diagonal, Edit, check_room, publish, recompute, write_edited
from steer_bake.checkpoint import pieces as pieces_module
from steer_bake.checkpoint import pipeline as pipeline_module
from steer_bake.errors import CheckpointError

from . import tiny

D = tiny.WIDTH
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def direction(width: int = D, seed: int = 0) -> Tensor:
    vector = torch.randn(width, 1, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def ablation(width: int = D) -> Affine:
    return Affine(-direction(width), direction(width), torch.zeros(width))


def shift(value: float = 1.0, width: int = D) -> Affine:
    return Affine(torch.zeros(width, 0), torch.zeros(width, 0), torch.full((width,), value))


def in_place(base: Checkpoint, name: str, affine: Affine, axis: int = 0) -> Edit:
    return Edit(name, base.tensors[name].shape, base.tensors[name].dtype, affine, axis, name)


def ablated(base: Checkpoint) -> list[Edit]:
    writers = [name for name in base.tensors if name.endswith(("o_proj.weight", "down_proj.weight"))]
    edits = [in_place(base, name, ablation()) for name in writers]
    return [*edits, in_place(base, EMBEDDING, ablation(), axis=1)]


def biased(base: Checkpoint) -> tuple[list[Edit], dict[str, Any]]:
    """An additive bake: every bias that ``attention_bias`` opens, one of them not zero."""
    edits = []
    for layer in range(tiny.LAYERS):
        for part in "qkvo":
            rows = base.tensors[f"model.layers.{layer}.self_attn.{part}_proj.weight"].shape[0]
            affine = shift() if (part, layer) == ("o", 2) else Affine.identity(rows)
            edits.append(Edit(f"model.layers.{layer}.self_attn.{part}_proj.bias", (rows,), "BF16", affine))
    return edits, {"attention_bias": True}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def load_strictly(folder: Path) -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model


@pytest.fixture(params=["llama", "tied_llama"])
def base(request: pytest.FixtureRequest) -> Iterator[Checkpoint]:
    """A one-file and a sharded checkpoint, whose bytes and times must be the same after the test."""
    folder: Path = request.getfixturevalue(request.param)
    before = snapshot(folder)
    yield Checkpoint.open(folder)
    assert snapshot(folder) == before


def test_an_ablation_writes_the_edit_and_nothing_else(base: Checkpoint, tmp_path: Path) -> None:
    edits = {edit.tensor: edit for edit in ablated(base)}
    write_edited(base, list(edits.values()), tmp_path, config_changes={}, protect=False)
    out = Checkpoint.open(tmp_path)
    assert set(out.tensors) == set(base.tensors)
    assert [out.header_hash(file) for file in out.files] == [base.header_hash(file) for file in base.files]
    for name in base.tensors:
        before, after = base.read(name), out.read(name)
        if name not in edits:
            assert torch.equal(before, after)
            continue
        exact = edits[name].affine(before.double(), edits[name].axis)
        spacing = exact.abs().clamp_min(1e-30) * 2.0**-8  # half a unit in the last place of bfloat16, at most
        assert ((after.double() - exact).abs() <= spacing * 1.01 + 1e-7).all()
        assert not torch.equal(before, after)
    load_strictly(tmp_path)


def test_an_addition_writes_one_small_shard_and_links_the_rest(base: Checkpoint, tmp_path: Path) -> None:
    edits, changes = biased(base)
    records = {record.name: record for record in write_edited(base, edits, tmp_path, config_changes=changes)}
    out = Checkpoint.open(tmp_path)
    *old, new = out.files
    assert new == f"model-{len(out.files):05d}-of-{len(out.files):05d}.safetensors"
    for name, source in zip(old, base.files, strict=True):
        assert os.path.samefile(tmp_path / name, base.folder / source)
        assert (records[name].how, records[name].sha256) == ("linked", None)
        assert records[name].header_hash == base.header_hash(source)
    assert records[new].sha256 == hashlib.sha256((tmp_path / new).read_bytes()).hexdigest()
    assert set(load_file(tmp_path / new)) == {edit.tensor for edit in edits}
    model = load_strictly(tmp_path)
    assert torch.equal(model.model.layers[2].self_attn.o_proj.bias.float(), torch.ones(D))
    assert not model.model.layers[1].self_attn.o_proj.bias.any()


def test_the_index_is_complete_and_written_last(base: Checkpoint, tmp_path: Path) -> None:
    edits, changes = biased(base)
    records = write_edited(base, edits, tmp_path, config_changes=changes)
    assert records[-1].name == "model.safetensors.index.json"
    assert {record.name for record in records} == {path.name for path in tmp_path.iterdir()}
    assert all(record.size == (tmp_path / record.name).stat().st_size for record in records)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    out = Checkpoint.open(tmp_path)
    assert index["weight_map"] == {info.name: info.file for info in out.tensors.values()}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in out.tensors.values())
    if "total_parameters" in base.index_metadata:
        added = sum(edit.shape[0] for edit in edits)
        assert index["metadata"]["total_parameters"] == base.index_metadata["total_parameters"] + added


def test_untouched_shards_are_hard_links(tied_llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tied_llama)
    edit = in_place(base, "model.layers.1.mlp.down_proj.weight", ablation())
    records = write_edited(base, [edit], tmp_path, config_changes={})
    touched = base.tensors[edit.tensor].file
    for file in base.files:
        assert os.path.samefile(tmp_path / file, tied_llama / file) == (file != touched)
    assert {record.name for record in records if record.how == "written"} >= {touched}


def test_an_untied_head_is_the_old_embedding_bit_for_bit(tied_llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(tied_llama)
    shape = base.tensors[EMBEDDING].shape
    head = Edit(HEAD, shape, "BF16", Affine.identity(D), 1, EMBEDDING)
    edits = [head, in_place(base, EMBEDDING, ablation(), axis=1)]
    write_edited(base, edits, tmp_path, config_changes={"tie_word_embeddings": False})
    out = Checkpoint.open(tmp_path)
    assert torch.equal(out.read(HEAD), base.read(EMBEDDING))
    model = load_strictly(tmp_path)
    assert torch.equal(model.lm_head.weight, base.read(EMBEDDING))
    assert torch.equal(model.model.embed_tokens.weight, recompute(base, edits[1]))


def test_float32_widens_only_what_is_edited(base: Checkpoint, tmp_path: Path) -> None:
    edits = [in_place(base, "model.layers.1.mlp.down_proj.weight", ablation()), *biased(base)[0]]
    write_edited(base, edits, tmp_path, config_changes={"attention_bias": True}, dtype="F32")
    out, named = Checkpoint.open(tmp_path), {edit.tensor for edit in edits}
    assert all((info.dtype == "F32") == (info.name in named) for info in out.tensors.values())
    for name in set(base.tensors) - named:
        assert torch.equal(out.read(name), base.read(name))
    exact = ablation()(base.read(edits[0].tensor).double(), 0)
    assert (out.read(edits[0].tensor).double() - exact).abs().max() < 1e-6
    for file in out.files:  # alignment: the safetensors library reads every tensor
        load_file(tmp_path / file)
    load_strictly(tmp_path)


def test_an_inserted_layer_that_adds_nothing_changes_no_logit(base: Checkpoint, tmp_path: Path) -> None:
    after, moved = 1, {}
    for name in base.tensors:
        layer = name.removeprefix("model.layers.").partition(".")[0]
        if layer.isdigit() and int(layer) > after:
            moved[name] = name.replace(f"layers.{layer}.", f"layers.{int(layer) + 1}.")
    edits = []
    for name, info in base.tensors.items():
        if name.startswith(f"model.layers.{after}."):
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            axis = info.shape.index(D)
            new = name.replace(f"layers.{after}.", f"layers.{after + 1}.")
            edits.append(Edit(new, info.shape, info.dtype, Affine.identity(D), axis, None if silent else name))
    changes = {"num_hidden_layers": tiny.LAYERS + 1}
    records = write_edited(base, edits, tmp_path, config_changes=changes, rename=moved)
    out = Checkpoint.open(tmp_path)
    for old, new in {**{name: name for name in base.tensors}, **moved}.items():
        assert torch.equal(base.read(old), out.read(new))
        offset = out.tensors[new].start - base.tensors[old].start
        assert offset % 4096 == 0, "blocks could not be shared"
    untouched = {file for file in base.files if not any(base.tensors[name].file == file for name in moved)}
    assert len([record for record in records if record.how == "linked"]) == len(untouched)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base.folder)(tokens).logits
        assert torch.equal(load_strictly(tmp_path)(tokens).logits, before)


@pytest.mark.tampered  # its steering files are made up
def test_the_other_files_go_along_and_other_weights_do_not(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "base"))
    along = ["LICENSE", "NOTICE.txt", "tokenizer.model", "merges.txt", "vocab.json", "special_tokens_map.json"]
    along += ["preprocessor_config.json", "chat_template.jinja"]
    behind = ["README.md", "pytorch_model.bin", "x.gguf", "steering.json", "steering.safetensors", "optimizer.pt"]
    for name in along + behind:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    (tmp_path / "out").mkdir()
    records = write_edited(Checkpoint.open(folder), [], tmp_path / "out", config_changes={})
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert set(along) <= there
    assert not set(behind) & there
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"
    assert all(not os.path.samefile(folder / name, tmp_path / "out" / name) for name in along)
    assert {"tokenizer.json", "generation_config.json"} <= {record.name for record in records if record.how == "copied"}
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_config_changes_are_merged_into_tables(llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(llama)
    write_edited(base, [], tmp_path, config_changes={"mlp_bias": True, "rope_parameters": {"rope_theta": 5.0}})
    config = json.loads((tmp_path / "config.json").read_text())
    expected = json.loads((llama / "config.json").read_text())
    expected["mlp_bias"] = True
    expected["rope_parameters"]["rope_theta"] = 5.0
    assert config == expected


def test_a_hub_cache_is_copied_and_its_ids_are_kept(llama: Path, tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for path in llama.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / digest)
        (folder / path.name).symlink_to(Path("..") / ".." / "blobs" / digest)
    before = snapshot(blobs)
    (tmp_path / "out").mkdir()
    records = {one.name: one for one in write_edited(Checkpoint.open(folder), [], tmp_path / "out", config_changes={})}
    weights = tmp_path / "out" / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.stat().st_nlink == 1
    assert records["model.safetensors"].how in ("copied", "reflinked")
    assert records["model.safetensors"].lfs_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert snapshot(blobs) == before


SHAPES = {  # shape and residual axis: Linear, Conv1D or embedding, bias, fused experts both ways
    "linear": ((96, 2500), 0),
    "embedding": ((2500, 96), 1),
    "bias": ((96,), 0),
    "experts": ((3, 96, 700), 1),
    "experts, transposed": ((3, 700, 96), 2),
}


@pytest.fixture(scope="module")
def odd_shapes(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("odd")
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, (shape, _) in SHAPES.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_threads_and_blocks_do_not_change_a_bit(
    odd_shapes: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protect: bool,
    dtype: str,
) -> None:
    left, right = torch.cat([direction(96), direction(96, 1)], 1), torch.cat([direction(96, 2), direction(96, 3)], 1)
    rank_two = Affine(left, right, torch.ones(96))
    edits = [in_place(odd_shapes, name, rank_two, axis) for name, (_, axis) in SHAPES.items()]
    threads, results = torch.get_num_threads(), []
    cases = [(1, 8000, 1 << 18, 32 << 20, 2), (2, 8000, 1 << 18, 32 << 20, 2), (2, 900, 7001, 99999, 1)]
    for index, (count, columns, block, slab, workers) in enumerate(cases):
        monkeypatch.setattr(rounding_module, "_TILE_COLUMNS", columns)
        monkeypatch.setattr(rounding_module, "_BLOCK", block)
        monkeypatch.setattr(pieces_module, "SLAB", slab)
        monkeypatch.setattr(pipeline_module, "WORKERS", workers)
        folder = tmp_path / str(index)
        folder.mkdir()
        try:
            torch.set_num_threads(count)
            write_edited(odd_shapes, edits, folder, config_changes={}, dtype=dtype, protect=protect)
            assert torch.get_num_threads() == count
            out = Checkpoint.open(folder)
            for edit in edits:
                assert torch.equal(out.read(edit.tensor), recompute(odd_shapes, edit, dtype, protect=protect))
        finally:
            torch.set_num_threads(threads)
        results.append((folder / "model.safetensors").read_bytes())
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_is_edited_along_its_residual_axis(odd_shapes: Checkpoint, name: str) -> None:
    edit = in_place(odd_shapes, name, ablation(96), SHAPES[name][1])
    found = recompute(odd_shapes, edit, "F32").double()
    assert (found - edit.affine(odd_shapes.read(name).double(), edit.axis)).abs().max() < 1e-5
    assert (torch.tensordot(found, direction(96).double()[:, 0], ([edit.axis], [0]))).abs().max() < 1e-5


@pytest.mark.parametrize("slab", [1, 1 << 20], ids=["a row at a time", "all at once"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_new_matrix_holds_what_its_edit_says(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: int, slab: int
) -> None:
    monkeypatch.setattr(pieces_module, "SLAB", slab)
    base, value = Checkpoint.open(llama), torch.arange(6.0) / 8
    constant = replace(Affine.identity(6), shift=value)
    shape = (6, 9) if axis == 0 else (9, 6)
    column = Edit("column", shape, "BF16", constant, axis, only=(2, 4))
    signs = Edit(
        "signs", shape, "BF16", Affine.identity(6), axis, diagonals=(Diagonal(1, 0, 5, 2.0), Diagonal(0, 1, 5, -1.0))
    )
    number = Edit("number", (), "BF16", replace(Affine.identity(1), shift=torch.tensor([3.0])))
    write_edited(base, [column, signs, number], tmp_path, config_changes={})
    found = Checkpoint.open(tmp_path)
    wanted = torch.zeros(6, 9)
    wanted[:, 2:4] = value[:, None]
    assert torch.equal(found.read("column").float(), wanted if axis == 0 else wanted.T)
    wanted = torch.zeros(shape)
    for step in range(5):
        wanted[1 + step, step], wanted[step, 1 + step] = 2.0, -1.0
    assert torch.equal(found.read("signs").float(), wanted)
    assert found.read("number").shape == ()
    assert float(found.read("number")) == 3.0


def test_the_progress_ends_at_the_total(base: Checkpoint, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_edited(
        base, ablated(base), tmp_path, config_changes={}, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)


def quantised(tmp_path: Path, **config: object) -> Checkpoint:
    tensors = {
        "q": torch.zeros(D, D).to(torch.float8_e4m3fn),
        "w": torch.ones(D, D),
        "code": torch.zeros(3, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(tmp_path)


def test_a_quantised_tensor_is_not_edited_but_passes_through(tmp_path: Path) -> None:
    for name in ("base", "out", "refused"):
        (tmp_path / name).mkdir()
    base = quantised(tmp_path / "base", quantization_config={"quant_method": "fp8"})
    write_edited(base, [in_place(base, "w", ablation())], tmp_path / "out", config_changes={})
    assert torch.equal(Checkpoint.open(tmp_path / "out").read("q").float(), base.read("q").float())
    edit = Edit("q", (D, D), "F8_E4M3", ablation(), 0, "q")
    with pytest.raises(CheckpointError, match=r"fp8 checkpoint.*full-precision"):
        write_edited(base, [edit], tmp_path / "refused", config_changes={})
    missing = Edit("q.weight", (D, D), "BF16", ablation(), 0, "q.weight")  # GPTQ and AWQ have qweight in its place
    with pytest.raises(CheckpointError, match=r"does not hold.*full-precision"):
        write_edited(base, [missing], tmp_path / "refused", config_changes={})
    assert not any((tmp_path / "refused").iterdir())


@pytest.mark.parametrize(
    "edits",
    [
        [Edit("model.norm.weight", (D,), "BF16", ablation(16), 0, "model.norm.weight")],
        [Edit("model.norm.weight", (D, D), "BF16", ablation(), 0, "model.norm.weight")],
        [Edit("model.norm.weight", (D,), "BF16", ablation(), 3, "model.norm.weight")],
        [Edit("model.norm.weight", (D, 1), "BF16", ablation(), 0)],
        [Edit("new", (D,), "BF16", shift()), Edit("new", (D,), "BF16", shift())],
        [Edit("new", (D,), "I8", shift())],
    ],
)
def test_edits_that_do_not_fit_are_refused(llama: Path, tmp_path: Path, edits: list[Edit]) -> None:
    with pytest.raises(CheckpointError):
        write_edited(Checkpoint.open(llama), edits, tmp_path, config_changes={})
    assert not any(tmp_path.iterdir())


def test_renames_that_collide_or_miss_are_refused(llama: Path, tmp_path: Path) -> None:
    base = Checkpoint.open(llama)
    for rename in ({"model.norm.weight": HEAD}, {"nothing": "something"}):
        with pytest.raises(CheckpointError):
            write_edited(base, [], tmp_path, config_changes={}, rename=rename)


def test_an_overflow_of_float16_is_refused(tmp_path: Path) -> None:
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
    save_file({"w": torch.ones(D, D, dtype=torch.float16)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    base = Checkpoint.open(tmp_path / "base")
    for protect in (False, True):
        with publish(tmp_path / "fine") as folder:
            write_edited(base, [in_place(base, "w", shift(60000.0))], folder, config_changes={}, protect=protect)
        shutil.rmtree(tmp_path / "fine")
        with pytest.raises(CheckpointError, match="float16"), publish(tmp_path / "over") as folder:
            write_edited(base, [in_place(base, "w", shift(70000.0))], folder, config_changes={}, protect=protect)
        assert not (tmp_path / "over").exists()


def test_a_disk_that_clearly_lacks_room_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"1,000,000,000,000,000,000 bytes.*free"):
        check_room(tmp_path / "not" / "yet", 10**18)
    check_room(tmp_path, 1)


def test_without_links_or_kernel_copies_the_bytes_are_the_same(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a system that has neither hard links nor copy_file_range."""

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_edited(base, ablated(base)[:1], tmp_path / "a", config_changes={})
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    records = write_edited(base, ablated(base)[:1], tmp_path / "b", config_changes={})
    assert not any(record.how == "linked" for record in records)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
