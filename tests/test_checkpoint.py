"""Opening: what a folder holds is read exactly; what is missing, damaged or unsafe is refused with a sentence."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_bake.checkpoint import Checkpoint
from steer_bake.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def copied(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def with_header(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Rewrite the header of the one file of ``folder``, keeping the data."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = text if isinstance(text, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("fixture", ["llama", "tied_llama"])
def test_tensors_are_read_as_safetensors_reads_them(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    base = Checkpoint.open(folder)
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(base.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(base.read(name), tensor)
        assert base.tensors[name].shape == tuple(tensor.shape)
    assert base.storage_dtype == "BF16"
    assert base.config["model_type"] == "llama"


def test_every_dtype_is_read_back(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    base = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert base.read(name).dtype == tensor.dtype
        assert torch.equal(base.read(name).float(), tensor.float())


def test_opening_holds_no_weights_in_memory(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4096, 4096)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tracemalloc.start()
    Checkpoint.open(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_header_hash_sees_a_change_of_the_header(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    before = Checkpoint.open(folder).header_hash("model.safetensors")
    assert before == Checkpoint.open(llama).header_hash("model.safetensors")
    with_header(folder, lambda header: header.update(__metadata__={"format": "pt", "more": "x"}))
    assert Checkpoint.open(folder).header_hash("model.safetensors") != before


def test_a_hostile_length_costs_nothing(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    for length in (99_999_999, 100_000_001, 1 << 40, (1 << 64) - 1):
        with open(folder / "model.safetensors", "r+b") as file:
            file.write(struct.pack("<Q", length))
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged.*download"):
            Checkpoint.open(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


def entry(header: dict[str, object]) -> dict[str, object]:
    found = header["model.norm.weight"]
    assert isinstance(found, dict)
    return found


HEADERS: dict[str, Callable[[dict[str, object]], object]] = {
    "not JSON": lambda header: b"{oops",
    "not an object": lambda header: b"[1, 2]",
    "not UTF-8": lambda header: b'{"\xff": 1}',
    "deep": lambda header: b'{"a":' + b"[" * 200_000,
    "a long number": lambda header: b'{"a":' + b"9" * 1_000_000 + b"}",
    "a duplicate name": lambda header: json.dumps(header)[:-1].encode() + b', "lm_head.weight": {}}',
    "a lone surrogate": lambda header: json.dumps({**header, "\ud800": {}}).encode(),
    "unknown dtype": lambda header: entry(header).update(dtype="F12"),
    "wrong shape": lambda header: entry(header).update(shape=[33]),
    "huge shape": lambda header: entry(header).update(shape=[1 << 62] * 10_000),
    "negative shape": lambda header: entry(header).update(shape=[-1, -32]),
    "a shape of booleans": lambda header: entry(header).update(shape=[True, 32]),
    "offsets outside": lambda header: entry(header).update(data_offsets=[0, 1 << 50]),
    "offsets backwards": lambda header: entry(header).update(data_offsets=[64, 0]),
    "an overlap": lambda header: entry(header).update(data_offsets=[0, 64]),
    "a hole": lambda header: header.pop("model.norm.weight"),
    "a further field": lambda header: entry(header).update(more=1),
    "an entry that is a list": lambda header: header.update({"model.norm.weight": [1]}),
    "metadata of numbers": lambda header: header.update(__metadata__={"format": 1}),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_malformed_header_is_refused(
    llama: Path, tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    folder = copied(llama, tmp_path)
    with_header(folder, change)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(llama: Path, tmp_path: Path, keep: int) -> None:
    folder = copied(llama, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(tied_llama: Path, tmp_path: Path) -> None:
    folder = copied(tied_llama, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing; download"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "a\\x.safetensors",
        "C:x.safetensors",
        "..",
        "",
        "x.bin",
        3,
        None,
        "a\0.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
    ],
    ids=repr,
)
def test_a_shard_name_cannot_leave_the_folder(tied_llama: Path, tmp_path: Path, name: object) -> None:
    folder = copied(tied_llama, tmp_path)
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        Checkpoint.open(folder)


def test_an_index_that_names_the_wrong_shard_is_refused(tied_llama: Path, tmp_path: Path) -> None:
    folder = copied(tied_llama, tmp_path)
    index = json.loads((folder / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.embed_tokens.weight"] = files[-1]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'model\.embed_tokens\.weight' is not in"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tied_llama: Path, tmp_path: Path) -> None:
    folder = copied(tied_llama, tmp_path)
    save_file({"more": torch.zeros(1), "model.norm.weight": torch.zeros(32)}, folder / "zz.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["more"] = "zz.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is in both"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {}}', '{"metadata": {}}', "\0"])
def test_a_broken_index_is_refused(tied_llama: Path, tmp_path: Path, text: str) -> None:
    folder = copied(tied_llama, tmp_path)
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "\0", '{"a":' * 100_000])
def test_a_broken_config_is_refused(llama: Path, tmp_path: Path, text: str) -> None:
    folder = copied(llama, tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_pipe_in_place_of_a_file_does_not_hang(llama: Path, tmp_path: Path) -> None:
    folder = copied(llama, tmp_path)
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match="not a regular file"):
            Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        (["pytorch_model.bin"], "save_pretrained"),
        (["model.gguf"], "GGUF"),
        ([], "neither model.safetensors nor"),
    ],
)
def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path, present: list[str], sentence: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=sentence):
        Checkpoint.open(tmp_path)


def test_what_is_not_a_checkpoint_folder_is_refused(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"did you mean 'model\.norm\.weight'"):
        Checkpoint.open(llama).read("model.norm.weights")
