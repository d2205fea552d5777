"""An adapter names hub id and commit of its base, and only where the bytes are proven to be those of that commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from steer_bake.checkpoint import Checkpoint

from . import jobs
from .hub import LocalHub
from .hub.client import Client
from .test_hub import fine, sentence

ABLATE = ("--sites", "writers", "--name", "ablate", "--target", "lora")


@pytest.fixture(scope="module")
def hub(llama: Path, tied_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub")
    for name, folder in {"one": llama, "sharded": tied_llama, "changed": llama, "left": llama}.items():
        jobs.copy(folder, root / "org" / name)
        (root / "org" / name / "LICENSE").write_text("take it")
    with LocalHub(root) as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return jobs.write_directions(tmp_path / "v.safetensors")


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("name", ["one", "sharded"])
def test_the_base_is_named_by_id_and_commit(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path, name: str
) -> None:
    fine(client("bake", f"org/{name}", "--vector", vector, *ABLATE, "-o", tmp_path / "out"))
    found = config(tmp_path / "out")
    assert (found["base_model_name_or_path"], found["revision"]) == (f"org/{name}", hub.commit(f"org/{name}"))
    assert (tmp_path / "out" / "LICENSE").read_text() == "take it"
    fine(client("audit", tmp_path / "out", "--hash"))


def test_a_folder_is_named_by_its_path(client: Client, llama: Path, vector: Path, tmp_path: Path) -> None:
    fine(client("bake", llama, "--vector", vector, *ABLATE, "-o", tmp_path / "out"))
    found = config(tmp_path / "out")
    assert (found["base_model_name_or_path"], found["revision"]) == (str(llama.resolve()), None)


def test_bytes_that_are_not_those_of_the_commit_are_refused(
    hub: LocalHub, client: Client, vector: Path, tmp_path: Path
) -> None:
    fine(client("bake", "org/changed", "--vector", vector, *ABLATE, "-o", tmp_path / "out"))
    [weights] = (client.home / "hub" / "models--org--changed").glob("snapshots/*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the size is the same, and nothing else is checked on the way down
    weights.resolve().write_bytes(content)
    said = client("bake", "org/changed", "--vector", vector, *ABLATE, "-o", tmp_path / "again")
    assert "is not the file of the commit" in sentence(said)
    assert not (tmp_path / "again").exists()


def test_an_adapter_of_biases_needs_no_weights(hub: LocalHub, client: Client, vector: Path, tmp_path: Path) -> None:
    hub.forget()
    wish = ("--vector", vector, "--sites", "resid_post.1", "--target", "lora", "--no-download")
    fine(client("bake", "org/left", *wish, "-o", tmp_path / "out"))
    header = Checkpoint.open(hub.root / "org" / "left").headers["model.safetensors"]
    assert hub.sent("model.safetensors") == header.start, "no weight"
    found = config(tmp_path / "out")
    assert (found["revision"], found["lora_bias"]) == (hub.commit("org/left"), True)
    assert json.loads((tmp_path / "out" / "steering.json").read_text())["complete"] is True
