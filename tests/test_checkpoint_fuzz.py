"""Mutated headers, indexes and configs: a checkpoint or a CheckpointError, quickly, and nothing written elsewhere."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from steer_bake.affine import Affine
from steer_bake.checkpoint import Appended, Checkpoint, Edit, Rows, write_edited
from steer_bake.errors import CheckpointError

WEIGHTS, INDEX, CONFIG = "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"
FILES = (WEIGHTS, INDEX, CONFIG)

NUMBERS = st.one_of(st.integers(-3, 70), st.sampled_from([1 << 31, 1 << 63, 1 << 64, 10**30, -1]), st.floats())
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["BF16", "F32", "F4", "w", "n", "dtype", "shape", "data_offsets", "weight_map", "metadata", "__metadata__"]
    ),
    st.sampled_from(
        ["../x.safetensors", "/x.safetensors", ".safetensors", WEIGHTS, "model.safetensors", "\ud800", "\0"]
    ),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)


def make(folder: Path) -> None:
    save_file({"w": torch.ones(4, 8).bfloat16(), "n": torch.ones(4)}, folder / WEIGHTS)
    save_file({"v": torch.ones(3, dtype=torch.int32)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"w": WEIGHTS, "n": WEIGHTS, "v": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 92}, "weight_map": weight_map}))
    (folder / CONFIG).write_text(json.dumps({"model_type": "llama", "hidden_size": 4, "quantization_config": {"a": 1}}))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of the checkpoint and its new bytes: a value replaced or added, or bytes changed, cut or put in."""
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        name = draw(st.sampled_from(FILES))
        raw = (Path(place) / name).read_bytes()
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(raw)))
            raw = raw[:at] + draw(st.binary(max_size=9)) + raw[at + draw(st.sampled_from([0, 1, 1, 8, 1 << 20])) :]
        return name, raw
    start = 8 + struct.unpack("<Q", raw[:8])[0] if name == WEIGHTS else len(raw)
    value = json.loads(raw[8:start] if name == WEIGHTS else raw)
    for _ in range(draw(st.integers(1, 2))):
        path, new = draw(st.sampled_from(places(value))), draw(VALUES)
        value = replaced(value, path, new)
        if isinstance(value, dict) and draw(st.booleans()):
            value = {**value, draw(TEXTS): draw(VALUES)}
    text = json.dumps(value).encode()
    return name, struct.pack("<Q", len(text)) + text + raw[start:] if name == WEIGHTS else text


def check(mutation: tuple[str, bytes]) -> None:
    name, raw = mutation
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "base", Path(place) / "out"
        folder.mkdir()
        out.mkdir()
        make(folder)
        (folder / name).write_bytes(raw)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        tracemalloc.start()
        try:
            base = Checkpoint.open(folder)
            for tensor in base.tensors:
                base.read(tensor)
            zeros = [Edit("new", (4,), base.storage_dtype, Affine.identity(4))]
            rows = [Edit("w", (4, 8), "BF16", Affine(torch.ones(4, 1), torch.ones(4, 1), torch.ones(4)), 0, "w")]
            write_edited(base, zeros, out, config_changes={"hidden_size": 5, "quantization_config": {"b": 2}})
            Checkpoint.open(out)
            shutil.rmtree(out)
            out.mkdir()
            write_edited(base, rows, out, config_changes={})
            shutil.rmtree(out)
            out.mkdir()
            more = Appended(torch.ones(4, 2), 1)
            write_edited(base, [replace(rows[0], shape=(4, 10), appended=more)], out, config_changes={})
            Checkpoint.open(out)
            shutil.rmtree(out)
            out.mkdir()
            taken = {"top": Rows(0, 2), "bottom": Rows(2, 4, (1, 0))}
            parts = [Edit(n, (2, 8), "BF16", Affine.identity(8), 1, "w", rows=taken[n], scale=2.0) for n in taken]
            write_edited(base, parts, out, config_changes={}, drop=("w",))
            Checkpoint.open(out)
        except CheckpointError as refused:
            str(refused).encode()  # a message that cannot be printed would be a second error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 10_000_000
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert {path.name for path in Path(place).iterdir()} == {"base", "out"}


@settings(max_examples=500, deadline=5000, suppress_health_check=list(HealthCheck))
@given(mutations())
def test_a_mutated_checkpoint_opens_or_is_refused(mutation: tuple[str, bytes]) -> None:
    check(mutation)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=5000, suppress_health_check=list(HealthCheck))
@given(mutations())
def test_ten_thousand_mutated_checkpoints_open_or_are_refused(mutation: tuple[str, bytes]) -> None:
    check(mutation)
