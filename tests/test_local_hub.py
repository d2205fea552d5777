"""The hub of the tests speaks to the real client as the hub does: every claim here is about that client, unpatched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .hub import LocalHub, User
from .hub.client import TOKEN, environment

READ_TOKEN = "hf_" + "rEaDoNlY12" * 3
LEGS = ("lfs", "parts", "xet")

#: A process that runs one piece of Python after the other: the client reads its environment once.
RUNNER = """
import json, sys, traceback
import huggingface_hub as hf
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
known = {"hf": hf, "api": hf.HfApi()}
for line in sys.stdin:
    try:
        said = eval(compile(json.loads(line), "asked", "eval"), known)
        said = said if isinstance(said, (dict, list, int, bool, type(None))) else str(said)
    except Exception as error:
        said = {"error": type(error).__name__, "status": getattr(getattr(error, "response", None), "status_code", None)}
    print(json.dumps(said), flush=True)
"""

Ask = Callable[[str], Any]


@pytest.fixture(scope="module", params=LEGS)
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub"), xet=request.param == "xet") as hub:
        hub.users |= {TOKEN: User("me", orgs=("org",)), READ_TOKEN: User("me", "read", ("org",))}
        hub.part_size = 100_000 if request.param == "parts" else None
        yield hub


@pytest.fixture(scope="module")
def ask(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(hub.url, home, TOKEN, xet=hub.xet is not None),
    ) as process:  # fmt: skip

        def ask(code: str) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(code) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()  # type: ignore[union-attr]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is uploaded: a card, a small file, one that goes up as a large file, one in a folder."""
    (tmp_path / "up" / "sub").mkdir(parents=True)
    (tmp_path / "up" / "README.md").write_text("---\nlicense: mit\nbase_model: org/base\n---\n# Me\n")
    (tmp_path / "up" / "config.json").write_text('{"a": 1}')
    (tmp_path / "up" / "model.safetensors").write_bytes(bytes(range(256)) * 1200)
    (tmp_path / "up" / "sub" / "note.txt").write_text("hello")
    return tmp_path / "up"


def contents(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".")}


def test_what_goes_up_comes_down(hub: LocalHub, ask: Ask, folder: Path, tmp_path: Path) -> None:
    assert ask("api.whoami()")["name"] == "me"
    assert ask("api.create_repo('org/round', private=True)") == f"{hub.url}/org/round"
    assert ask("api.create_repo('org/round', exist_ok=True)") == f"{hub.url}/org/round"
    assert ask("api.create_repo('org/round')")["status"] == 409
    up = f"api.upload_folder(repo_id='org/round', folder_path={str(folder)!r}, commit_message='first').oid"
    first = ask(up)
    assert first == hub.commit("org/round")
    assert ask(f"hf.snapshot_download('org/round', local_dir={str(tmp_path / 'down')!r})")
    assert contents(tmp_path / "down") == contents(folder)
    assert ask(f"api.verify_repo_checksums('org/round', local_dir={str(tmp_path / 'down')!r}).mismatches") == []

    hub.forget()
    (folder / "config.json").write_text('{"a": 2}')
    second = ask(up)
    assert second != first
    assert hub.received("cdn") == 0, "the large file is there"
    assert ask(up) == second, "nothing has changed: no commit"
    assert [one.title for one in hub.commits("org/round")] == ["first", "first"]
    assert ask(f"open(hf.hf_hub_download('org/round', 'config.json', revision={first!r})).read()") == '{"a": 1}'
    assert ask("open(hf.hf_hub_download('org/round', 'config.json')).read()") == '{"a": 2}'
    assert ask("api.model_info('org/round').private") is True
    assert ask("api.model_info('org/round').card_data.license") == "mit"
    assert ask("[one.path for one in api.list_repo_tree('org/round', 'sub')]") == ["sub/note.txt"]


