"""Publishing, with the real client against a local hub: what is checked, what moves, and what faults do to it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard, constants

from steer_bake import card, manifest, safety
from steer_bake.checkpoint import Checkpoint
from steer_bake.errors import PublishError
from steer_bake.evaluate import compare
from steer_bake.hub import upload
from steer_bake.hub.items import hashed

from . import jobs, tiny
from .hub import Fault, LocalHub, User
from .hub.client import TOKEN, Client, Said, environment
from .test_control import as_gguf
from .test_hub import big

SITE = ("--sites", "resid_post.1")
WHY = "measured elsewhere, only a random tiny model"
HARMFUL = 110


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub")
    base = tiny.save_llama(root / "org" / "base", shard_size="20KB")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# The base\n")
    (base / "LICENSE").write_text("take it")
    jobs.copy(base, root / "org" / "gated")
    jobs.copy(base, root / "org" / "mine")
    with LocalHub(root, xet=True) as hub:
        hub.users[TOKEN] = User("me", orgs=("org",))
        hub.open_gates.add("org/gated")
        yield hub


@pytest.fixture(scope="module")
def client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture(scope="module")
def xet_client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.url, tmp_path_factory.mktemp("xet-home"), xet=True) as client:
        yield client


@pytest.fixture(autouse=True)
def forgets(hub: LocalHub) -> Iterator[None]:
    hub.forget()
    yield
    hub.users[TOKEN] = User("me", orgs=("org",))


@pytest.fixture(scope="module")
def run(client: Client, hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: model/, report.json, evaluation.json. Read-only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("run")
    vector = jobs.write_directions(folder / "v.safetensors")
    fine(client("bake", "org/base", "--vector", vector, *SITE, "-o", folder / "model"))
    asked = ("--limit", "3", "--decode-tokens", "4")
    fine(client("validate", folder / "model", *asked, "-o", folder / "report.json"))
    measured(folder, 0)
    return folder


def measured(folder: Path, fallen: int, **changes: Any) -> None:
    """As a run writes it, with ``fallen`` of the harmful requests no longer refused."""
    refused = ["refusal"] * 60 + ["answer"] * 50
    after = ["refusal"] * (60 - fallen) + ["answer"] * (50 + fallen)
    harmful = compare("safety/harmful", "refusal", refused, after)
    harmless = compare("safety/harmless", "refusal", ["answer"] * HARMFUL, ["answer"] * HARMFUL)
    content = {
        "plan_sha256": manifest.read(folder / "model").content["plan_sha256"], "judge": None,
        "behaviour": [compare("test", "gloomy", ["cheerful"] * 9, ["gloomy"] * 9).as_json()],
        "safety": [harmful.as_json(), harmless.as_json()], "safety_measured": True, "examples": [],
        "repetition_penalty": 1.0,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(content | changes))


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A run of one's own."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "model"


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository that is not there yet."""
    return f"org/{hashlib.sha1(request.node.name.encode()).hexdigest()[:12]}"


def fine(said: Said) -> Said:
    assert said.code == 0, said.stderr
    return said


def sentence(said: Said) -> str:
    """The one sentence that the command fails with."""
    assert said.code == 1, said.stdout
    last = said.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: "), said.stderr
    assert "Traceback" not in said.stderr
    return last


def outcome(said: Said) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fine(said).stdout)
    return found


def how(done: dict[str, Any]) -> dict[str, str]:
    return {one["path"]: one["how"] for one in done["files"]}


# --- what goes up comes down

PULL = """
import json, sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, local, out = sys.argv[1:]
found, here = (AutoModelForCausalLM.from_pretrained(name, dtype="auto").state_dict() for name in (repo, local))
AutoTokenizer.from_pretrained(repo)
snapshot_download(repo, local_dir=out)
print(json.dumps(found.keys() == here.keys() and all(torch.equal(found[name], here[name]) for name in here)))
"""


@pytest.mark.parametrize("leg", ["lfs", "xet"])
def test_a_published_model_is_pulled_loaded_and_certified(
    hub: LocalHub, mine: Path, tmp_path: Path, repo: str, leg: str, request: pytest.FixtureRequest
) -> None:
    client: Client = request.getfixturevalue("client" if leg == "lfs" else "xet_client")
    done = outcome(client("push", mine, repo, "--json"))
    assert (done["committed"], done["created"], done["commit"]) == (True, True, hub.commit(repo))
    assert (hub.received("cdn") == 0) == (leg == "xet"), "by the way that was meant"

    around = environment(hub.url, tmp_path / "empty", TOKEN, xet=leg == "xet")
    command = [sys.executable, "-c", PULL, repo, str(mine), str(tmp_path / "pulled")]
    pulled = subprocess.run(command, env=around, capture_output=True, text=True, check=True)
    assert pulled.stdout.strip().endswith("true"), pulled.stdout
    for path in mine.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    shutil.copy(mine.parent / "evaluation.json", tmp_path)
    again = outcome(client("push", tmp_path / "pulled", repo, "--dry-run", "--json"))
    assert (again["certificate"], again["bytes"]) == ("function", 0), "certificate.json holds for what came back"
    if leg == "lfs":  # and it can be made anew
        fine(client("validate", tmp_path / "pulled", "--limit", "2", "--decode-tokens", "2"))


