"""Edits that take rows of their source: parts of a fused matrix, heads in another order, and a table times a number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steer_bake.affine import Affine
from steer_bake.checkpoint import (
    Appended,
    Checkpoint,
    Edit,
    Rows,
    check_no_weights,
    pieces,
    recompute,
    write_edited,
)
from steer_bake.checkpoint.pieces import Copy
from steer_bake.errors import CheckpointError

D, FUSED = 48, 640
HEADS = tuple(range(0, 16, 2)) + tuple(range(1, 16, 2))
ROWS = {
    "the first": Rows(0, 320),
    "some": Rows(320, 480),
    "heads": Rows(0, FUSED, HEADS),
    "some heads": Rows(160, 480, HEADS),
    "a permutation that is none": Rows(16, 48, tuple(range(16))),
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved(tmp_path_factory.mktemp("base"), {name: random(shape) for name, shape in SHAPES.items()})


#: The width of the stream is the number of a matrix's columns, or of its rows.
SHAPES = {"reads": (FUSED, D), "writes": (FUSED, 40), "bias": (FUSED,), "other": (5, D), "experts": (3, FUSED, D)}


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).bfloat16()


def saved(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    """All but ``other`` in the first file."""
    first = {name: tensor for name, tensor in tensors.items() if name != "other"}
    files = dict(zip(SHARDS, (first, {"other": tensors["other"]}), strict=True))
    for file, inside in files.items():
        save_file(inside, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def ablation(width: int) -> Affine:
    column = torch.randn(width, 1, generator=torch.Generator().manual_seed(1))
    return Affine(-column / column.norm(), column / column.norm(), torch.ones(width))


def taken(tensor: Tensor, rows: Rows) -> Tensor:
    """Those rows, by indexing."""
    block = len(rows.order)
    kept = tensor[rows.start : rows.stop]
    return kept.reshape(-1, block, *kept.shape[1:])[:, list(rows.order)].reshape(kept.shape)


def edit_of(base: Checkpoint, name: str, rows: Rows, *, edited: bool) -> Edit:
    shape = (rows.stop - rows.start, *base.tensors[name].shape[1:])
    axis = 1 if name == "reads" else 0
    affine = ablation(shape[axis]) if edited else Affine.identity(shape[axis])
    return Edit("part", shape, "BF16", affine, axis, name, rows=rows)


@pytest.mark.parametrize("slab", [1000, 32 << 20])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("edited", [False, True], ids=["moved", "edited"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["reads", "writes", "bias"])
def test_rows_are_edited_like_a_tensor_that_holds_them_alone(
    base: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    rows: str,
    edited: bool,
    dtype: str,
    slab: int,
) -> None:
    monkeypatch.setattr(pieces, "SLAB", slab)
    edit = edit_of(base, name, ROWS[rows], edited=edited)
    write_edited(base, [edit], tmp_path, config_changes={}, dtype=dtype)
    found = Checkpoint.open(tmp_path).read("part")
    (tmp_path / "alone").mkdir()
    alone = saved(tmp_path / "alone", {"part": taken(base.read(name), ROWS[rows]), "other": base.read("other")})
    wanted = recompute(alone, replace(edit, source="part", rows=None), dtype)
    assert torch.equal(found, wanted)
    assert torch.equal(found, recompute(base, edit, dtype))
    assert edit.keeps_values is not edited
    assert edited or torch.equal(found, taken(base.read(name), ROWS[rows]).to(found.dtype))


@pytest.mark.parametrize("along", [0, 1])
def test_what_is_appended_stands_behind_the_rows(base: Checkpoint, along: int) -> None:
    rows = ROWS["some heads"]
    moved = edit_of(base, "reads", rows, edited=False)
    more = torch.randn(7, D) if along == 0 else torch.randn(320, 7)
    shape = (327, D) if along == 0 else (320, D + 7)
    axis = 1 - along
    grown = replace(
        moved,
        shape=shape,
        axis=axis,
        affine=Affine.identity(moved.shape[axis]),
        appended=Appended(more, along),
    )
    wanted = torch.cat([taken(base.read("reads"), rows), more.bfloat16()], along)
    assert torch.equal(recompute(base, grown), wanted)


def test_rows_in_another_order_are_written_in_bounded_pieces(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SLAB", 2000)
    edit = edit_of(base, "reads", ROWS["heads"], edited=False)
    found = list(pieces.pieces(base, edit, 0, "BF16", protect=True))
    assert len(found) == FUSED // 20  # 20 rows are 1920 bytes
    assert max(piece.size for piece in found) <= 2000
    run = list(pieces.pieces(base, edit_of(base, "reads", ROWS["some"], edited=False), 0, "BF16", protect=True))
    assert [type(piece) for piece in run] == [Copy]  # by the kernel


def test_parts_lie_where_the_whole_lay_and_nothing_else_is_touched(base: Checkpoint, tmp_path: Path) -> None:
    parts = {"first": Rows(0, 400), "second": Rows(400, 560, HEADS), "third": Rows(560, FUSED)}
    edits = [
        replace(edit_of(base, "reads", rows, edited=False), tensor=name, axis=1, affine=Affine.identity(D))
        for name, rows in parts.items()
    ]
    bias = Edit("reads.bias", (FUSED,), "BF16", Affine.identity(FUSED))
    records = write_edited(base, [*edits, bias], tmp_path, config_changes={}, drop=("reads",))
    out = Checkpoint.open(tmp_path)
    assert set(out.tensors) == {*SHAPES, *parts, "reads.bias"} - {"reads"}
    assert {out.tensors[name].file for name in parts} == {"model-00001-of-00003.safetensors"}
    assert out.tensors["reads.bias"].file == "model-00003-of-00003.safetensors"
    assert [record.how for record in records if record.header_hash] == ["written", "linked", "written"]
    for name, rows in parts.items():
        assert torch.equal(out.read(name), taken(base.read("reads"), rows))
    for name in ("writes", "bias", "other", "experts"):
        assert torch.equal(out.read(name), base.read(name))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in base.tensors.values()) + 2 * FUSED
    with pytest.raises(CheckpointError, match="needs the weights in"):
        check_no_weights(base, [*edits, bias], {}, ("reads",))
    check_no_weights(base, [bias], {})


def test_a_tensor_is_multiplied_before_the_map_and_rounded_once(base: Checkpoint) -> None:
    old, factor = base.read("reads"), 45.254833995939045
    whole = Edit("reads", (FUSED, D), "BF16", Affine.identity(D), 1, "reads", scale=factor)
    assert torch.equal(recompute(base, whole), (old.float() * factor).bfloat16())
    assert torch.equal(recompute(base, whole, "F32"), old.float() * factor)
    assert not whole.keeps_values
    edited = recompute(base, replace(whole, affine=ablation(D)), "F32")
    assert (edited - ablation(D)(old.float() * factor)).abs().max() < 1e-4
    huge = replace(whole, scale=1e6)
    with pytest.raises(CheckpointError, match="float16"):
        recompute(base, huge, "F16")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("reads", Rows(0, FUSED + 1), "of which rows 0 to 641 are taken"),
        ("reads", Rows(-1, 319), "are taken"),
        ("reads", Rows(8, 8), "are taken"),
        ("reads", Rows(0, 320, (0, 1, 3)), "are taken"),
        ("reads", Rows(0, 320, (0, 0)), "are taken"),
        ("reads", Rows(0, 310, HEADS), "are taken"),
        ("reads", Rows(0, 320, ()), "are taken"),
        ("experts", Rows(0, 1), "are taken"),
        (None, Rows(0, 320), "names none"),
    ],
)
def test_rows_that_are_not_there_are_refused(base: Checkpoint, name: str | None, rows: Rows, message: str) -> None:
    shape = (rows.stop - rows.start, *SHAPES[name or "reads"][1:])
    edit = Edit("part", shape, "BF16", Affine.identity(shape[-1]), len(shape) - 1, name, rows=rows)
    with pytest.raises(CheckpointError, match=message):
        recompute(base, edit)


def test_a_dropped_tensor_must_be_there(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no_such"):
        write_edited(base, [], tmp_path, config_changes={}, drop=("no_such",))