def test_branches_pull_requests_and_deletions(hub: LocalHub, ask: Ask, folder: Path) -> None:
    ask("api.create_repo('org/pulled')")
    base = hub.commit("org/pulled")
    up = f"api.upload_folder(repo_id='org/pulled', folder_path={str(folder)!r}, commit_message='m', %s)"
    ask("api.create_branch('org/pulled', branch='a/b')")
    assert ask("api.create_branch('org/pulled', branch='a/b')")["status"] == 409
    ask(up % "revision='a/b'")
    assert hub.commit("org/pulled") == base, "main is as it was"
    assert "config.json" in (hub.repo("org/pulled", "a/b") or {})
    assert "discussions/1" in str(ask(f"({up % 'create_pr=True'}).pr_url"))
    assert ask("[one.num for one in api.get_repo_discussions('org/pulled', author='me')]") == [1]
    assert "config.json" in (hub.repo("org/pulled", "refs/pr/1") or {})
    gone = "api.create_commit('org/pulled', [hf.CommitOperationDelete('config.json')], commit_message='m', %s).oid"
    assert ask(gone % "revision='a/b'") == hub.commit("org/pulled", "a/b")
    assert "config.json" not in (hub.repo("org/pulled", "a/b") or {})
    assert ask(gone % f"revision='a/b', parent_commit={base!r}")["status"] == 412
    assert ask("sorted(one.name for one in api.list_repo_refs('org/pulled').branches)") == ["a/b", "main"]


def test_large_files_are_copied_between_repositories(hub: LocalHub, ask: Ask, folder: Path) -> None:
    for name in ("org/source", "org/target"):
        ask(f"api.create_repo({name!r})")
    ask(f"api.upload_folder(repo_id='org/source', folder_path={str(folder)!r})")
    hub.forget()
    copy = "hf.CommitOperationCopy('model.safetensors', 'copy.safetensors', src_repo_id=%r, src_repo_type='model')"
    ask(f"api.create_commit('org/target', [{copy % 'org/source'}], commit_message='m')")
    found = (hub.repo("org/target") or {})["copy.safetensors"]
    assert found.path.read_bytes() == (folder / "model.safetensors").read_bytes()
    assert hub.received() < 5000
    assert hub.sent("model.safetensors") == 0
    hub.uncopied.add("org/source")
    refused = ask(f"api.create_commit('org/target', [{copy % 'org/source'}], commit_message='m')")
    assert refused["error"] in ("ValueError", "FileDuplicationError")


def test_who_may_not_is_told(hub: LocalHub, ask: Ask, folder: Path) -> None:
    ask("api.create_repo('org/mine', private=True)")
    up = f"api.upload_folder(repo_id=%r, folder_path={str(folder)!r}, token=%r)"
    assert ask(up % ("org/mine", READ_TOKEN))["status"] == 403
    assert ask(up % ("org/none", TOKEN))["status"] == 404
    hub.store["org/mine"].private = False
    assert ask(up % ("org/mine", "hf_wrong"))["status"] == 401
    assert ask("api.whoami(token='hf_wrong')")["status"] == 401
    assert ask("api.create_repo('other/x')")["status"] == 403
    assert ask("api.auth_check('org/mine', write=True)") is None
    assert ask(f"api.auth_check('org/mine', write=True, token={READ_TOKEN!r})")["status"] == 403
    hub.store["org/mine"].private = True
    assert ask("api.model_info('org/mine', token=False)")["error"] == "RepositoryNotFoundError"


def test_a_card_that_the_hub_refuses_is_refused(hub: LocalHub, ask: Ask, folder: Path) -> None:
    ask("api.create_repo('org/cards')")
    (folder / "README.md").write_text("---\nbase_model: /home/me/model\n---\n")
    refused = ask(f"api.upload_folder(repo_id='org/cards', folder_path={str(folder)!r})")
    assert refused["error"] == "ValueError"
    assert not hub.commits("org/cards")