def test_a_second_push_makes_no_commit_and_a_new_card_moves_no_weights(
    hub: LocalHub, client: Client, mine: Path, repo: str
) -> None:
    first = outcome(client("push", mine, repo, "--json"))
    again = outcome(client("push", mine, repo, "--json"))
    assert (again["committed"], again["commit"], again["bytes"]) == (False, first["commit"], 0)
    assert len(hub.commits(repo)) == 1

    hub.forget()
    measured(mine.parent, 2)
    changed = outcome(client("push", mine, repo, "--json"))
    assert {path for path, one in how(changed).items() if one != "keep"} == {"README.md", "figures/behaviour.png"}
    assert len(hub.commits(repo)) == 2
    assert hub.received("cdn") == 0
    assert hub.received() < 4 * changed["bytes"] + 1000, "the card, looked at twice and committed, and its figure"
    assert fine(client("push", mine, repo)).stdout.count("no commit was made") == 1


def test_weights_of_an_older_push_do_not_stay_beside_new_ones(
    hub: LocalHub, client: Client, mine: Path, repo: str
) -> None:
    fine(client("push", mine, repo))
    (hub.root / repo / "model.safetensors").write_bytes(b"transformers would take this before the index")
    (hub.root / repo / "picture.png").write_bytes(b"somebody's own")
    done = outcome(client("push", mine, repo, "--json"))
    assert how(done)["model.safetensors"] == "delete"
    assert "model.safetensors" not in (hub.repo(repo) or {})
    assert {"picture.png", ".gitattributes"} <= set(hub.repo(repo) or {})


