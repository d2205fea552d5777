"""Growing tensors: what was there is edited as ever, what is appended stands behind it, and nothing else changes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from steer_bake.affine import Affine
from steer_bake.checkpoint import Appended, Checkpoint, Edit, pieces, publish, recompute, write_edited
from steer_bake.errors import CheckpointError

from . import tiny

D, NEW = 48, 5
SHAPES = {  # shape, residual axis, axis that grows
    "gate": ((700, D), 1, 0),
    "down": ((D, 700), 0, 1),
    "bias": ((D,), 0, 0),
    "experts, down": ((3, D, 50), 1, 2),
    "experts, gate": ((3, 50, D), 2, 1),
    "experts, bias": ((3, D), 1, 1),
    "one expert each": ((3, 50, D), 2, 0),
}


def values(shape: tuple[int, ...], axis: int, seed: int = 7) -> Tensor:
    grown = list(shape)
    grown[axis] = NEW
    return torch.randn(grown, generator=torch.Generator().manual_seed(seed))


def grown(base: Checkpoint, name: str, affine: Affine, axis: int, along: int) -> Edit:
    old = base.tensors[name]
    shape = list(old.shape)
    shape[along] += NEW
    return Edit(name, tuple(shape), old.dtype, affine, axis, name, Appended(values(old.shape, along), along))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base")
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, (shape, _, _) in SHAPES.items()}
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:-1], "model-00002-of-00002.safetensors": names[-1:]}
    for file, inside in files.items():
        save_file({name: tensors[name] for name in inside} | {f"{inside[0]}.norm": torch.ones(9)}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in [*inside, f"{inside[0]}.norm"]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return Checkpoint.open(folder)


def ablation() -> Affine:
    column = torch.randn(D, 1, generator=torch.Generator().manual_seed(1))
    return Affine(-column / column.norm(), column / column.norm(), torch.ones(D))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("affine", [Affine.identity(D), ablation()], ids=["identity", "edited"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("slab", [1000, 32 << 20])
def test_the_old_part_is_edited_and_the_new_one_stands_behind_it(
    base: Checkpoint, tmp_path: Path, name: str, affine: Affine, dtype: str, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SLAB", slab)
    shape, axis, along = SHAPES[name]
    edit = grown(base, name, affine, axis, along)
    assert edit.appended is not None
    records = write_edited(base, [edit], tmp_path, config_changes={}, dtype=dtype)
    out = Checkpoint.open(tmp_path)
    found = out.read(name)
    alone = replace(edit, shape=shape, appended=None)
    behind = edit.appended.values.to(found.dtype)
    assert torch.equal(found, torch.cat([recompute(base, alone, dtype), behind], dim=along))
    assert torch.equal(found, recompute(base, edit, dtype))
    for other in set(base.tensors) - {name}:
        assert torch.equal(out.read(other), base.read(other))
    for record in records:
        if record.how == "written" and record.header_hash:
            assert record.sha256 == hashlib.sha256((tmp_path / record.name).read_bytes()).hexdigest()
    assert sum(record.how == "linked" for record in records) == 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in out.tensors.values())


@pytest.mark.parametrize("affine", [Affine.identity(D), replace(Affine.identity(D), shift=torch.arange(1.0, D + 1))])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("slab", [1000, 32 << 20])
def test_a_new_tensor_is_zeros_or_a_constant_with_what_is_appended_behind(
    base: Checkpoint, tmp_path: Path, name: str, affine: Affine, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SLAB", slab)
    shape, axis, along = SHAPES[name]
    edit = replace(grown(base, name, affine, axis, along), tensor="new", source=None)
    assert edit.appended is not None
    write_edited(base, [edit], tmp_path, config_changes={})
    found = Checkpoint.open(tmp_path).read("new")
    before = affine(torch.zeros(shape).movedim(axis, -1)).movedim(-1, axis)
    assert torch.equal(found, torch.cat([before, edit.appended.values], dim=along).bfloat16())
    assert torch.equal(found, recompute(base, edit))


def test_a_llama_with_more_neurons_loads_and_computes_with_them(llama: Path, tmp_path: Path) -> None:
    base, edits = Checkpoint.open(llama), []
    for layer in range(tiny.LAYERS):
        prefix = f"model.layers.{layer}.mlp"
        edits.append(grown(base, f"{prefix}.gate_proj.weight", Affine.identity(tiny.WIDTH), 1, 0))
        edits.append(grown(base, f"{prefix}.up_proj.weight", Affine.identity(tiny.WIDTH), 1, 0))
        edits.append(grown(base, f"{prefix}.down_proj.weight", Affine.identity(tiny.WIDTH), 0, -1))
    inner = base.config["intermediate_size"] + NEW
    with publish(tmp_path / "out") as folder:
        write_edited(base, edits, folder, config_changes={"intermediate_size": inner})
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="float32", output_loading_info=True)
    assert not any(found.values()), found
    before = AutoModelForCausalLM.from_pretrained(llama, dtype="float32")
    read = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        gate, up, down = (
            getattr(mlp, part).weight.narrow(axis, inner - NEW, NEW)
            for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1))
        )
        added = (torch.nn.functional.silu(read @ gate.T) * (read @ up.T)) @ down.T
        assert torch.allclose(mlp(read), before.model.layers[1].mlp(read) + added, atol=1e-5)
        assert added.abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gate", {"appended": Appended(torch.ones(NEW, D + 1), 0)}, "do not fit into"),
        ("gate", {"appended": Appended(torch.ones(NEW), 0)}, "do not fit into"),
        ("gate", {"appended": Appended(torch.ones(NEW, D), 2)}, "do not fit into"),
        ("gate", {"appended": Appended(torch.ones(900, D), 0)}, "do not fit into"),
        ("gate", {"appended": Appended(torch.ones(NEW, D, dtype=torch.int64), 0)}, "do not fit into"),
        ("gate", {"shape": (700, D)}, "has shape"),
        ("gate", {"source": "down"}, "has shape"),
    ],
)
def test_what_does_not_fit_is_refused(
    base: Checkpoint, tmp_path: Path, name: str, changes: dict[str, object], message: str
) -> None:
    edit = replace(grown(base, name, Affine.identity(D), *SHAPES[name][1:]), **changes)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        write_edited(base, [edit], tmp_path, config_changes={})
    with pytest.raises(CheckpointError, match=message):
        recompute(base, edit)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gate", "down"])
def test_an_appended_value_beyond_float16_is_refused(base: Checkpoint, tmp_path: Path, name: str) -> None:
    edit = grown(base, name, Affine.identity(D), *SHAPES[name][1:])
    assert edit.appended is not None
    edit.appended.values[0, 0] = 70000.0
    with pytest.raises(CheckpointError, match="float16"), publish(tmp_path / "out") as folder:
        write_edited(base, [edit], folder, config_changes={}, dtype="F16")
    assert not any(tmp_path.iterdir())
