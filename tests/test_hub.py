"""Models on a hub: read by ranges, baked without their weights; every fault ends well or in one sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from huggingface_hub import constants

from steer_bake import direction, manifest, pipeline
from steer_bake.checkpoint import Checkpoint, RemoteFiles
from steer_bake.errors import CheckpointError
from steer_bake.interventions import intervene
from steer_bake.models import load_model, open_base, open_remote, resolve
from steer_bake.sites import Site

from . import jobs, tiny
from .hub import Fault, LocalHub
from .hub.client import TOKEN, Client, Said

SITE = ("--sites", "resid_post.1")


@pytest.fixture(scope="module")
def hub(llama: Path, tied_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub")
    for name, folder in {
        "one": llama,
        "sharded": tied_llama,
        "cached": llama,
        "private": llama,
        "gated": llama,
    }.items():
        jobs.copy(folder, root / "org" / name)
        (root / "org" / name / "LICENSE").write_text("take it")
        (root / "org" / name / "USE_POLICY.md").write_text("be good")
    tiny.save_llama(root / "org" / "biased", biased=True)
    (root / "org" / "bare").mkdir()
    shutil.copy(llama / "config.json", root / "org" / "bare")
    big(root / "org" / "big")
    with LocalHub(root) as hub:
        hub.tokens["org/private"] = TOKEN
        hub.gated.add("org/gated")
        yield hub


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(autouse=True)
def no_token_leaves_the_hub(hub: LocalHub) -> Iterator[None]:
    hub.forget()
    yield
    assert not [one for one in hub.log if one.host == "cdn" and "authorization" in one.headers]


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return jobs.write_directions(tmp_path / "v.safetensors")


def big(folder: Path) -> None:
    """Four gigabytes of a Llama in two shards: real headers, and holes where the weights would be."""
    folder.mkdir(parents=True)
    d, inner, layers, words = tiny.WIDTH, 64, 22, 1 << 25
    config = {
        "model_type": "llama", "hidden_size": d, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": words, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": [words, d], "model.norm.weight": [d], "lm_head.weight": [words, d]}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{part}_proj.weight": [d, d] for part in "qkvo"}
        shapes |= {f"{start}mlp.{part}_proj.weight": [inner, d] for part in ("gate", "up")}
        shapes |= {f"{start}mlp.down_proj.weight": [d, inner]}
        shapes |= {f"{start}{part}_layernorm.weight": [d] for part in ("input", "post_attention")}
    weight_map = {}
    for number, part in enumerate((sorted(shapes)[::2], sorted(shapes)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        # a long header, as those of many experts are
        table: dict[str, Any] = {"__metadata__": {"format": "pt", "note": "x" * 100_000}}
        end = 0
        for name in part:
            begin, end = end, end + 2 * shapes[name][0] * (shapes[name][1] if len(shapes[name]) > 1 else 1)
            table[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            weight_map[name] = file
        header = json.dumps(table).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 4e9


def fine(said: Said) -> Said:
    assert said.code == 0, said.stderr
    return said


def sentence(said: Said) -> str:
    """The one sentence that the command fails with."""
    assert said.code == 1, said.stdout
    assert said.stdout == ""
    last = said.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in said.stderr
    return last


def files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("steering.json", None)
    return found


# --- plans


def test_a_plan_of_four_gigabytes_reads_less_than_one_megabyte(hub: LocalHub, client: Client, vector: Path) -> None:
    said = fine(client("plan", "org/big", "--vector", vector, *SITE, "--json"))
    assert "model.layers.1.mlp.down_proj.bias" in said.stdout
    assert hub.sent() < 1_000_000
    shards = hub.requests(r"^/[^/]+/[^/]+/[0-9a-f]{64}/.*\.safetensors")
    assert len(shards) == 4, "8 bytes that say how long the header is, and the header, of both shards"
    assert all("range" in one.headers for one in shards)


@pytest.mark.parametrize("name", ["one", "sharded"])
def test_a_plan_by_ranges_is_the_plan_of_the_folder(hub: LocalHub, client: Client, vector: Path, name: str) -> None:
    wish = ("--vector", vector, "--name", "ablate", "--sites", "writes", "--json")
    remote, local = client("plan", f"org/{name}", *wish), client("plan", hub.root / "org" / name, *wish)
    assert fine(remote).stdout == fine(local).stdout
    commit = hub.commit(f"org/{name}")
    assert fine(client("plan", f"org/{name}@{commit}", *wish)).stdout == local.stdout
    assert not hub.requests(r"/tokenizer"), "a plan needs no tokenizer"


def test_explaining_reads_headers_and_where_there_are_none_the_config(hub: LocalHub, client: Client) -> None:
    said = {name: json.loads(fine(client("explain", f"org/{name}", "--json")).stdout) for name in ("one", "bare")}
    assert [found.pop("read") for found in said.values()] == ["headers", "config"]
    assert [found.pop("model") for found in said.values()] == ["org/one", "org/bare"]
    assert said["one"] == said["bare"]
    assert hub.sent() < 100_000
    fine(client("explain", "org/big", "--site", "resid_post.3"))
    assert hub.sent() < 1_000_000
    assert "no model 'org/nothing'" in sentence(client("explain", "org/nothing"))


def test_a_dry_run_downloads_no_weights(hub: LocalHub, client: Client, vector: Path, tmp_path: Path) -> None:
    said = client("bake", "org/big", "--vector", vector, *SITE, "-o", tmp_path / "out", "--dry-run")
    assert "nothing was written" in fine(said).stderr
    assert hub.sent() < 1_000_000
    assert not (tmp_path / "out").exists()


def test_a_refused_bake_downloads_no_weights(hub: LocalHub, client: Client, vector: Path, tmp_path: Path) -> None:
    refused = client("bake", "org/big", "--vector", vector, "--sites", "resid_post.99", "-o", tmp_path / "out")
    assert "layers 0 to 21" in sentence(refused)
    assert hub.sent() < 1_000_000


def test_a_snapshot_in_the_cache_is_used_as_it_is(hub: LocalHub, client: Client, vector: Path, tmp_path: Path) -> None:
    fine(client("bake", "org/cached", "--vector", vector, *SITE, "-o", tmp_path / "out"))
    assert (tmp_path / "out" / "USE_POLICY.md").is_file(), "all that a licence wants passed on was downloaded"
    hub.forget()
    said = fine(client("plan", "org/cached", "--vector", vector, *SITE, "--json"))
    assert not hub.requests("safetensors$")
    hub.faults.append(Fault("/api/models/", status=404, times=9))
    assert fine(client("plan", "org/cached", "--vector", vector, *SITE, "--json")).stdout == said.stdout


@pytest.mark.parametrize("why", ["HF_HUB_OFFLINE", "no network"])
def test_without_the_hub_a_plan_needs_the_whole_model_in_the_cache(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    fine(client("plan", "org/one", "--vector", vector, *SITE))
    fine(client("bake", "org/cached", "--vector", vector, *SITE, "-o", tmp_path / "out"))
    hub.forget()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(client.home / "hub"))
    if why == "no network":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    ref, base = open_base("org/cached", weights=False)
    assert (base.remote, ref.revision) == (None, hub.commit("org/cached"))
    for name in ("org/one", f"org/one@{hub.commit('org/one')}"):  # a plan left its small files in the cache
        with pytest.raises(CheckpointError, match="nor the hub gave it"):
            open_base(name, weights=False)
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        open_remote("org/cached")
    assert not hub.log


# --- bakes


@pytest.mark.parametrize("name", ["one", "sharded"])
def test_a_bake_without_weights_is_the_bake_of_the_folder(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path, name: str
) -> None:
    wish = ("--vector", vector, *SITE)
    fine(client("bake", f"org/{name}", *wish, "-o", tmp_path / "remote", "--no-download"))
    base = Checkpoint.open(hub.root / "org" / name)
    for file in base.files:
        assert hub.sent(file) == base.headers[file].start, "the header, and not one byte behind it"
    fine(client("bake", base.folder, *wish, "-o", tmp_path / "local"))

    here, whole = files(tmp_path / "remote"), files(tmp_path / "local")
    content = json.loads((tmp_path / "remote" / "steering.json").read_text())
    away = {one["name"]: one for one in content["files"] if one["how"] == "remote"}
    assert content["complete"] is False
    assert set(whole) - set(here) == set(away)
    assert len(away) == len(base.files)
    assert {path: whole[path] for path in here} == here, "shard, index, config, tokenizer, licence: the same bytes"
    assert {"LICENSE", "USE_POLICY.md", "tokenizer.json"} <= set(here)
    for path, record in away.items():
        assert record["source"] in base.files
        assert record["size"] == len(whole[path])
        assert record["lfs_sha256"] == hashlib.sha256(whole[path]).hexdigest()
        assert record["header_hash"] == base.header_hash(record["source"])

    for path, record in away.items():  # what a copy on the hub does later
        shutil.copy(base.folder / record["source"], tmp_path / "remote" / path)
    load_model(tmp_path / "remote")
    shutil.copytree(tmp_path / "remote", hub.root / "org" / f"completed-{name}")
    fine(client("plan", f"org/completed-{name}", *wish))
    again = (*wish, "-o", tmp_path / "again", "--stack", "--no-download")
    assert "down_proj.bias" in sentence(client("bake", f"org/completed-{name}", *again)), "it has that bias now"
    assert json.loads((tmp_path / "local" / "steering.json").read_text())["complete"] is True


def test_a_bake_of_four_gigabytes_without_weights_sends_none(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path
) -> None:
    fine(client("bake", "org/big", "--vector", vector, *SITE, "-o", tmp_path / "out", "--no-download", "--json"))
    base = Checkpoint.open(hub.root / "org" / "big")
    for one in hub.requests(r"\.safetensors($|\?)"):  # not the index, which another test may have cached
        if one.sent:
            begin, end = map(int, one.headers["range"].removeprefix("bytes=").split("-"))
            assert end < base.headers[one.file].start, "header bytes and nothing else"
    assert hub.sent() < 2_000_000


def test_a_folder_without_its_shards_does_not_pass_for_a_model(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = fine(client("bake", "org/one", "--vector", vector, *SITE, "-o", out, "--no-download"))
    assert "steering.json lists the files" in said.stderr
    assert "from_pretrained" not in said.stdout
    for attempt in (Checkpoint.open, load_model, lambda folder: resolve(str(folder))):
        with pytest.raises(CheckpointError, match="bake again without --no-download"):
            attempt(out)
    hub.forget()
    for verb in (["validate", out], ["compare", out, "--ask", "?"], ["plan", out, "--vector", vector, *SITE]):
        assert "org/one" in sentence(client(*verb))
    assert not hub.log, "nothing is downloaded for a folder that cannot be used"


def test_edits_that_need_weights_are_refused_before_anything_is_written(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "new" / "out", "--no-download")
    matrix = client("bake", "org/one", "--vector", vector, "--name", "ablate", "--sites", "writes", *out)
    assert "embed_tokens" in sentence(matrix)
    untied = client("bake", "org/sharded", "--vector", vector, "--name", "clamp", "--sites", "resid_pre.0", *out)
    assert "without --no-download" in sentence(untied)
    native = client("bake", "org/biased", "--vector", vector, *SITE, *out)
    assert "down_proj.bias" in sentence(native), "a bias in a shard changes the shard"
    assert "down_proj.bias" in sentence(client("bake", "org/biased", "--vector", vector, *SITE, *out, "--dry-run"))
    here = client("bake", hub.root / "org" / "one", "--vector", vector, *SITE, *out)
    assert "is on this machine" in sentence(here)
    assert not (tmp_path / "new").exists()
    assert hub.sent() < 1_000_000


def test_a_baked_hub_model_is_stacked_on_only_when_asked(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path
) -> None:
    fine(client("bake", hub.root / "org" / "one", "--vector", vector, *SITE, "-o", hub.root / "org" / "baked"))
    wish = ("--vector", vector, "--sites", "attn_out.2", "-o", tmp_path / "out", "--no-download")
    assert "--stack" in sentence(client("bake", "org/baked", *wish))
    fine(client("bake", "org/baked", *wish, "--stack"))
    assert json.loads((tmp_path / "out" / "steering.json").read_text())["stacked_on"]["complete"] is True


# --- faults

HARMLESS = {
    "429 on the listing": Fault("/api/models/", status=429, headers={"Retry-After": "0"}),
    "500 on the listing": Fault("/api/models/", status=500),
    "429 on a header": Fault("safetensors", status=429, headers={"Retry-After": "0"}, host="cdn"),
    "rate limit on a header": Fault("safetensors", status=429, headers={"RateLimit": '"api";r=0;t=0'}),
    "503 on a header": Fault("safetensors", status=503, times=3),
    "reset within a range": Fault("safetensors", reset_after=4, host="cdn"),
    "end within a range": Fault("safetensors", end_after=4, host="cdn"),
    "a range cut short once": Fault("safetensors", short_range=4, host="cdn"),
    "500 on the config": Fault("config.json", status=500),
    "500 on the config's HEAD": Fault("config.json", status=500, method="HEAD"),
    "reset within the config": Fault("config.json", reset_after=20),
    "ranges ignored": Fault("safetensors", ignore_range=True, times=99, host="cdn"),
}
HOPELESS = {
    "HTTP 500; it has trouble of its own": Fault("safetensors", status=500, times=99),
    "HTTP 429; it wants fewer requests": Fault("safetensors", status=429, headers={"Retry-After": "3600"}, times=99),
    "HTTP 403; ask for access": Fault("safetensors", status=403, times=99, host="cdn"),
    "HTTP 404; check the name": Fault("safetensors", status=404, times=99),
    "broke off, or its answer ended early, 5 times": Fault("safetensors", reset_after=4, times=99, host="cdn"),
    "ended early, 5 times": Fault("safetensors", short_range=4, times=99, host="cdn"),
    "the server sent 'bytes 8-": Fault("safetensors", other_range=True, times=99, host="cdn"),
    "/12'": Fault("safetensors", size=12, times=99, host="cdn"),
    "cannot send a part of": Fault("safetensors", size=12, ignore_range=True, times=99, host="cdn"),
    "HTTP 416": Fault("safetensors", status=416, times=99, host="cdn"),
}


@pytest.fixture
def fresh(hub: LocalHub, llama: Path, request: pytest.FixtureRequest) -> str:
    """A repository that no cache knows."""
    name = "fresh-" + hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    jobs.copy(llama, hub.root / "org" / name)
    return f"org/{name}"


@pytest.mark.parametrize("what", HARMLESS)
def test_what_passes_is_waited_for(hub: LocalHub, client: Client, vector: Path, fresh: str, what: str) -> None:
    fault = HARMLESS[what]
    before, fault_was = fault.times, Fault(**vars(fault))
    hub.faults.append(fault_was)
    assert "down_proj.bias" in fine(client("plan", fresh, "--vector", vector, *SITE, "--json")).stdout
    assert fault_was.times < before, "the fault happened"


@pytest.mark.parametrize("because", HOPELESS)
def test_what_does_not_pass_is_a_sentence(
    hub: LocalHub, client: Client, vector: Path, fresh: str, because: str
) -> None:
    hub.faults.append(Fault(**vars(HOPELESS[because])))
    said = sentence(client("plan", fresh, "--vector", vector, *SITE))
    assert because in said
    assert "model.safetensors of org/fresh-" in said


def test_a_server_without_ranges_does_not_make_us_download_everything(
    hub: LocalHub, client: Client, vector: Path
) -> None:
    hub.faults.append(Fault("safetensors", ignore_range=True, times=99, host="cdn"))
    fine(client("plan", "org/big", "--vector", vector, *SITE))
    assert hub.sent() < 32_000_000, "what lies in socket buffers when the connection is closed, of four gigabytes"


def test_a_damaged_header_is_the_same_sentence_as_of_a_file(
    hub: LocalHub, client: Client, vector: Path, fresh: str
) -> None:
    file = hub.root / fresh / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    remote, local = (sentence(client("plan", name, "--vector", vector, *SITE)) for name in (fresh, hub.root / fresh))
    assert remote == local
    assert "is damaged" in remote


def test_a_repository_without_a_shard_or_a_config_is_a_sentence(
    hub: LocalHub, client: Client, vector: Path, fresh: str
) -> None:
    folder = hub.root / fresh
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in sentence(client("plan", fresh, "--vector", vector, *SITE))
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00001.safetensors is missing" in sentence(client("plan", fresh, "--vector", vector, *SITE))
    (folder / "config.json").unlink()
    assert "has no config.json" in sentence(client("plan", fresh, "--vector", vector, *SITE))


def test_a_private_model_is_read_with_the_token_that_stays_on_the_hub(
    hub: LocalHub, client: Client, vector: Path
) -> None:
    fine(client("plan", "org/private", "--vector", vector, *SITE))
    assert {one.headers.get("authorization") for one in hub.log if one.host == "hub"} == {f"Bearer {TOKEN}"}
    assert [one for one in hub.log if one.host == "cdn"], "and there it is checked after every test"
    hub.tokens["org/private"] = "another"
    try:
        assert "logged in" in sentence(client("plan", "org/private@main", "--vector", vector, *SITE))
    finally:
        hub.tokens["org/private"] = TOKEN


def test_a_gated_model_and_one_that_is_not_there_are_sentences(hub: LocalHub, client: Client, vector: Path) -> None:
    assert "logged in" in sentence(client("plan", "org/gated", "--vector", vector, *SITE))
    assert "Check the name" in sentence(client("plan", "org/nothing", "--vector", vector, *SITE))
    assert "revision" in sentence(client("plan", "org/one@v9", "--vector", vector, *SITE))


# --- from Python


@pytest.fixture
def online(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of this process talks to the hub as well; what it read from the environment is set again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("online")
def test_bake_from_python_without_a_download(hub: LocalHub, vector: Path, tmp_path: Path) -> None:
    added = [intervene("add", direction.load(vector)[0], Site("resid_post", 1), 1.0)]
    out = pipeline.bake("org/one", added, tmp_path / "out", download=False)
    with pytest.raises(CheckpointError, match="org/one"):
        manifest.read(out)
    found = manifest.read(out, incomplete=True)
    assert found.base["revision"] == hub.commit("org/one")
    assert found.interventions[0].affine.shift.equal(added[0].affine.shift)
    ablated = [intervene("ablate", direction.load(vector)[0], Site("writes"), 1.0)]
    with pytest.raises(CheckpointError, match="needs the weights in"):
        pipeline.bake("org/one", ablated, tmp_path / "new" / "out", download=False)
    assert not (tmp_path / "new").exists()
    header = Checkpoint.open(hub.root / "org" / "one").headers["model.safetensors"]
    assert hub.sent("model.safetensors") == 2 * header.start, "read twice; the weights never"
    whole = pipeline.bake("org/one", ablated, tmp_path / "whole")
    load_model(whole)


@pytest.mark.usefixtures("online")
def test_a_small_tensor_is_fetched_by_itself_and_a_matrix_is_not(hub: LocalHub) -> None:
    for name, tensor in (("biased", "model.layers.2.mlp.down_proj.bias"), ("big", "model.norm.weight")):
        base = Checkpoint.open(hub.root / "org" / name)
        sizes = {path.name: path.stat().st_size for path in base.folder.iterdir()}
        remote = Checkpoint.open(base.folder, RemoteFiles(f"org/{name}", hub.commit(f"org/{name}"), sizes, {}))
        assert remote.headers == base.headers
        hub.forget()
        assert (remote.read(tensor) == base.read(tensor)).all()
        assert hub.sent() == 2 * tiny.WIDTH
    with pytest.raises(CheckpointError, match="hf download org/big"):
        remote.read("model.embed_tokens.weight")
    hub.faults.append(Fault("safetensors", ignore_range=True, times=99, host="cdn"))
    with pytest.raises(CheckpointError, match="cannot send a part of"):
        remote.read("model.norm.weight")
    assert hub.sent() < 32_000_000


def test_the_hub_of_the_tests_runs_by_itself(hub: LocalHub) -> None:
    command = [sys.executable, "-m", "tests.hub", "--root", str(hub.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0].removeprefix("HF_ENDPOINT=")
        with urlopen(f"{url}/api/models/org/one") as answer:
            assert json.load(answer)["sha"] == hub.commit("org/one")
        process.terminate()