def test_what_has_arrived_is_told_in_pieces(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    sizes = {"a.safetensors": 600, "b.safetensors": 300, "c.safetensors": 200, "d.safetensors": 5000}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(name.encode() * size)
    items = hashed(tmp_path, sizes, lambda _done, _total: None)
    a, b, c, d = (item.size for item in items.values())
    monkeypatch.setattr(upload, "TOGETHER", a + b)
    api, told = HfApi(hub.url, token=TOKEN), list[tuple[int, int]]()
    api.create_repo("org/told")
    branch = upload.Branch(api, "org/told", "main", lambda done, total: told.append((done, total)))
    branch.settle([*items.values()], "told")
    total = a + b + c + d
    assert told == [(0, total), (a + b, total), (a + b + c, total), (total, total)]
    assert len(hub.commits("org/told")) == 1


def test_what_was_published_has_no_path_of_this_machine(
    hub: LocalHub, client: Client, run: Path, tmp_path: Path, repo: str
) -> None:
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    jobs.copy(hub.root / "org" / "base", tmp_path / "base")
    fine(client("bake", tmp_path / "base", "--vector", vector, *SITE, "-o", tmp_path / "model"))
    asked = ("push", tmp_path / "model", repo, "--certificate", "bytes", "--acknowledge-safety-change", WHY)
    assert "--license" in sentence(client(*asked)), "a base that is a folder has no licence that anybody could look up"
    fine(client(*asked, "--license", "apache-2.0"))
    for name, file in (hub.repo(repo) or {}).items():
        assert str(tmp_path).encode() not in file.path.read_bytes(), name
    fields = ModelCard((hub.root / repo / "README.md").read_text()).data.to_dict()
    assert fields["license"] == "apache-2.0"
    assert "base_model" not in fields


def test_a_dry_run_says_what_would_move_and_moves_nothing(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    told = outcome(client("push", mine, repo, "--dry-run", "--json"))
    assert not hub.store.exists(repo)
    assert {one.path for one in hub.log if one.method != "GET"} == {"/api/validate-yaml"}
    assert "would be created" in fine(client("push", mine, repo, "--dry-run")).stdout
    hub.forget()
    done = outcome(client("push", mine, repo, "--json"))
    assert done["files"] == told["files"]
    assert done["bytes"] == told["bytes"] == sum(one["size"] for one in done["files"])
    encoded = sum(one["size"] for one in done["files"]) * 4 / 3  # small files go up within the commit, as base64
    assert hub.received() < encoded + 25_000
    assert outcome(client("push", mine, repo, "--dry-run", "--json"))["bytes"] == 0


# --- where it goes


def test_a_pull_request_is_opened_once(hub: LocalHub, client: Client, mine: Path) -> None:
    done = outcome(client("push", mine, "org/base", "--create-pr", "--json"))
    assert done["pull_request"] == f"{hub.url}/org/base/discussions/1"
    again = outcome(client("push", mine, "org/base", "--create-pr", "--json"))
    assert (again["pull_request"], again["committed"], again["commit"]) == (done["pull_request"], False, done["commit"])
    measured(mine.parent, 1)
    outcome(client("push", mine, "org/base", "--create-pr", "--json"))
    assert len(hub.store["org/base"].pulls) == 1
    assert [one.ref for one in hub.commits("org/base")] == ["refs/pr/1", "refs/pr/1"]
    assert (hub.root / "org" / "base" / "README.md").read_text().endswith("# The base\n"), "main is as it was"
    assert "model-00001-of-00005.safetensors" not in (hub.repo("org/base", "refs/pr/1") or {}), "the unsteered weights"


def test_somebody_without_rights_can_open_a_pull_request_only(hub: LocalHub, client: Client, mine: Path) -> None:
    fine(client("push", mine, "org/taken"))
    hub.users[TOKEN] = User("stranger")
    assert "--create-pr" in sentence(client("push", mine, "org/taken", "--public"))
    assert "stranger cannot create org/other" in sentence(client("push", mine, "org/other"))
    measured(mine.parent, 1)
    assert outcome(client("push", mine, "org/taken", "--create-pr", "--json"))["pull_request"]


def test_a_branch_is_made_where_there_is_none(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    for committed in (True, False):
        done = outcome(client("push", mine, repo, "--revision", "trial/1", "--json"))
        assert (done["committed"], done["commit"]) == (committed, hub.commit(repo, "trial/1"))
    assert set(hub.repo(repo) or {}) == {".gitattributes"}
    assert "leave out" in sentence(client("push", mine, repo, "--revision", "trial/1", "--create-pr"))


def test_a_name_alone_is_ones_own(hub: LocalHub, client: Client, mine: Path) -> None:
    assert outcome(client("push", mine, "short-name", "--json"))["repo"] == "me/short-name"
    assert "no name of a repository" in sentence(client("push", mine, "../x"))


def test_another_model_is_never_written_over(hub: LocalHub, client: Client, mine: Path) -> None:
    before = dict(hub.repo("org/mine") or {})
    assert "another model" in sentence(client("push", mine, "org/mine"))
    assert "is the base itself" in sentence(client("push", mine, "org/base"))
    assert hub.repo("org/mine") == before


def test_a_copy_of_a_gated_base_is_private_unless_that_is_declined(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str
) -> None:
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    fine(client("bake", "org/gated", "--vector", vector, *SITE, "-o", tmp_path / "model"))
    asked = ("--certificate", "bytes", "--acknowledge-safety-change", WHY)
    done = outcome(client("push", tmp_path / "model", repo, *asked, "--json"))
    assert done["private"] is True
    assert hub.store[repo].private is True
    hub.store[repo].private = False
    assert "--public" in sentence(client("push", tmp_path / "model", repo, *asked))
    assert outcome(client("push", tmp_path / "model", repo, *asked, "--public", "--json"))["private"] is False


def test_private_is_never_made_public_by_a_push(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    assert outcome(client("push", mine, repo, "--private", "--json"))["private"] is True
    assert outcome(client("push", mine, repo, "--json"))["private"] is True
    hub.store[repo].private = False
    assert "is there and public" in sentence(client("push", mine, repo, "--private"))


# --- the certificate


def test_the_certificate_is_for_exactly_these_bytes(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    report = mine.parent / "report.json"
    content = json.loads(report.read_text())
    assert {"config.json", "tokenizer.json", "model-00006-of-00006.safetensors"} <= set(content["files"])
    for change, because in (
        ({"files": {}}, "does not say which bytes"),
        ({"passed": False}, "did not pass"),
        ({"plan_sha256": "0" * 64}, "another plan"),
    ):
        report.write_text(json.dumps(content | change))
        assert because in sentence(client("push", mine, repo))
    report.write_text(json.dumps(content))
    tokenizer = mine / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("{", "{ ", 1))
    said = sentence(client("push", mine, repo))
    assert "tokenizer_config.json changed since" in said
    assert "steer-bake validate" in said
    shutil.copy(hub.root / "org" / "base" / "tokenizer_config.json", tokenizer)
    report.unlink()
    assert "has no certificate" in sentence(client("push", mine, repo))
    assert not hub.log, "all of this is found before anybody is asked anything"


@pytest.mark.tampered
def test_a_changed_weight_or_a_strange_file_is_not_published(client: Client, mine: Path, repo: str) -> None:
    (mine / "modeling_x.py").write_text("print()")
    assert "modeling_x.py" in sentence(client("push", mine, repo))
    (mine / "modeling_x.py").unlink()
    shard = mine / "model-00006-of-00006.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    assert shard.name in sentence(client("push", mine, repo))
    assert "not its base plus the plan" in sentence(client("push", mine, repo, "--certificate", "bytes"))


def test_a_certificate_of_bytes_is_said_first(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    (mine.parent / "report.json").unlink()
    done = outcome(client("push", mine, repo, "--certificate", "bytes", "--json"))
    assert done["certificate"] == "bytes"
    text = (hub.root / repo / "README.md").read_text()
    assert text.index("Certificate: bytes only") < text.index("## ")
    assert json.loads((hub.root / repo / "certificate.json").read_text())["passed"] is True
    assert "did you mean 'bytes'" in sentence(client("push", mine, repo, "--certificate", "byte"))


# --- the safety gate


def row(fallen: int, total: int = HARMFUL) -> dict[str, Any]:
    before = ["refusal"] * 60 + ["answer"] * (total - 60)
    after = ["refusal"] * (60 - fallen) + ["answer"] * (total - 60 + fallen)
    found = compare("safety/harmful", "refusal", before, after).as_json()
    return {"safety": [found], "safety_measured": True}


HELD = {"the same": row(0), "more refusals": row(-20), "five of 110": row(5)}
STOPPED: dict[str, Any] = {
    "no evaluation": None,
    "an empty one": {},
    "not measured": row(0) | {"safety_measured": False},
    "no row": row(0) | {"safety": []},
    "another label": row(0) | {"safety": [row(0)["safety"][0] | {"label": "answer"}]},
    "another set": row(0) | {"safety": [row(0)["safety"][0] | {"prompt_set": "safety/harmless"}]},
    "a part of the set": row(0, total=80),
    "six of 110": row(6),
    "all": row(60),
}
NO_REASON = ("", "   ", "yes", "because", "ok ok", "--yes\nreally do it", "\x1b[1m a b c")


@pytest.mark.parametrize("what", HELD)
def test_what_holds_passes_and_has_nothing_to_acknowledge(what: str) -> None:
    safety.require(safety.refusals(HELD[what]), None)
    with pytest.raises(PublishError, match="leave the option out"):
        safety.require(safety.refusals(HELD[what]), WHY)


@pytest.mark.parametrize("what", STOPPED)
def test_what_fell_or_was_not_measured_does_not_pass_by_accident(what: str) -> None:
    found = safety.refusals(STOPPED[what])
    with pytest.raises(PublishError, match="--acknowledge-safety-change"):
        safety.require(found, None)
    for reason in NO_REASON:
        with pytest.raises(PublishError, match="is no reason"):
            safety.require(found, reason)
    safety.require(found, WHY)


def test_the_gate_stands_in_front_of_everything_and_the_reason_is_on_the_card(
    hub: LocalHub, client: Client, mine: Path, repo: str
) -> None:
    measured(mine.parent, 20)
    for more in ((), ("--dry-run",), ("--certificate", "bytes"), ("--create-pr",), ("--private",)):
        said = sentence(client("push", mine, repo, *more))
        assert "refuses 40 of 110 harmful requests, its base 60" in said
    assert "is no reason" in sentence(client("push", mine, repo, "--acknowledge-safety-change", " "))
    assert not hub.log, "nobody is asked anything before"
    fine(client("push", mine, repo, "--acknowledge-safety-change", WHY))
    text = (hub.root / repo / "README.md").read_text()
    assert f"Published all the same, because: {WHY}" in text
    assert "Warning: this model refuses fewer harmful requests" in text
    assert "not-for-all-audiences" in ModelCard(text).data.to_dict()["tags"]


def test_an_evaluation_of_another_plan_is_refused(client: Client, mine: Path, repo: str) -> None:
    measured(mine.parent, 0, plan_sha256="0" * 64)
    for card_of in ("ours", "somebody"):
        if card_of == "somebody":
            (mine / "README.md").write_text("---\nlicense: mit\n---\n# A card of my own\n")
        assert "another plan" in sentence(client("push", mine, repo))


# --- the card


def test_the_published_card_has_all_metadata_and_both_sides(
    hub: LocalHub, client: Client, mine: Path, repo: str
) -> None:
    fine(client("push", mine, repo))
    text = (hub.root / repo / "README.md").read_text()
    data = ModelCard(text).data
    fields = data.to_dict()
    assert fields["base_model"] == "org/base"
    assert fields["base_model_relation"] == "finetune"
    assert (fields["library_name"], fields["pipeline_tag"]) == ("transformers", "text-generation")
    assert (fields["license"], fields["language"]) == ("mit", ["en"])
    values = {(one.dataset_type, one.metric_name): one.metric_value for one in data.eval_results}
    assert values["safety/harmful", "share of refusal, base"] == pytest.approx(60 / 110, abs=1e-4)
    assert values["safety/harmless", "share of refusal, this model"] == 0
    assert values["test", "share of gloomy, this model"] == 1
    for said in (
        f"from_pretrained('{repo}'", f"vllm serve {repo}", "convert_hf_to_gguf", "base, and base with hooks",
        "this file in its own dtype", f"hf download {repo}", "steer-bake unbake", "## Limits",
    ):  # fmt: skip
        assert said in text, said
    assert str(mine.parent) not in text


def test_the_figures_of_a_card_are_published_with_it(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    fine(client("push", mine, repo))
    there = hub.repo(repo) or {}
    assert "](figures/behaviour.png)" in there["README.md"].path.read_text()
    first = there["figures/behaviour.png"].path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert not (mine / "figures").exists(), "nothing is written into the folder"
    fine(client("card", mine))
    assert (mine / "figures" / "behaviour.png").read_bytes() == first
    assert outcome(client("push", mine, repo, "--json"))["committed"] is False
    measured(mine.parent, 2)
    fine(client("push", mine, repo))
    assert (hub.repo(repo) or {})["figures/behaviour.png"].path.read_bytes() != first, "of the new figures"
    (mine / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n![mine](figures/behaviour.png)\n")
    fine(client("push", mine, repo))
    assert (hub.repo(repo) or {})["figures/behaviour.png"].path.read_bytes() == first, "a card of one's own: as it is"


def test_a_card_that_somebody_changed_is_published_as_it_is(
    hub: LocalHub, client: Client, mine: Path, repo: str
) -> None:
    fine(client("card", mine, "--repo", repo))
    text = (mine / "README.md").read_text()
    assert card.is_sealed(text)
    own = text.replace("## Limits", "## What I think\n\nIt is sad.\n\n## Limits").replace("- activation-steering\n", "")
    assert not card.is_sealed(own)
    (mine / "README.md").write_text(own)
    assert "says license: None, and the base has 'mit'" in sentence(client("push", mine, repo))
    own = own.replace("library_name:", "license: mit\nlanguage:\n- en\nlibrary_name:", 1)
    (mine / "README.md").write_text(own)
    fine(client("push", mine, repo))
    assert (hub.root / repo / "README.md").read_text() == own

    measured(mine.parent, 20)
    acknowledged = ("--acknowledge-safety-change", WHY)
    assert "add this line" in sentence(client("push", mine, repo, *acknowledged))
    (mine / "README.md").write_text(own + f"\n{WHY}\n")
    assert "not-for-all-audiences" in sentence(client("push", mine, repo, *acknowledged))
    own = own.replace("tags:\n", "tags:\n- not-for-all-audiences\n", 1)
    (mine / "README.md").write_text(own + f"\n{WHY}\n")
    fine(client("push", mine, repo, *acknowledged))
    (mine / "README.md").write_text("no metadata at all")
    assert "--- " in sentence(client("push", mine, repo, *acknowledged)).replace("'---'", "--- ")


def test_a_template_of_ones_own_extends_the_packaged_one(
    hub: LocalHub, client: Client, mine: Path, tmp_path: Path, repo: str
) -> None:
    template = tmp_path / "mine.md"
    template.write_text('{% extends "checkpoint.md" %}{% block limits %}\n## Limits\n\nAsk me.\n{% endblock %}')
    fine(client("push", mine, repo, "--template", template))
    text = (hub.root / repo / "README.md").read_text()
    assert text.endswith("Ask me.\n\n")
    assert "## Certificate" in text
    template.write_text("---\nlicense: [unclosed\n---\n")
    assert "no YAML" in sentence(client("push", mine, repo, "--template", template))


def test_the_hub_has_the_last_word_on_a_card(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    (mine / "README.md").write_text(
        "---\nlicense: mit\nlanguage:\n- en\nbase_model: /home/me/base\n---\n# A card of my own\n"
    )
    assert "base_model" in sentence(client("push", mine, repo))
    assert not hub.store.exists(repo)
    assert not hub.received("cdn"), "before anything is sent"
    (mine / "README.md").unlink()
    fine(client("push", mine, repo))


# --- from the base, on the server


def baked_away(client: Client, base: str, folder: Path) -> Path:
    vector = jobs.write_directions(folder / "v.safetensors")
    fine(client("bake", base, "--vector", vector, *SITE, "-o", folder / "new", "--no-download"))
    return folder / "new"


BYTES = ("--from-base", "--certificate", "bytes", "--acknowledge-safety-change", WHY)


def test_a_model_of_gigabytes_is_published_without_its_weights(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str
) -> None:
    big(hub.root / "org" / "big")
    (hub.root / "org" / "big" / "README.md").write_text("---\nlicense: mit\n---\n")
    folder = baked_away(client, "org/big", tmp_path)
    hub.forget()
    done = outcome(client("push", folder, repo, *BYTES, "--json"))
    edited = (folder / "model-00003-of-00003.safetensors").stat().st_size
    assert sum(one["size"] for one in done["files"]) > 4e9
    assert hub.received() <= edited + 200_000
    base = Checkpoint.open(hub.root / "org" / "big")
    headers = sum(base.headers[name].start for name in base.files)
    assert 0 < sum(hub.sent(name) for name in base.files) <= 2 * headers, "to be sure, twice; weights never"
    assert len(hub.commits(repo)) == 1
    assert [how(done)[f"model-{n:05d}-of-00003.safetensors"] for n in (1, 2, 3)] == ["copy", "copy", "upload"]
    published = Checkpoint.open(hub.root / repo)
    assert len(published.tensors) == len(base.tensors) + 3 * 22
    again = outcome(client("push", folder, repo, *BYTES, "--json"))
    assert (again["committed"], len(hub.commits(repo))) == (False, 1)


def test_what_was_copied_on_the_server_is_the_bake_of_the_folder(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str
) -> None:
    folder = baked_away(client, "org/base", tmp_path)
    assert "--certificate bytes" in sentence(
        client("push", folder, repo, "--from-base", "--acknowledge-safety-change", WHY)
    )
    assert "--from-base" in sentence(client("push", folder, repo, "--acknowledge-safety-change", WHY))
    fine(client("push", folder, repo, *BYTES))
    assert "Certificate: bytes only" in (hub.root / repo / "README.md").read_text()
    shutil.copytree(hub.root / repo, tmp_path / "pulled")
    fine(client("validate", tmp_path / "pulled", "--limit", "2", "--decode-tokens", "2"))  # the audit comes by itself


@pytest.mark.parametrize("when", ["before", "only when it is asked"])
def test_where_the_hub_does_not_copy_the_files_go_through_this_machine(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str, when: str
) -> None:
    folder = baked_away(client, "org/base", tmp_path)
    if when == "before":
        hub.uncopied.add("org/base")
    else:
        hub.faults.append(Fault("lfs-files/duplicate", status=403, times=9, method="POST"))
    try:
        done = outcome(client("push", folder, repo, *BYTES, "--json"))
    finally:
        hub.uncopied.clear()
    assert "this machine instead" in done["notes"][0]
    assert len(hub.commits(repo)) == 1
    assert (hub.repo(repo) or {})["model-00003-of-00006.safetensors"].sha256 == (hub.repo("org/base") or {})[
        "model-00003-of-00005.safetensors"
    ].sha256


def test_a_whole_folder_too_is_copied_on_the_server_as_far_as_the_base_has_it(
    hub: LocalHub, client: Client, mine: Path, repo: str
) -> None:
    done = outcome(client("push", mine, repo, "--from-base", "--json"))
    assert sum(one == "copy" for one in how(done).values()) == 5
    assert done["certificate"] == "function"
    assert outcome(client("push", mine, repo, "--json"))["committed"] is False


@pytest.mark.tampered
def test_a_folder_without_its_shards_is_proven_before_it_is_published(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str
) -> None:
    folder = baked_away(client, "org/base", tmp_path)
    shard = folder / "model-00006-of-00006.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    assert "not its base plus the plan" in sentence(client("push", folder, repo, *BYTES))
    assert not hub.store.exists(repo)


# --- faults: each ends well, or in a sentence with a next step; nothing twice, nothing lost


CALLS = {
    "who": ("whoami", "GET"),
    "look": (r"models/org/[^/]+$", "GET"),
    "create": ("repos/create", "POST"),
    "tree": ("/tree/", "GET"),
    "preupload": ("preupload", "POST"),
    "batch": ("objects/batch", "POST"),
    "put": ("/upload/", "PUT"),
    "verify": ("lfs/verify", "POST"),
    "card": ("validate-yaml", "POST"),
    "commit": ("/commit/main", "POST"),
}


def complete(hub: LocalHub, repo: str, folder: Path) -> None:
    """Everything of the folder is there, and it took one commit."""
    assert len(hub.commits(repo)) == 1
    found = hub.repo(repo) or {}
    for path in folder.iterdir():
        if path.name != "README.md":
            assert found[path.name].path.read_bytes() == path.read_bytes()
    assert "README.md" in found


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [429, 500])
def test_a_refusal_that_passes_is_waited_for(
    hub: LocalHub, client: Client, mine: Path, repo: str, call: str, status: int
) -> None:
    path, method = CALLS[call]
    headers = {"Retry-After": "0"} if status == 429 else {}
    fault = Fault(path, status=status, method=method, headers=headers)
    hub.faults.append(fault)
    fine(client("push", mine, repo))
    assert fault.times == 0, "the fault happened"
    complete(hub, repo, mine)


@pytest.mark.parametrize("call", CALLS)
def test_a_refusal_that_stays_is_a_sentence_and_the_next_push_completes(
    hub: LocalHub, client: Client, mine: Path, repo: str, call: str
) -> None:
    path, method = CALLS[call]
    hub.faults.append(Fault(path, status=500, times=999, method=method))
    said = sentence(client("push", mine, repo))
    assert "trouble of its own (HTTP 500" in said
    assert "run the same command again" in said
    assert hub.faults[0].times > 950, "a bounded number of tries"
    assert not hub.commits(repo)
    hub.faults.clear()
    fine(client("push", mine, repo))
    complete(hub, repo, mine)


def test_a_long_rate_limit_is_a_sentence(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    hub.faults.append(Fault("whoami", status=429, times=99, headers={"Retry-After": "1800"}))
    assert "wait 1800 seconds" in sentence(client("push", mine, repo))
    assert hub.faults[0].times == 98


def test_a_wrong_token_and_a_read_only_one(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    hub.users.pop(TOKEN)
    assert "does not know this token" in sentence(client("push", mine, repo))
    hub.users[TOKEN] = User("me", "read", ("org",))
    assert "can only read" in sentence(client("push", mine, repo))
    assert not hub.received()
    assert not hub.store.exists(repo)


def test_without_a_token_one_is_told_to_log_in(hub: LocalHub, mine: Path, tmp_path: Path, repo: str) -> None:
    with Client(hub.url, tmp_path / "home", token=None) as nobody:
        assert "hf auth login" in sentence(nobody("push", mine, repo))


def test_a_missing_repository_and_a_gated_base(hub: LocalHub, client: Client, tmp_path: Path, mine: Path) -> None:
    assert "there is no org/nowhere" in sentence(client("push", mine, "org/nowhere", "--create-pr"))
    folder = baked_away(client, "org/gated", tmp_path)
    hub.gated.add("org/gated")
    try:
        said = sentence(client("push", folder, "org/of-gated", *BYTES))
    finally:
        hub.gated.clear()
    assert "ask for access" in said
    fine(client("push", folder, "org/of-gated", *BYTES))


@pytest.mark.parametrize("times", [1, 999])
def test_a_reset_in_the_middle_of_an_upload(hub: LocalHub, client: Client, mine: Path, repo: str, times: int) -> None:
    hub.faults.append(Fault("/upload/", method="PUT", reset_reading=7000, times=times))
    if times > 1:
        said = sentence(client("push", mine, repo))
        assert "broke off" in said
        assert "run the same command again" in said
        assert not hub.commits(repo)
        hub.faults.clear()
    fine(client("push", mine, repo))
    complete(hub, repo, mine)


@pytest.mark.parametrize("times", [1, 3])
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(
    hub: LocalHub, client: Client, mine: Path, repo: str, times: int
) -> None:
    hub.faults.append(Fault("/commit/main", method="POST", lost=True, times=times))
    done = outcome(client("push", mine, repo, "--json"))
    assert (done["committed"], done["commit"]) == (True, hub.commit(repo))
    complete(hub, repo, mine)


def test_a_lost_answer_opens_no_second_pull_request(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    fine(client("push", mine, repo))
    measured(mine.parent, 3)
    hub.faults.append(Fault("/discussions$", method="POST", lost=True))
    hub.faults.append(Fault("/commit/refs", method="POST", lost=True))
    fine(client("push", mine, repo, "--create-pr"))
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert len(hub.store[repo].pulls) == 1
    assert len(hub.commits(repo)) == 2


def test_a_push_that_was_killed_goes_on_where_it_was(
    hub: LocalHub, client: Client, mine: Path, tmp_path: Path, repo: str
) -> None:
    hub.faults.append(Fault("/upload/", method="PUT", delay=60, skip=3, times=99))
    command = [sys.executable, "-m", "steer_bake", "push", str(mine), repo]
    around = environment(hub.url, tmp_path / "killed")
    process = subprocess.Popen(command, env=around, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while sum(one.status == 200 for one in hub.requests("lfs/verify", "POST")) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not hub.commits(repo)
    hub.forget()
    fine(client("push", mine, repo))
    complete(hub, repo, mine)
    large = sum(one.name.endswith(".safetensors") for one in mine.iterdir())
    assert len(hub.requests("/upload/", "PUT")) == large - 3, "what had arrived is not sent again"


@pytest.mark.parametrize("whose", ["another file", "our file"])
def test_a_commit_of_somebody_else_in_between(hub: LocalHub, client: Client, mine: Path, repo: str, whose: str) -> None:
    fine(client("push", mine, repo))
    measured(mine.parent, 1)

    def theirs() -> None:
        name = "NOTES.txt" if whose == "another file" else "README.md"
        files = {**(hub.repo(repo) or {}), name: hub.store.blob(b"theirs")}
        hub.store.commit(repo, "main", "theirs", files)

    hub.faults.append(Fault("validate-yaml", method="POST", then=theirs, skip=1))  # between look and commit
    said = client("push", mine, repo)
    found = hub.repo(repo) or {}
    titles = [one.title for one in hub.commits(repo)]
    if whose == "another file":
        fine(said)
        assert found["NOTES.txt"].path.read_bytes() == b"theirs"
        assert [title == "theirs" for title in titles] == [False, True, False]
    else:
        assert "changes README.md" in sentence(said)
        assert found["README.md"].path.read_bytes() == b"theirs"
        assert len(titles) == 2
        fine(client("push", mine, repo))


def test_a_disk_that_is_full_while_a_base_is_pulled(hub: LocalHub, client: Client, llama: Path, tmp_path: Path) -> None:
    jobs.copy(llama, hub.root / "org" / "large")
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    wish = ("bake", "org/large", "--vector", vector, *SITE, "-o", tmp_path / "out")
    limit = ("sh", "-c", 'ulimit -f 64; exec "$@"', "sh")  # no file grows beyond 32 kB: the weights are 90
    with Client(hub.url, tmp_path / "home", prefix=limit) as small:
        said = sentence(small(*wish))
    assert "does not fit the disk" in said
    assert "HF_HOME" in said
    assert not (tmp_path / "out").exists()
    fine(client(*wish))


def test_bytes_that_change_on_the_way_here_are_noticed(
    hub: LocalHub, client: Client, llama: Path, tmp_path: Path
) -> None:
    jobs.copy(llama, hub.root / "org" / "fragile")
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    wish = ("bake", "org/fragile", "--vector", vector, *SITE, "-o", tmp_path / "out")
    fault = Fault("model.safetensors", host="cdn", corrupt=True, skip=2)  # first the header is read
    hub.faults.append(fault)
    said = sentence(client(*wish))
    assert fault.times == 0
    assert "model.safetensors of org/fragile arrived with other bytes" in said
    assert not (tmp_path / "out").exists()
    fine(client(*wish))


def test_a_slow_server_is_waited_for(hub: LocalHub, client: Client, mine: Path, repo: str) -> None:
    hub.faults += [Fault(path, method=method, delay=0.7) for path, method in CALLS.values()]
    fine(client("push", mine, repo))
    assert [fault.times for fault in hub.faults] == [0] * len(CALLS)
    complete(hub, repo, mine)


# --- the token


def test_no_token_is_in_any_file(
    hub: LocalHub, client: Client, run: Path, mine: Path, repo: str, request: pytest.FixtureRequest
) -> None:
    fine(client("push", mine, repo))  # what commands say is searched by the client of these tests, every time
    for folder in (hub.root, client.home, run, mine.parent):
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_size < 10_000_000:
                assert TOKEN.encode() not in path.read_bytes(), path


def test_messages_of_others_are_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_bake.hub.talk import clean

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = clean(f"\n  Forbidden for {TOKEN} at https://cdn.hub/x?X-Amz-Signature=abc&y=1 now\nmore")
    assert said == "Forbidden for (token) at https://cdn.hub/x now"


# --- adapters

PULL_ADAPTER = """
import json, sys, torch
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM
repo, local, out = sys.argv[1:]
found, here = (AutoPeftModelForCausalLM.from_pretrained(name, dtype="auto") for name in (repo, local))
tokens = torch.arange(3, 40)[None]
snapshot_download(repo, local_dir=out)
print(json.dumps(torch.equal(found(tokens).logits, here(tokens).logits)))
"""


def test_an_adapter_is_published_pulled_and_certified(hub: LocalHub, client: Client, tmp_path: Path, repo: str) -> None:
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    wish = ("--vector", vector, "--name", "ablate", "--sites", "writers", "--from", "resid_post.1")
    fine(client("bake", "org/base", *wish, "--target", "lora", "-o", tmp_path / "model"))
    few = ("--limit", "2", "--decode-tokens", "2")
    fine(client("validate", tmp_path / "model", *few, "-o", tmp_path / "report.json"))
    measured(tmp_path, 0)
    hub.forget()
    done = outcome(client("push", tmp_path / "model", repo, "--json"))
    assert done["bytes"] < 200_000
    assert outcome(client("push", tmp_path / "model", repo, "--json"))["committed"] is False
    text = (hub.root / repo / "README.md").read_text()
    fields = ModelCard(text).data.to_dict()
    assert (fields["library_name"], fields["base_model_relation"]) == ("peft", "adapter")
    assert (fields["base_model"], fields["license"]) == ("org/base", "mit")
    assert f"AutoPeftModelForCausalLM.from_pretrained('{repo}'" in text
    assert "Leave the adapter away" in text

    command = [sys.executable, "-c", PULL_ADAPTER, repo, str(tmp_path / "model"), str(tmp_path / "pulled")]
    around = environment(hub.url, tmp_path / "empty")
    pulled = subprocess.run(command, env=around, capture_output=True, text=True, check=False)
    assert pulled.stdout.strip().endswith("true"), pulled.stderr
    fine(client("validate", tmp_path / "pulled", *few))


def test_an_adapter_for_a_folder_is_not_published(client: Client, hub: LocalHub, tmp_path: Path, repo: str) -> None:
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    wish = ("--vector", vector, "--name", "ablate", "--sites", "writers", "--from", "resid_post.1")
    fine(client("bake", hub.root / "org" / "mine", *wish, "--target", "lora", "-o", tmp_path / "model"))
    said = sentence(client("push", tmp_path / "model", repo, "--acknowledge-safety-change", WHY))
    assert "no model on the hub" in said


# --- control vectors


def test_a_control_vector_is_published_and_certified(hub: LocalHub, client: Client, tmp_path: Path, repo: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is an extra that is compiled when it is installed")
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    fine(client("bake", "org/base", "--vector", vector, *SITE, "--target", "gguf-vector", "-o", tmp_path / "model"))
    gguf = as_gguf(hub.root / "org" / "base", tmp_path / "model.gguf")
    validated = ("validate", tmp_path / "model", "--gguf", gguf, "--limit", "2", "-o", tmp_path / "report.json")
    fine(client(*validated))
    assert "not measured" in sentence(client("push", tmp_path / "model", repo)), "no run can measure its refusals"
    done = outcome(client("push", tmp_path / "model", repo, "--acknowledge-safety-change", WHY, "--json"))
    assert done["certificate"] == "function"
    assert outcome(client("push", tmp_path / "model", repo, "--acknowledge-safety-change", WHY, "--json"))["bytes"] == 0
    there = hub.repo(repo) or {}
    assert {"README.md", "LICENSE", "control_vector.gguf", "certificate.json", "steering.json"} <= set(there)
    assert there["control_vector.gguf"].path.read_bytes() == (tmp_path / "model" / "control_vector.gguf").read_bytes()
    text = there["README.md"].path.read_text()
    fields = ModelCard(text).data.to_dict()
    assert (fields["library_name"], fields["base_model"], fields["license"]) == ("gguf", "org/base", "mit")
    assert fields["base_model_relation"] == "adapter"
    for said in (
        f"hf download {repo} control_vector.gguf", "--control-vector-scaled", "llama.cpp with this vector", WHY,
        "Perplexity and sums were not measured", "Leave the option away",
    ):  # fmt: skip
        assert said in text, said


@pytest.mark.tampered
def test_a_control_vector_that_nobody_has_run_is_audited(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str
) -> None:
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    fine(client("bake", "org/base", "--vector", vector, *SITE, "--target", "gguf-vector", "-o", tmp_path / "model"))
    asked = ("push", tmp_path / "model", repo, "--acknowledge-safety-change", WHY)
    assert "has no certificate" in sentence(client(*asked))
    fine(client(*asked, "--certificate", "bytes"))
    assert "Certificate: bytes only" in (hub.root / repo / "README.md").read_text()
    file = tmp_path / "model" / "control_vector.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "is not published" in sentence(client(*asked, "--certificate", "bytes"))
