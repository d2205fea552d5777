from __future__ import annotations

import os

# A stray call to the hub would hang on a machine without network; nothing here needs it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A test worker inherits the width of somebody's terminal; the tests read tables of the ordinary width.
os.environ.pop("COLUMNS", None)

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steer_bake import validate
from steer_bake.baked import audit_against

from . import tiny
from .plain_worker import PlainWorker
from .test_bake import COMBINED, CONSTANT, baked

START_WORKER = validate.start_worker

# The suite runs several workers on few cores; more threads than cores only get in each other's way.
torch.set_num_threads(int(os.environ.get("STEER_BAKE_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied bfloat16 tiny Llama in one file. Read-only: copy it before changing it."""
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied bfloat16 tiny Llama in several shards. Read-only."""
    return tiny.save_llama(tmp_path_factory.mktemp("tied_llama"), tied=True, shard_size="20KB")


@pytest.fixture(scope="session")
def good(llama: Path, tied_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two bakes: ``constant`` of ``llama``, ``combined`` of ``tied_llama``. Read-only."""
    folder = tmp_path_factory.mktemp("good")
    return {
        "constant": baked(llama, folder / "constant", CONSTANT),
        "combined": baked(tied_llama, folder / "combined", COMBINED),
    }


@pytest.fixture(scope="session", autouse=True)
def certificates_import_transformers_once() -> Iterator[None]:
    """They are what most of the suite's time went into. See ``a_fresh_process`` for tests of the process itself."""
    with PlainWorker() as worker, pytest.MonkeyPatch.context() as patch:
        patch.setattr(validate, "start_worker", worker.start)
        yield


@pytest.fixture
def a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A certificate of this test is made as users have it: by a process that has imported nothing before."""
    monkeypatch.setattr(validate, "start_worker", START_WORKER)


@pytest.fixture(autouse=True)
def every_bake_passes_its_audit(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test bakes into its own folder is audited when it is over, unless it damaged that on purpose."""
    if "tmp_path" not in request.fixturenames or request.node.get_closest_marker("tampered"):
        yield
        return
    folder: Path = request.getfixturevalue("tmp_path")
    if "monkeypatch" in request.fixturenames:
        request.getfixturevalue("monkeypatch")  # so that its patches are still there below
    yield
    for found in sorted(folder.rglob("steering.json")):
        hidden = any(part.startswith(".") for part in found.relative_to(folder).parts)
        if not hidden and b'"complete": false' not in found.read_bytes():  # its weights are still on a hub
            audit_against(found.parent, _base(request, found), hash_files=True).require()


def _base(request: pytest.FixtureRequest, found: Path) -> str | None:
    """The folder that a test's own hub serves the base from; None where steering.json leads to the base."""
    hub_id = json.loads(found.read_text())["base"]["hub_id"]
    return str(request.getfixturevalue("hub").root / hub_id) if hub_id and "hub" in request.fixturenames else None
