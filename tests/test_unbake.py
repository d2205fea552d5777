"""Unbaking gives the base back byte for byte: from what the folder keeps, or with the base for edited matrices."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from steer_bake.affine import Affine
from steer_bake.audit import audit
from steer_bake.baked import undo
from steer_bake.checkpoint import Checkpoint, Edit, FileRecord, Rows, write_edited
from steer_bake.checkpoint.folder import as_bytes
from steer_bake.cli import main
from steer_bake.direction import Direction, unit
from steer_bake.errors import CheckpointError, ValidationFailed
from steer_bake.interventions import Intervention, intervene
from steer_bake.originals import FROM_BASE, GROWN, KEPT, Originals, keep
from steer_bake.sites import Site
from steer_bake.unbake import needs_base, rebuild, steps, unbake

from . import tiny
from .test_audit import flip, hub_cache, in_json, record_again, told
from .test_bake import CASES, ablate, add, baked

INDEX = "model.safetensors.index.json"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a bake carries or replaces."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def given_back(base: Path, out: Path) -> None:
    assert contents(out) == contents(base)


@pytest.mark.parametrize("biased", [False, True], ids=["no biases", "biases"])
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
@pytest.mark.parametrize("case", ["add at every layer", "two vectors at one site"])
def test_an_additive_bake_is_undone_without_the_base(tmp_path: Path, case: str, shard_size: str, biased: bool) -> None:
    base = tiny.save_llama(tmp_path / "base", biased=biased, shard_size=shard_size)
    before = contents(base)
    folder = baked(base, tmp_path / "baked", CASES[case])
    told(folder, lambda content: content["base"].update(folder="gone", name="gone"))
    shutil.rmtree(base)
    assert not needs_base(folder)
    done = unbake(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert done.audit.passed
    shutil.rmtree(folder)  # without its base it cannot be audited any more


@pytest.mark.parametrize("case", CASES)
def test_every_bake_is_undone_with_the_base(llama: Path, tied_llama: Path, tmp_path: Path, case: str) -> None:
    for base in (llama, tied_llama):
        folder = baked(base, tmp_path / base.name, CASES[case])
        undo(folder, tmp_path / f"{base.name}.out", None)
        given_back(base, tmp_path / f"{base.name}.out")
        assert failed_checks(tmp_path / f"{base.name}.out", folder) == []


def failed_checks(base: Path, folder: Path) -> list[str]:
    return [check.name for check in audit(folder, Checkpoint.open(base)).checks if not check.passed]


def test_untouched_files_are_linked(llama: Path, tied_llama: Path, tmp_path: Path) -> None:
    folder = baked(tied_llama, tmp_path / "ablated", [ablate("mlp_out.2")])
    planned = [step for step in steps(folder, with_base=True) if step.name.endswith(".safetensors")]
    assert {step.how for step in planned} == {"linked to the base's"}
    undo(folder, tmp_path / "out", None)
    for name in Checkpoint.open(tied_llama).files:
        assert (tmp_path / "out" / name).samefile(tied_llama / name)
    added = baked(llama, tmp_path / "added", [add("resid_post.1")])
    unbake(added, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").samefile(added / "model-00001-of-00002.safetensors")


@pytest.mark.tampered
def test_what_was_taken_unread_is_said(llama: Path, tmp_path: Path) -> None:
    folder = baked(llama, tmp_path / "baked", [add("resid_post.1")])
    flip(folder, "model.layers.0.self_attn.q_proj.weight")  # in a shard that was linked, of which no hash is known
    assert "no hash of it was recorded" in unbake(folder, tmp_path / "out").unproven["model.safetensors"]
    with pytest.raises(ValidationFailed, match="untouched tensors"):
        unbake(folder, tmp_path / "other", Checkpoint.open(llama))
    sound = baked(llama, tmp_path / "sound", [add("resid_post.1")])
    assert unbake(sound, tmp_path / "third", Checkpoint.open(llama)).unproven == {}
    said = command("unbake", sound, "-o", tmp_path / "fourth")
    assert "model.safetensors was taken as it is: no hash of it" in said.stderr


def test_a_recorded_hash_is_compared_where_that_is_asked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer_bake.checkpoint.writing.place", lambda source, target: None)  # as on another disk
    folder = baked(llama, tmp_path / "baked", [add("resid_post.1")])
    assert "--hash does" in unbake(folder, tmp_path / "out").unproven["model.safetensors"]
    assert unbake(folder, tmp_path / "other", hash_files=True).unproven == {}
    flip(folder, "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValidationFailed, match=r"hashes: model-00001-of-00002\.safetensors"):
        unbake(folder, tmp_path / "third", hash_files=True)
    flip(folder, "model.layers.0.self_attn.q_proj.weight")  # back again


def test_a_matrix_needs_the_base_and_says_so(llama: Path, tmp_path: Path) -> None:
    folder = baked(llama, tmp_path / "baked", [ablate("mlp_out.2")])
    assert needs_base(folder)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight.*--base"):
        unbake(folder, tmp_path / "out")
    other = tiny.save_llama(tmp_path / "other", seed=5)
    with pytest.raises(ValidationFailed, match="untouched tensors"):
        unbake(folder, tmp_path / "out", Checkpoint.open(other))
    sharded = tiny.save_llama(tmp_path / "sharded", seed=5, shard_size="20KB")
    with pytest.raises(CheckpointError, match="is not the base"):
        unbake(folder, tmp_path / "out", Checkpoint.open(sharded))
    assert not (tmp_path / "out").exists()


def test_a_stacked_bake_is_undone_one_layer_at_a_time(llama: Path, tmp_path: Path) -> None:
    once = baked(llama, tmp_path / "once", [add("resid_post.1")])
    twice = baked(once, tmp_path / "twice", [add("resid_post.1", 2.0, 5), ablate("attn_out.0")], stack=True)
    thrice = baked(twice, tmp_path / "thrice", [add("resid_mid.2", 1.0, 6)], stack=True)
    undo(thrice, tmp_path / "two", None)
    given_back(twice, tmp_path / "two")
    undo(tmp_path / "two", tmp_path / "one", None)
    given_back(once, tmp_path / "one")
    undo(tmp_path / "one", tmp_path / "none", None)
    given_back(llama, tmp_path / "none")


def test_a_base_in_a_hub_cache_comes_back_as_plain_files_with_its_hashes(tied_llama: Path, tmp_path: Path) -> None:
    base = hub_cache(tied_llama, tmp_path / "models--org--name")
    folder = baked(base, tmp_path / "baked", [add("resid_post.1"), ablate("mlp_out.2")])
    undo(folder, tmp_path / "out", str(base), hash_files=True)
    given_back(tied_llama, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.tampered
@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda f: flip(f, "model.layers.1.mlp.down_proj.bias"), "tensors"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: in_json(f / "config.json", lambda content: content.update(vocab_size=7)), "config.json"),
        (
            lambda f: (in_json(f / "config.json", lambda content: content.update(vocab_size=7)), record_again(f)),
            "vocab_size=7",
        ),
        (lambda f: told(f, lambda content: content["base_files"][0].update(header_hash="0" * 64)), "header"),
    ],
    ids=["bias", "adapter", "tokenizer", "config", "config recorded", "header hash"],
)
def test_a_tampered_folder_is_refused_and_nothing_is_written(
    llama: Path, tmp_path: Path, tamper: Any, words: str
) -> None:
    folder = baked(llama, tmp_path / "baked", [add("resid_post.1")])
    tamper(folder)
    with pytest.raises(ValidationFailed, match=words):
        unbake(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["baked"]


@pytest.mark.tampered
def test_a_changed_byte_in_a_file_that_is_used_is_found_by_its_recorded_hash(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", biased=True)
    folder = baked(base, tmp_path / "baked", [add("resid_post.1")])  # rewrites the one file, which holds the biases
    flip(folder, "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(ValidationFailed, match="sha256"):
        unbake(folder, tmp_path / "out")


@pytest.mark.tampered
def test_what_a_manifest_names_outside_the_folder_is_not_written(llama: Path, tmp_path: Path) -> None:
    folder = baked(llama, tmp_path / "baked", [add("resid_post.1")])
    told(folder, lambda content: content["base_files"][0].update(name="../../evil.safetensors"))
    with pytest.raises(CheckpointError, match="damaged"):
        unbake(folder, tmp_path / "out")
    assert not list(tmp_path.rglob("evil*"))


def test_small_folders_keep_little(llama: Path, tmp_path: Path) -> None:
    """The manifest of a big model must stay small: nothing in it grows with the size of a matrix."""
    folder = baked(llama, tmp_path / "baked", CASES["everything"])
    kept = load_file(folder / "steering.safetensors")
    assert all(tensor.ndim < 2 or tensor.shape[0] == tiny.WIDTH for tensor in kept.values())
    assert "undo.config.json" in kept


# --- growing bakes: renamed and inserted layers, appended rows and columns


def records_of(folder: Path, names: list[str]) -> list[FileRecord]:
    opened = Checkpoint.open(folder)
    return [FileRecord(name, 0, "written", None, opened.header_hash(name), None) for name in names]


def through_the_manifest(kept: Originals) -> Originals:
    return Originals.read(json.loads(json.dumps(kept.listing())), kept.tensors())


@pytest.mark.parametrize("which", ["llama", "tied_llama"])
def test_inserted_and_renumbered_layers_are_undone(request: pytest.FixtureRequest, tmp_path: Path, which: str) -> None:
    base = Checkpoint.open(request.getfixturevalue(which))
    names = [name for name in base.tensors if name.startswith("model.layers.2.")]
    rename = {
        name: name.replace(f"layers.{layer}.", f"layers.{layer + 1}.")
        for name in base.tensors
        for layer in (2, 3)
        if f"layers.{layer}." in name
    }
    new = []
    for name in names:
        info = base.tensors[name]
        new.append(Edit(name, info.shape, info.dtype, Affine.identity(info.shape[0])))
    out, again = tmp_path / "out", tmp_path / "again"
    out.mkdir()
    again.mkdir()
    records = write_edited(base, new, out, config_changes={"num_hidden_layers": 5}, rename=rename)
    kept = through_the_manifest(keep(base, new, records, rename))
    assert not kept.needs_base
    rebuild(Checkpoint.open(out), kept, None, again, {})
    there = contents(base.folder)
    assert contents(again) == {
        name: there[name]
        for name in there
        if name.endswith("safetensors") or "config" in name[:6] or name.endswith("index.json")
    }


@pytest.mark.parametrize("append", ["rows", "columns", "both"])
def test_appended_rows_and_columns_are_cut_off(tmp_path: Path, append: str) -> None:
    base, out, again = tmp_path / "base", tmp_path / "out", tmp_path / "again"
    for folder in (base, out, again):
        folder.mkdir()
    before = {"w": torch.randn(6, 4).bfloat16(), "v": torch.randn(5), "u": torch.randn(3, 4)}
    rows, columns = int(append != "columns"), int(append != "rows")
    grown = {
        "w": torch.randn(6 + 2 * rows, 4 + 3 * columns).bfloat16(),
        "v": torch.randn(5 + 2 * rows),
        "u": before["u"],
    }
    grown["w"][:6, :4] = before["w"]
    grown["v"][:5] = before["v"]
    for folder, tensors in ((base, before), (out, grown)):
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text('{"a":\t1}')
    opened = Checkpoint.open(base)
    edits = [
        Edit(name, tuple(grown[name].shape), opened.tensors[name].dtype, Affine.identity(len(grown[name])), 0, name)
        for name in ("w", "v")
    ]
    kept = through_the_manifest(keep(opened, edits, records_of(out, ["model.safetensors"])))
    assert dict(kept.edited) == {"w": GROWN, "v": GROWN}
    rebuild(Checkpoint.open(out), kept, None, again, {})
    given_back(base, again)


def test_a_tensor_in_parts_or_in_another_order_only_comes_back_from_the_base(llama: Path) -> None:
    base, old = Checkpoint.open(llama), "model.layers.0.self_attn.q_proj.weight"
    rows, none = base.tensors[old].shape[0], Affine.identity(tiny.WIDTH)
    turned = Edit(old, (rows, tiny.WIDTH), "BF16", none, 1, old, rows=Rows(0, rows, (1, 0)))
    scaled = replace(turned, rows=None, scale=2.0)
    part = replace(turned, tensor="part", shape=(1, tiny.WIDTH), rows=Rows(0, 1))
    for edits, drop in (([turned], ()), ([scaled], ()), ([part], (old,))):
        kept = keep(base, edits, records_of(llama, ["model.safetensors"]), drop=drop)
        assert dict(kept.edited) == {old: FROM_BASE}


def test_what_is_kept_depends_on_what_was_edited(llama: Path) -> None:
    base = Checkpoint.open(llama)
    name, matrix = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"
    shift = Affine(torch.zeros(tiny.WIDTH, 0), torch.zeros(tiny.WIDTH, 0), torch.ones(tiny.WIDTH))
    edits = [Edit(one, base.tensors[one].shape, "BF16", shift, 0, one) for one in (name, matrix)]
    kept = keep(base, edits, records_of(llama, ["model.safetensors"]))
    assert dict(kept.edited) == {name: KEPT, matrix: FROM_BASE}
    assert set(kept.vectors) == {name}
    assert kept.needs_base


# --- any checkpoint


WIDTH = 8
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def shapes(tied: bool, biased: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        sizes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8)}
        sizes |= {"self_attn.o_proj": (8, 8), "mlp.gate_proj": (6, 8), "mlp.up_proj": (6, 8), "mlp.down_proj": (8, 6)}
        for part, size in sizes.items():
            found[f"{at}.{part}.weight"] = size
            if biased:
                found[f"{at}.{part}.bias"] = size[:1]
        found |= {f"{at}.input_layernorm.weight": (WIDTH,), f"{at}.post_attention_layernorm.weight": (WIDTH,)}
    return found if tied else {**found, "lm_head.weight": (10, WIDTH)}


def raw(draw: st.DrawFn, tensors: dict[str, torch.Tensor], dtype: str) -> bytes:
    """A valid safetensors file in an unusual hand: any order, spaces, padding and metadata."""
    position, table, data = 0, [], b""
    for name in draw(st.permutations(sorted(tensors))):
        data += bytes(as_bytes(tensors[name]))
        entry = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [position, len(data)]}
        table.append((name, entry))
        position = len(data)
    table = draw(st.permutations(table))
    metadata = draw(st.sampled_from([None, {}, {"format": "pt"}, {"format": "pt", "né": "日本"}]))
    if metadata is not None:
        table.insert(draw(st.integers(0, len(table))), ("__metadata__", metadata))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:")]))
    text = json.dumps(dict(table), separators=separators, ensure_ascii=draw(st.booleans())).encode()
    text += b" " * draw(st.sampled_from([0, 1, 7, -len(text) % 8, 100]))
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, bytes]:
    """The files of a small checkpoint, by name."""
    files = {"tokenizer.json": b"{ }"}
    dtype, tied, biased = draw(st.sampled_from(sorted(DTYPES))), draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensors = {
        name: (torch.randn(shape, generator=generator) / 4).to(DTYPES[dtype])
        for name, shape in shapes(tied, biased).items()
    }
    count = draw(st.integers(1, 3))
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    )
    weight_map = {name: names[draw(st.integers(0, count - 1))] for name in tensors}
    for file in sorted(set(weight_map.values())):
        files[file] = raw(draw, {name: tensors[name] for name in tensors if weight_map[name] == file}, dtype)
    if count > 1:
        extra = draw(st.sampled_from([{}, {"metadata": {"total_size": 5, "total_parameters": 7, "by": "x"}}]))
        text = json.dumps({"weight_map": weight_map, **extra}, indent=draw(st.sampled_from([None, 1, 4])))
        files[INDEX] = text.encode()
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 10}
    config |= {"tie_word_embeddings": tied, "intermediate_size": 6, "num_attention_heads": 2}
    config |= {"attention_bias": biased, "mlp_bias": biased, "name": draw(st.text(max_size=3))}
    text = json.dumps(config, indent=draw(st.sampled_from([None, 2, 3])), sort_keys=draw(st.booleans()))
    files["config.json"] = (text + draw(st.sampled_from(["", "\n", " \n\n"]))).encode()
    return files


def wanted(kind: str) -> list[Intervention]:
    vector = Direction(unit(torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)))[0], None)
    return {
        "add": [intervene("add", vector, Site("resid_post", 1), 0.5, "unit")],
        "add at 0": [intervene("add", vector, Site("resid_pre", 0), 0.5, "unit")],
        "ablate": [intervene("ablate", vector, Site("writes", None))],
        "clamp": [intervene("clamp", vector, Site("writes", None), 0.5, "unit")],
        "one matrix": [intervene("ablate", vector, Site("mlp_out", 0), 0.5)],
    }[kind]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(checkpoints(), st.sampled_from(["add", "add at 0", "ablate", "clamp", "one matrix"]))
def test_any_checkpoint_comes_back_byte_for_byte(files: dict[str, bytes], kind: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        base, folder, out = (Path(place) / name for name in ("base", "baked", "out"))
        base.mkdir()
        for name, content in files.items():
            (base / name).write_bytes(content)
        baked(base, folder, wanted(kind))
        assert failed_checks(base, folder) == []
        unbake(folder, out, Checkpoint.open(base) if needs_base(folder) else None)
        assert contents(out) == files
        assert contents(base) == files


# --- the command


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_the_command_says_what_it_will_do_and_does_it(tied_llama: Path, tmp_path: Path) -> None:
    folder = baked(tied_llama, tmp_path / "baked", [add("resid_post.1"), ablate("mlp_out.2")])
    out = tmp_path / "deep" / "out"
    planned = command("unbake", folder, "-o", out, "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    assert {one["name"] for one in json.loads(planned.stdout)} == set(contents(tied_llama))
    assert not out.parent.exists()
    done = command("unbake", folder, "-o", out)
    assert done.exit_code == 0, done.output
    assert "linked to the base's" in done.stdout
    assert "taken as it is" not in done.stderr
    given_back(tied_llama, out)
    again = command("unbake", folder, "-o", out)
    assert again.exit_code == 1
    assert "not empty" in again.stderr
    assert json.loads(command("unbake", folder, "-o", tmp_path / "x", "--json").stdout)["audit"]["passed"] is True


def test_the_output_is_never_inside_a_model(llama: Path, tmp_path: Path) -> None:
    folder = baked(llama, tmp_path / "baked", [add("resid_post.1")])
    for out in (folder, folder / "deep" / "out"):
        with pytest.raises(CheckpointError, match="own folder"):
            unbake(folder, out)
