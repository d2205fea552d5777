"""The audit passes on what was baked, wherever its bytes lie, and names what somebody changed afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from steer_bake import manifest
from steer_bake.affine import compose
from steer_bake.audit import Audit, audit
from steer_bake.baked import audit_against
from steer_bake.checkpoint import Checkpoint
from steer_bake.cli import main
from steer_bake.contents import PIECE, same_file
from steer_bake.errors import CheckpointError, ValidationFailed
from steer_bake.interventions.clamp import clamp as clamp_map

from . import jobs, tiny
from .test_bake import CASES, COMBINED, CONSTANT, add, baked

BIAS = "model.layers.1.mlp.down_proj.bias"
QUERY, QUERY_1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
MATRIX, NORM = "model.layers.2.mlp.down_proj.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"


def failed(found: Audit) -> dict[str, str]:
    return {check.name: check.detail for check in found.checks if not check.passed}


def detail(found: Audit, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


# --- tampering: every one of these must fail, by the name of a check and with words that say where


def unlinked(path: Path) -> Path:
    """The same file as its own inode, so that the base stays what it is."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return path


def flip(folder: Path, name: str, bit: int = 1) -> None:
    """Flip the lowest bit, or another, of the first element of a tensor."""
    info = Checkpoint.open(folder).tensors[name]
    with open(unlinked(folder / info.file), "r+b") as file:
        file.seek(info.start)
        old = file.read(1)[0]
        file.seek(info.start)
        file.write(bytes([old ^ bit]))


def change(folder: Path, holding: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the file that holds a tensor, and bring the index up to date."""
    path = folder / Checkpoint.open(folder).tensors[holding].file
    tensors = load_file(path)
    edit(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    content = json.loads((folder / INDEX).read_text())
    others = {name: file for name, file in content["weight_map"].items() if file != path.name}
    content["weight_map"] = {**others, **dict.fromkeys(tensors, path.name)}
    (folder / INDEX).write_text(json.dumps(content))


def swap(tensors: dict[str, torch.Tensor], one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def header(folder: Path, name: str, edit: Callable[[dict[str, Any]], object], padding: int = 0) -> None:
    """Change the JSON header of the file that holds a tensor; the bytes of the tensors stay."""
    path = unlinked(folder / Checkpoint.open(folder).tensors[name].file)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    content = json.loads(raw[8 : 8 + length])
    edit(content)
    text = json.dumps(content).encode() + b" " * padding
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def in_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content, indent=2) + "\n")


def told(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    in_json(folder / "steering.json", edit)


def record_again(folder: Path) -> None:
    """What a careful forger does: sizes, hashes and the plan's own hash in steering.json fit again."""

    def update(content: dict[str, Any]) -> None:
        for record in content["files"]:
            path = folder / record["name"]
            record["size"] = path.stat().st_size
            record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            if record["header_hash"]:
                record["header_hash"] = Checkpoint.open(folder).header_hash(record["name"])
        content["plan_sha256"] = hashlib.sha256(json.dumps(content["plan"], sort_keys=True).encode()).hexdigest()

    told(folder, update)


def baked_twice(folder: Path, _base: Path) -> None:
    """The same plan once more over the output, under the first one's manifest."""
    again = baked(folder, folder.with_name("again"), CONSTANT, stack=True)
    for path in again.glob("*.safetensors"):
        if path.name != "steering.safetensors":
            shutil.copy(path, unlinked(folder / path.name))
    shutil.rmtree(again)
    record_again(folder)


def stacked_and_hidden(folder: Path, base: Path) -> None:
    """Two bakes, of which the manifest admits the last; its base is said to be the original."""
    again = baked(folder, folder.with_name("again"), [add("resid_post.3", 1.0, 8)], stack=True)
    told(again, lambda content: content.update(stacked_on=None))
    told(again, lambda content: content["base"].update(folder=str(base), name=str(base)))
    shutil.rmtree(folder)
    again.rename(folder)


def manifest_of_another_bake(folder: Path, base: Path) -> None:
    other = baked(base, folder.with_name("other"), [add("resid_post.1", 3.5)])
    for name in ("steering.json", "steering.safetensors"):
        shutil.copy(other / name, folder / name)
    shutil.rmtree(other)


def vector_exchanged(folder: Path, _base: Path) -> None:
    path = folder / "steering.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "0.shift": -tensors["0.shift"]}, path)


def one_file_beside_the_index(folder: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", folder)


def shard_dropped(folder: Path, _base: Path) -> None:
    (folder / Checkpoint.open(folder).tensors[BIAS].file).unlink()


def tokenizer_changed_and_recorded(folder: Path, _base: Path) -> None:
    in_json(folder / "tokenizer.json", lambda content: content["added_tokens"].pop())
    record_again(folder)


def plan_says_less(folder: Path, _base: Path) -> None:
    told(folder, lambda content: content["plan"]["edits"].pop())
    record_again(folder)


def set_key(name: str, key: str, value: object) -> Callable[[Path, Path], None]:
    return lambda folder, _base: in_json(folder / name, lambda content: content.__setitem__(key, value))


def put(name: str, text: str) -> Callable[[Path, Path], None]:
    def write(folder: Path, _base: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def recorded_after(tamper: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    def both(folder: Path, base: Path) -> None:
        tamper(folder, base)
        record_again(folder)

    return both


def adapter_with_a_record(folder: Path, _base: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    record = {"name": "adapter_config.json", "size": 2, "how": "copied", "sha256": digest}
    told(folder, lambda content: content["files"].append({**record, "header_hash": None, "lfs_sha256": None}))


def kept_config_changed(folder: Path, _base: Path) -> None:
    """The text that unbake would write: the manifest's hash of the file fits again."""
    path = folder / "steering.safetensors"
    packed = torch.frombuffer(bytearray(zlib.compress(b'{"model_type": "llama"}')), dtype=torch.uint8)
    save_file({**load_file(path), "undo.config.json": packed}, path)
    told(folder, lambda content: content.update(vectors_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


#: what is done: (which folder, how, the check that must fail, words of its detail)
TAMPERINGS: dict[str, tuple[str, Callable[[Path, Path], object], str, str]] = {
    "a bit of an untouched tensor": ("constant", lambda f, b: flip(f, QUERY), "untouched tensors", QUERY),
    "a bit of an untouched tensor, recorded": (
        "constant",
        recorded_after(lambda f, b: flip(f, QUERY)),
        "untouched tensors",
        QUERY,
    ),
    "the lowest bit of a new bias": ("constant", lambda f, b: flip(f, BIAS), "tensors", BIAS),
    "the lowest bit of an edited matrix": ("combined", lambda f, b: flip(f, MATRIX), "tensors", MATRIX),
    "two tensors swapped": (
        "constant",
        lambda f, b: change(f, QUERY, lambda tensors: swap(tensors, QUERY, QUERY_1)),
        "untouched tensors",
        QUERY,
    ),
    "an untouched tensor as F16": (
        "constant",
        lambda f, b: change(f, NORM, lambda tensors: tensors.update({NORM: tensors[NORM].half()})),
        "untouched tensors",
        "F16",
    ),
    "an edited tensor as F32": (
        "combined",
        lambda f, b: change(f, MATRIX, lambda tensors: tensors.update({MATRIX: tensors[MATRIX].float()})),
        "tensors",
        f"{MATRIX} is stored as F32",
    ),
    "a tensor dropped": ("constant", lambda f, b: change(f, NORM, lambda t: t.pop(NORM)), "untouched tensors", NORM),
    "a bias dropped": ("constant", lambda f, b: change(f, BIAS, lambda t: t.pop(BIAS)), "tensors", "is missing"),
    "a tensor added": (
        "constant",
        recorded_after(lambda f, b: change(f, BIAS, lambda t: t.update({"model.extra": torch.ones(2)}))),
        "untouched tensors",
        "model.extra is in neither",
    ),
    "a shard dropped": ("constant", shard_dropped, "files", "is missing"),
    "the coefficient in steering.json": (
        "constant",
        lambda f, b: told(f, lambda content: content["plan"]["interventions"][0].update(amount=2.0)),
        "manifest",
        "does not have the recorded hash",
    ),
    "the coefficient in steering.json, recorded": (
        "constant",
        recorded_after(lambda f, b: told(f, lambda content: content["plan"]["decisions"][0].update(write="mlp.0"))),
        "manifest",
        "decisions",
    ),
    "an edit taken out of steering.json": ("constant", plan_says_less, "manifest", "plan.edits"),
    "the vector's hash in steering.json": (
        "constant",
        lambda f, b: told(f, lambda content: content["plan"]["interventions"][0].update(sha256="0" * 64)),
        "manifest",
        "do not belong together",
    ),
    "the vector itself": ("constant", vector_exchanged, "manifest", "do not belong together"),
    "steering.json of another bake": ("constant", manifest_of_another_bake, "tensors", "it carries 0.857"),
    "baked twice": ("constant", baked_twice, "tensors", "it carries 2 of the planned change"),
    "a stacked bake that is hidden": ("constant", stacked_and_hidden, "base", "recorded are"),
    "another hash of the base": (
        "constant",
        lambda f, b: told(f, lambda content: content["base_files"][0].update(header_hash="0" * 64)),
        "base",
        "the header of model.safetensors",
    ),
    "a config key changed": ("constant", set_key("config.json", "rope_theta", 5.0), "config", "rope_theta=5.0"),
    "a config flag as a number": ("constant", set_key("config.json", "mlp_bias", 1), "config", "mlp_bias=1"),
    "a config key added": (
        "constant",
        recorded_after(set_key("config.json", "auto_map", {"AutoModel": "evil.Model"})),
        "config",
        "auto_map",
    ),
    "the tokenizer": ("constant", tokenizer_changed_and_recorded, "files", "tokenizer.json is not the base's"),
    "the chat template": ("constant", put("chat_template.jinja", "{{ 'Obey.' }}"), "files", "chat_template.jinja"),
    "generation_config.json": ("constant", set_key("generation_config.json", "temperature", 9.0), "files", "not the"),
    "the tokenizer's config gone": (
        "constant",
        lambda f, b: (f / "tokenizer_config.json").unlink(),
        "files",
        "tokenizer_config.json is missing",
    ),
    "an adapter": ("constant", put("adapter_config.json", "{}"), "other files", "adapter_config.json"),
    "an adapter with a record": ("constant", adapter_with_a_record, "files", "no bake of this base writes it"),
    "the config that unbake would write": ("constant", kept_config_changed, "base", "config.json that is kept"),
    "the new shard's metadata": (
        "constant",
        recorded_after(lambda f, b: header(f, BIAS, lambda content: content.update(__metadata__={"format": "np"}))),
        "headers",
        "not that of a bake",
    ),
    "one file beside the index": ("constant", one_file_beside_the_index, "other files", "model.safetensors"),
    "another shard": ("constant", put("zz.safetensors", ""), "other files", "zz.safetensors"),
    "a pickle": ("constant", put("pytorch_model.bin", ""), "other files", "pytorch_model.bin"),
    "code": ("constant", put("modeling_evil.py", ""), "other files", "modeling_evil.py"),
    "code in a folder": ("constant", put("custom_generate/generate.py", ""), "other files", "generate.py"),
    "a second template": ("constant", put("additional_chat_templates/x.jinja", "x"), "other files", "x.jinja"),
    "an index entry redirected": (
        "constant",
        lambda f, b: in_json(f / INDEX, lambda c: c["weight_map"].update({BIAS: c["weight_map"][QUERY]})),
        "weights",
        BIAS,
    ),
    "an index entry gone": (
        "constant",
        recorded_after(lambda f, b: in_json(f / INDEX, lambda c: c["weight_map"].pop(BIAS))),
        "headers",
        BIAS,
    ),
    "the index's metadata": (
        "constant",
        recorded_after(lambda f, b: in_json(f / INDEX, lambda c: c["metadata"].update(total_size=1))),
        "headers",
        "says 1 bytes",
    ),
    "a header's metadata": (
        "constant",
        recorded_after(lambda f, b: header(f, QUERY, lambda content: content.update(__metadata__={"format": "tf"}))),
        "headers",
        '{"format": "tf"}',
    ),
    "a header's padding": (
        "combined",
        lambda f, b: header(f, MATRIX, lambda content: None, padding=8),
        "headers",
        "is not the recorded one",
    ),
}


@pytest.mark.tampered
@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_what_was_changed_after_the_bake_fails_by_name(
    good: dict[str, Path], llama: Path, tied_llama: Path, tmp_path: Path, tampering: str
) -> None:
    kind, tamper, check, words = TAMPERINGS[tampering]
    base = llama if kind == "constant" else tied_llama
    folder = shutil.copytree(good[kind], tmp_path / "tampered", copy_function=os.link)
    for name in ("config.json", "steering.json", "tokenizer.json", INDEX, "steering.safetensors"):
        unlinked(folder / name)
    for name in ("generation_config.json", "chat_template.jinja"):
        unlinked(folder / name)
    assert audit(folder, Checkpoint.open(base)).passed
    tamper(folder, base)
    found = audit(folder, Checkpoint.open(base))
    assert not found.passed
    assert words in failed(found)[check], failed(found)
    with pytest.raises(ValidationFailed, match=f"{check}: "):
        found.require()
    assert audit(good[kind], Checkpoint.open(base)).passed  # nothing was written through a link


@pytest.mark.tampered
@pytest.mark.parametrize("which", ["mlp.gate_proj.weight", "mlp.down_proj.weight"], ids=["untouched", "edited"])
def test_any_flipped_byte_of_any_tensor_of_a_layer_is_found(tied_llama: Path, tmp_path: Path, which: str) -> None:
    base, out = Checkpoint.open(tied_llama), baked(tied_llama, tmp_path / "out", COMBINED)
    info = Checkpoint.open(out).tensors[f"model.layers.1.{which}"]
    path = unlinked(out / info.file)
    data = path.read_bytes()
    for at in (info.start, info.start + info.nbytes // 2, info.end - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
        assert info.name in " ".join(failed(audit(out, base)).values())
    path.write_bytes(data)
    assert audit(out, base).passed


# --- what passes


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_bake_passes_at_any_number_of_threads(
    llama: Path, tied_llama: Path, tmp_path: Path, case: str, threads: int
) -> None:
    before = torch.get_num_threads()
    for base in (llama, tied_llama):
        out = baked(base, tmp_path / base.name, CASES[case])
        torch.set_num_threads(threads)
        try:
            found = audit(out, Checkpoint.open(base), hash_files=True)
        finally:
            torch.set_num_threads(before)
        assert failed(found) == {}
        assert "bit for bit" in detail(found, "tensors")
        json.dumps(found.as_json())


def test_a_plan_has_the_same_hash_at_any_number_of_threads() -> None:
    """Also where vectors are long enough for a matrix product to be cut into pieces."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for amount in (1.0, 0.5, 0.25):
        r = torch.randn(20_000, generator=generator)
        maps.append(clamp_map(r / r.norm(), amount))
    found, before = [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(compose(maps, 20_000))
        torch.set_num_threads(before)
    assert torch.equal(found[0].right, found[1].right)
    assert torch.equal(found[0].shift, found[1].shift)


def copied(source: Path, target: Path) -> str | None:
    return None


def reflinked(source: Path, target: Path) -> str | None:
    """As a file system that shares blocks does it: the same bytes in another inode, and no hash is recorded."""
    shutil.copyfile(source, target)
    return "reflinked"


@pytest.mark.parametrize("how", [copied, reflinked])
def test_a_base_on_another_disk_passes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[Path, Path], str | None]
) -> None:
    monkeypatch.setattr("steer_bake.checkpoint.writing.place", how)
    out = baked(llama, tmp_path / "out", CONSTANT)
    record = next(one for one in manifest.read(out).files if one.name == "model-00001-of-00002.safetensors")
    assert (record.how, record.sha256 is None) == (how.__name__, how is reflinked)
    found = audit(out, Checkpoint.open(llama), hash_files=True)
    assert failed(found) == {}
    assert "Not provable" not in detail(found, "hashes")
    assert "the same file" not in detail(found, "untouched tensors")


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system here")
def test_a_bake_across_devices_passes(llama: Path, tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm") / f"steer-bake-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("one file system")
    try:
        out = baked(llama, elsewhere / "out", CONSTANT)
        assert not (out / "model-00001-of-00002.safetensors").samefile(llama / "model.safetensors")
        assert failed(audit(out, Checkpoint.open(llama), hash_files=True)) == {}
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)


def hub_cache(model: Path, place: Path) -> Path:
    """``model`` as the hub's cache holds it: links into a folder of blobs named by their sha256."""
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (place / "blobs").mkdir()
    for path in model.iterdir():
        blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.tampered
def test_a_hub_cache_passes_and_a_damaged_blob_is_found(tied_llama: Path, tmp_path: Path) -> None:
    base = hub_cache(tied_llama, tmp_path / "models--org--name")
    out = baked(base, tmp_path / "out", CONSTANT)
    found = audit(out, Checkpoint.open(base), hash_files=True)
    assert failed(found) == {}
    assert f"hub ids of {len(Checkpoint.open(base).files)}" in detail(found, "base")
    info = Checkpoint.open(out).tensors[QUERY]
    blob = (base / Checkpoint.open(base).tensors[QUERY].file).resolve()
    data = bytearray(blob.read_bytes())
    data[Checkpoint.open(base).tensors[QUERY].start] ^= 1
    blob.write_bytes(data)
    assert QUERY in failed(audit(out, Checkpoint.open(base)))["untouched tensors"]
    # The same flip in the baked file: both agree now, and only the recorded hash knows better.
    flip(out, QUERY)
    assert failed(audit(out, Checkpoint.open(base))) == {}
    assert info.file in failed(audit(out, Checkpoint.open(base), hash_files=True))["hashes"]


@pytest.mark.tampered
def test_what_a_hard_link_cannot_prove_is_said(llama: Path, tmp_path: Path) -> None:
    base = jobs.copy(llama, tmp_path / "base")
    out = baked(base, tmp_path / "out", CONSTANT)
    info = Checkpoint.open(base).tensors[QUERY]
    with open(base / "model.safetensors", "r+b") as file:  # through the link: both change
        file.seek(info.start)
        file.write(b"\x00\x01")
    found = audit(out, Checkpoint.open(base), hash_files=True)
    assert found.passed
    assert "is the same file as the base's: what was changed through" in detail(found, "untouched tensors")
    assert "Not provable: model-00001-of-00002.safetensors" in detail(found, "hashes")


def test_what_loads_nothing_is_only_listed(llama: Path, tmp_path: Path) -> None:
    out = baked(llama, tmp_path / "out", CONSTANT)
    for name in ("README.md", ".gitattributes", "figures/loss.png", ".cache/huggingface/x.lock", "LICENSE"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    found = audit(out, Checkpoint.open(llama))
    assert failed(found) == {}
    assert "README.md" in detail(found, "other files")


def test_the_text_of_the_recipe_may_be_brought_up_to_date(llama: Path, tmp_path: Path) -> None:
    out = baked(llama, tmp_path / "out", CONSTANT)
    manifest.set_recipe(out, "model: another\n")
    assert failed(audit(out, Checkpoint.open(llama), hash_files=True)) == {}


def test_a_stacked_bake_passes_against_its_own_base_and_says_so(llama: Path, tmp_path: Path) -> None:
    once = baked(llama, tmp_path / "once", CONSTANT)
    twice = baked(once, tmp_path / "twice", [add("resid_post.1")], stack=True)
    manifest.set_recipe(once, "model: brought up to date\n")
    found = audit(twice, Checkpoint.open(once))
    assert failed(found) == {}
    assert f"baked before: audit {once} too" in detail(found, "base")
    assert {"base", "config"} & set(failed(audit(twice, Checkpoint.open(llama))))


@pytest.mark.tampered
def test_one_unit_in_the_last_place_passes_only_where_another_machine_computed_it(
    tied_llama: Path, tmp_path: Path
) -> None:
    base, out = Checkpoint.open(tied_llama), baked(tied_llama, tmp_path / "out", COMBINED)
    flip(out, MATRIX)
    assert MATRIX in failed(audit(out, base))["tensors"]
    told(out, lambda content: content["computed_on"].update(machine="riscv64"))
    found = audit(out, base)
    assert failed(found) == {}
    assert "1 of them within one unit in the last place" in detail(found, "tensors")
    assert "riscv64" in detail(found, "tensors")
    assert found.computed_elsewhere is not None
    flip(out, MATRIX)
    flip(out, MATRIX, bit=4)  # four units
    assert MATRIX in failed(audit(out, base))["tensors"]


def test_another_kind_of_base_is_refused_by_name(llama: Path, tied_llama: Path, tmp_path: Path) -> None:
    out = baked(llama, tmp_path / "out", CONSTANT)
    assert "base" in failed(audit(out, Checkpoint.open(tied_llama)))
    other = tiny.save_llama(tmp_path / "seed", seed=9)
    assert "untouched tensors" in failed(audit(out, Checkpoint.open(other)))
    with pytest.raises(CheckpointError, match="is the base itself"):
        audit(out, Checkpoint.open(out))
    with pytest.raises(CheckpointError, match=r"no steering\.json"):
        audit(llama, Checkpoint.open(llama))


@pytest.mark.tampered
def test_a_base_that_is_gone_is_a_sentence(llama: Path, tmp_path: Path) -> None:
    base = jobs.copy(llama, tmp_path / "base")
    out = baked(base, tmp_path / "out", CONSTANT)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="--base"):
        audit_against(out, None)
    assert failed(audit_against(out, str(llama))) == {}


def test_files_are_compared_in_pieces(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "other"]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(10 * PIECE)
    tracemalloc.start()
    assert same_file(*paths)
    assert tracemalloc.get_traced_memory()[1] < 3 * PIECE
    tracemalloc.stop()
    with open(paths[1], "r+b") as file:
        file.seek(9 * PIECE + 5)
        file.write(b"x")
    assert not same_file(*paths)


# --- the command


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.mark.tampered
def test_the_command_prints_every_check_and_fails_by_name(good: dict[str, Path], tmp_path: Path) -> None:
    passed = command("audit", good["constant"], "--hash")
    assert passed.exit_code == 0, passed.output
    for name in ("manifest", "base", "files", "other files", "headers", "config", "tensors", "hashes"):
        assert name in passed.stdout
    assert json.loads(command("audit", good["combined"], "--json").stdout)["passed"] is True
    folder = shutil.copytree(good["constant"], tmp_path / "tampered")
    flip(folder, BIAS)
    put("adapter_config.json", "{}")(folder, folder)
    result = command("audit", folder)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "tensors: " in last
    assert "other files: adapter_config.json" in last
    assert json.loads(command("audit", folder, "--json").stdout)["passed"] is False


def test_progress_ends_at_its_total(good: dict[str, Path], tied_llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    audit(good["combined"], Checkpoint.open(tied_llama), hash_files=True, progress=lambda *one: seen.append(one))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
