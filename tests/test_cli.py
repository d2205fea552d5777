"""The command line: data on stdout, prose on stderr, and for bad input one sentence, no traceback and no folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from steer_bake import __version__, direction, display
from steer_bake.cli import main

from . import jobs, tiny

VERBS = sorted(main.commands)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(one) for one in arguments])


def ok(*arguments: str | Path) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str | Path, because: str) -> str:
    """The one sentence that the command fails with."""
    result = call(*arguments)
    assert result.exit_code not in (0, None), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("Error: ")
    assert "Traceback" not in result.output
    assert because in sentence
    assert result.stdout == ""
    return sentence


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def baked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    vector = jobs.write_directions(folder / "v.safetensors")
    ok("bake", llama, "--vector", vector, "--sites", "resid_post.1", "-o", folder / "baked")
    return folder / "baked"


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return jobs.write_directions(tmp_path / "v.safetensors")


# --- help


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    text = ok(verb, "--help").output
    assert f"steer-bake {verb}" in text.split("Example")[1]
    assert "..." not in ok("--help").output.split("Commands:")[1], "no summary is cut off"


def test_the_verbs_are_the_documented_ones() -> None:
    others = ("validate", "audit", "unbake", "card", "compare", "explain", "agree", "list", "push")
    assert set(VERBS) == {"run", "extract", "score", "probe", "analyze", "select", "plan", "bake", *others}
    for verb in VERBS:
        options = {name for option in main.commands[verb].params for name in option.opts}
        assert "--json" in options or verb == "card"  # what card has to say is the card
        assert "--dry-run" in options or verb in (
            "plan",
            "list",
            "compare",
            "agree",
            "explain",
            "validate",
            "audit",
        )  # these write no model


def test_a_misspelt_verb_is_met_with_the_right_one() -> None:
    refused("bkae", because="did you mean 'bake'?")


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "steer_bake", "--version"], capture_output=True, text=True, timeout=600
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"steer-bake, version {__version__}")


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom steer_bake.cli import main\ntry: main(['run', '--help'])\n"
        "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=600).returncode == 0


# --- the verbs


def test_run_prints_one_json_object_and_keeps_its_progress_off_stdout(llama: Path, tmp_path: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, llama)
    command = [sys.executable, "-m", "steer_bake", "run", str(recipe), "-o", str(tmp_path / "run")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == str(tmp_path / "run" / "model")
    assert found["report"]["passed"] is True
    assert found["ran"]
    assert all(found["ran"].values())
    lines = done.stderr.splitlines()
    assert "validating: done" in lines
    assert all(re.search(r": (done|\d+ of \d+)$", line) for line in lines), "no library talks there"

    summary = ok("run", recipe, "-o", tmp_path / "run")
    assert "up to date: extract, bake, validate" in summary.stderr
    for shown in ("function, constants (float32)", "test", "points [", "dose (added length", "AutoModelForCausalLM"):
        assert shown in summary.stdout
    assert max(map(len, summary.stdout.splitlines())) <= max(100, len(str(tmp_path)) + 100)

    card = ok("card", tmp_path / "run" / "model", "--dry-run")
    assert card.stdout.strip() == (tmp_path / "run" / "model" / "README.md").read_text().strip()


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, ["1 of 3", "2 of 3", "done"]), (3600.0, ["done"])])
def test_long_work_is_told_now_and_then_where_stderr_is_a_file(
    seconds: float, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "SECONDS", seconds)
    with display.progress("selecting") as advance:
        for number in range(1, 4):
            advance(number, 3)
    assert capsys.readouterr().err.splitlines() == [f"selecting: {line}" for line in lines]


def test_a_dry_run_shows_the_plan_and_writes_nothing(llama: Path, tmp_path: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, llama)
    before = tree(tmp_path)
    plan = json.loads(ok("run", recipe, "-o", tmp_path / "runs" / "r", "--dry-run", "--json").stdout)
    assert plan["decisions"][0]["write"] == "mlp.1"
    assert "interventions" not in plan, "amounts are not known before the directions are"
    assert "resid_post.1" in ok("run", recipe, "-o", tmp_path / "runs" / "r", "--dry-run").stdout
    assert "would read resid_post.1" in ok("extract", recipe, "-o", tmp_path / "d" / "v", "--dry-run").stderr
    assert json.loads(ok("plan", recipe, "--json", "--run-folder", tmp_path / "runs" / "r").stdout) == plan
    assert tree(tmp_path) == before
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "d").exists()


def test_extract_writes_a_direction_that_bake_takes(llama: Path, tmp_path: Path) -> None:
    recipe = jobs.write_recipe(tmp_path, llama)
    out = tmp_path / "new" / "v.safetensors"
    (told,) = json.loads(ok("extract", recipe, "-o", out, "--json").stdout)
    (found,) = direction.load(out)
    assert told["sha256"] == found.sha256
    assert "resid_post.1" in ok("extract", recipe, "-o", out).stdout
    ok("bake", llama, "--vector", out, "--sites", "resid_post.1", "-o", tmp_path / "baked")


def test_plan_and_bake_tell_the_same(llama: Path, vector: Path, tmp_path: Path) -> None:
    asked = [llama, "--vector", vector, "--sites", "resid_post.1", "--coefficient", "3", "--units", "unit"]
    plan = json.loads(ok("plan", *asked, "--json").stdout)
    assert plan["interventions"][0]["amount"] == 3.0
    assert json.loads(ok("bake", *asked, "-o", tmp_path / "b", "--dry-run", "--json").stdout) == plan
    assert not (tmp_path / "b").exists()
    written = json.loads(ok("bake", *asked, "-o", tmp_path / "b", "--json").stdout)
    assert written["plan"] == plan
    assert "config.json: mlp_bias = true" in ok("plan", *asked).stdout


def test_stacking_is_refused_until_it_is_asked_for(baked: Path, vector: Path, tmp_path: Path) -> None:
    asked = ["bake", baked, "--vector", vector, "--sites", "resid_post.2", "-o", tmp_path / "out" / "twice"]
    refused(*asked, because="--stack")
    assert not (tmp_path / "out").exists()
    assert "twice" in ok(*asked, "--stack").stdout


@pytest.mark.parametrize("how", [[], ["--stream"]], ids=["in memory", "from disk"])
def test_validate_proves_a_baked_folder_named_by_a_relative_path(
    baked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    jobs.write_prompts(tmp_path)
    monkeypatch.chdir(baked.parent)
    report = tmp_path / "report.json"
    asked = ["validate", baked.name, "--prompts", tmp_path / "proof.jsonl", "--decode-tokens", "4", *how]
    done = ok(*asked, "-o", report, "--json")
    assert json.loads(done.stdout)["passed"] is True
    assert json.loads(report.read_text()) == json.loads(done.stdout)
    card = ok("card", baked, "--report", report, "--dry-run").stdout
    assert "Refusals were not measured" in card
    assert not (baked / "README.md").exists()


@pytest.mark.tampered
def test_validate_fails_with_a_non_zero_exit_and_says_where(baked: Path, tmp_path: Path) -> None:
    jobs.write_prompts(tmp_path)
    wrong = jobs.copy(baked, tmp_path / "wrong")
    biases = wrong / "model-00002-of-00002.safetensors"
    tensors = load_file(biases)
    tensors["model.layers.1.mlp.down_proj.bias"] *= -1
    biases.unlink()
    save_file(tensors, biases, metadata={"format": "pt"})
    result = call("validate", wrong, "--prompts", tmp_path / "proof.jsonl", "--decode-tokens", "4")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "model.layers.1.mlp.down_proj.bias" in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_compare_asks_both_models(baked: Path) -> None:
    (row,) = json.loads(ok("compare", baked, "--ask", "Hello?", "--max-new-tokens", "8", "--json").stdout)
    assert row["prompt"] == "Hello?"
    assert row["base"] != row["baked"]
    shown = ok("compare", baked, "--ask", "a [bold] b", "--max-new-tokens", "8")
    assert "[bold]" in shown.stdout, "square brackets are text"
    assert "\x1b" not in shown.stdout


def test_list_shows_every_extension_point() -> None:
    found = json.loads(ok("list", "--json").stdout)
    assert {"add", "ablate", "clamp"} <= set(found["interventions"])
    assert {"mean_difference", "pca"} <= set(found["estimators"])
    assert "smollm2-135m" in found["models"]
    assert {"plain", "safety/harmful", "safety/harmless"} <= set(found["prompts"])
    assert all(text for entries in found.values() for text in entries.values()), "each says what it is"
    shown = ok("list", "estimators").stdout
    assert "pca" in shown
    assert "clamp" not in shown
    assert max(map(len, ok("list").stdout.splitlines())) <= 100
    refused("list", "estimatos", because="did you mean 'estimators'?")


# --- bad input: the recipe

LONG = "word " * 600


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"promts": {}}, "unknown key 'promts': did you mean 'prompts'?"),
        ({"intervention": {"name": "add", "sites": "resid_post.4"}}, "this model has layers 0 to 3"),
        ({"intervention": {"name": "add", "sites": "resid_psot.1"}}, "did you mean 'resid_post'?"),
        ({"intervention": {"name": "ad", "sites": "resid_post.1"}}, "interventions has no 'ad': did you mean 'add'?"),
        ({"estimator": {"name": "pcs", "positive": "gloomy", "negative": "cheerful"}}, "did you mean 'pca'?"),
        ({"estimator": {"positive": "gloomy", "negative": "cheery"}}, "no prompt is labelled 'cheery'"),
        ({"target": {"name": "chekpoint"}}, "targets has no 'chekpoint': did you mean 'checkpoint'?"),
        ({"evaluate": {"judge": "phrase"}}, "judges has no 'phrase': did you mean 'phrases'?"),
        ({"evaluate": {"label": "refusals"}}, "never gives the label 'refusals': did you mean 'refusal'?"),
        ({"intervention": {"name": "add", "sites": "resid_post.1", "coefficient": float("nan")}}, "finite number"),
        ({"read": {"sites": "writes"}}, "no place to read"),
        ({"read": {"position": "lst"}}, "did you mean 'last'?"),
        ({"prompts": {"train": "train.jsonl", "test": "gone.jsonl"}}, "no prompt set 'gone.jsonl'"),
        ({"validate": {"prompts": "gone.jsonl"}}, "no prompt set 'gone.jsonl'"),
        ({"estimator": None, "direction": {"load": "gone.safetensors"}}, "not a readable direction file"),
        ({"model": "no/such@model/here"}, "no model"),
        ({"model": "smollm"}, "did you mean 'smollm2-135m'?"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_leaves_nothing(
    llama: Path, tmp_path: Path, changes: dict[str, Any], because: str
) -> None:
    recipe = jobs.write_recipe(tmp_path, **({"model": llama} | changes))
    before = tree(tmp_path)
    refused("run", recipe, "-o", tmp_path / "runs" / "r", because=because)
    assert tree(tmp_path) == before
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "rows", "because"),
    [
        ("train", [], "is empty"),
        ("train", [{"text": "one", "label": "gloomy"}], "no prompt is labelled 'cheerful'"),
        ("train", [{"text": LONG, "label": "gloomy"}, {"text": "b", "label": "cheerful"}], "context is 512"),
        ("train", [{"txt": "one"}], "unknown key 'txt': did you mean 'text'?"),
        ("test", [], "is empty"),
        ("test", [{"text": LONG}], "shorten it"),
        ("proof", [{"text": LONG}], "shorten it"),
    ],
)
def test_a_wrong_prompt_set_is_one_sentence_and_leaves_nothing(
    llama: Path, tmp_path: Path, name: str, rows: list[dict[str, Any]], because: str
) -> None:
    recipe = jobs.write_recipe(tmp_path, llama)
    jobs.write_rows(tmp_path / f"{name}.jsonl", rows)
    refused("run", recipe, "-o", tmp_path / "runs" / "r", because=because)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "because"),
    [(b"- a\n- b\n", "must be a mapping"), (b"model: [", "is not YAML"), (b"\xff\xfe\x00", "cannot be read"),
     (None, "cannot be read")],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path: Path, content: bytes | None, because: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_bytes(content)
    for verb in ("run", "extract"):
        refused(verb, recipe, "-o", tmp_path / "runs" / "r", because=because)
    assert not (tmp_path / "runs").exists()


def test_activations_that_are_no_numbers_are_one_sentence(llama: Path, tmp_path: Path) -> None:
    broken = jobs.copy(llama, tmp_path / "broken")
    change(broken / "model.safetensors", "model.layers.1.mlp.down_proj.weight", lambda one: one.fill_(float("nan")))
    recipe = jobs.write_recipe(tmp_path, broken)
    refused("run", recipe, "-o", tmp_path / "runs" / "r", because="NaN or infinity at resid_post.1")
    refused("extract", recipe, "-o", tmp_path / "runs" / "v", because="NaN or infinity")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [("--device", "cuad"), ("--dtype", "flot32"), ("--device", "cuda:99")])
def test_an_unknown_device_or_dtype_is_one_sentence(llama: Path, tmp_path: Path, arguments: tuple[str, str]) -> None:
    recipe = jobs.write_recipe(tmp_path, llama)
    refused("run", recipe, "-o", tmp_path / "runs" / "r", *arguments, because="d")
    assert not (tmp_path / "runs").exists()


# --- bad input: the model folder


def change(file: Path, tensor: str, work: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(file)
    work(tensors[tensor])
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def corrupt(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:8] + b"\x00" * 500)


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("model-*.safetensors")).unlink()


def climb_out(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [truncate, corrupt, lose_a_shard, climb_out, unknown_type, no_config])
def test_a_damaged_model_is_one_sentence_and_leaves_nothing(
    tied_llama: Path, vector: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    model = jobs.copy(tied_llama, tmp_path / "model")
    damage(model)
    asked = ["--vector", vector, "--sites", "resid_post.1"]
    refused("bake", model, *asked, "-o", tmp_path / "new" / "out", because="")
    refused("plan", model, *asked, because="")
    refused("run", jobs.write_recipe(tmp_path, model), "-o", tmp_path / "new" / "run", because="")
    assert not (tmp_path / "new").exists()


# --- bad input: bake's own


def test_an_output_folder_that_is_not_empty_is_left_as_it_is(llama: Path, vector: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    asked = ["bake", llama, "--vector", vector, "--sites", "resid_post.1", "-o"]
    refused(*asked, tmp_path / "full", because="not empty")
    refused(*asked, tmp_path / "full" / "mine.txt", because="not a folder")
    refused("run", jobs.write_recipe(tmp_path, llama), "-o", tmp_path / "full", because="not empty")
    assert tree(tmp_path / "full") == {"mine.txt": b"mine"}


def wrong_width(path: Path) -> None:
    jobs.write_directions(path, width=tiny.WIDTH + 1)


def no_norm(path: Path) -> None:
    jobs.write_directions(path, norm=None)


def matrix(path: Path) -> None:
    save_file({"resid_post.1": torch.ones(3, tiny.WIDTH)}, path)


def not_numbers(path: Path) -> None:
    save_file({"resid_post.1": torch.full((tiny.WIDTH,), float("nan"))}, path)


def empty(path: Path) -> None:
    save_file({}, path)


def wrong_metadata(path: Path) -> None:
    known = json.dumps({"resid_post.1": {"scale": 1.0, "colour": "blue"}})
    save_file({"resid_post.1": torch.ones(tiny.WIDTH)}, path, metadata={"steer_bake.directions": known})


def wrong_metadata_type(path: Path) -> None:
    save_file({"resid_post.1": torch.ones(tiny.WIDTH)}, path, metadata={"steer_bake.directions": "[1]"})


@pytest.mark.parametrize(
    ("make", "because"),
    [
        (wrong_width, "has 33 components"),
        (matrix, "a vector [d] is needed"),
        (not_numbers, "NaN"),
        (empty, "holds no vector"),
        (wrong_metadata, "v.safetensors"),
        (wrong_metadata_type, "v.safetensors"),
        (lambda path: path.write_bytes(b"nonsense"), "not a readable direction file"),
        (lambda path: path.mkdir(), "not a readable direction file"),
        (lambda path: None, "not a readable direction file"),
    ],
)
def test_a_wrong_direction_file_is_one_sentence_and_leaves_nothing(
    llama: Path, tmp_path: Path, make: Callable[[Path], None], because: str
) -> None:
    make(tmp_path / "v.safetensors")
    asked = ["--vector", tmp_path / "v.safetensors", "--sites", "resid_post.1"]
    refused("bake", llama, *asked, "-o", tmp_path / "new" / "out", because=because)
    loads = {"estimator": None, "direction": {"load": "v.safetensors"}}
    refused("run", jobs.write_recipe(tmp_path, llama, **loads), "-o", tmp_path / "new" / "run", because=because)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ([], "--vector FILE --sites"),
        (["--sites", "resid_post.7"], "this model has layers 0 to 3"),
        (["--sites", "resid_post.2", "--from", "resid_post.3"], "there are: resid_post.1"),
        (["--sites", "resid_post.1", "--name", "clmp"], "did you mean 'clamp'?"),
        (["--sites", "resid_post.1", "--coefficient", "nan"], "finite number"),
        (["--sites", "resid_post.1", "--coefficient", "much"], "not a valid float"),
        (["--sites", "resid_post.1", "--units", "doses"], "did you mean 'dose'?"),
        (["--sites", "resid_post.1", "--name", "ablate"], "Sites that work"),
        (["--sites", "writes"], "no meaning at 'writes'"),
    ],
)
def test_an_impossible_request_is_one_sentence_and_leaves_nothing(
    llama: Path, vector: Path, tmp_path: Path, options: list[str], because: str
) -> None:
    asked = ["--vector", vector, *options]
    for verb in (["bake", "-o", tmp_path / "new" / "out"], ["plan"]):
        refused(*verb, llama, *asked, because=because)
    assert not (tmp_path / "new").exists()


def test_a_dose_needs_a_known_norm(llama: Path, tmp_path: Path) -> None:
    no_norm(tmp_path / "v.safetensors")
    asked = ["--vector", tmp_path / "v.safetensors", "--sites", "resid_post.1", "--units", "dose"]
    refused("plan", llama, *asked, because="mean stream norm")


def test_a_folder_that_was_never_baked_is_one_sentence(llama: Path, tmp_path: Path) -> None:
    for verb in ("validate", "compare"):
        refused(verb, llama, because="holds no steering.json")
        refused(verb, tmp_path / "none", because="holds no steering.json")
    refused("card", llama, because="report.json is not there")


def test_a_report_that_is_none_is_one_sentence(baked: Path, tmp_path: Path) -> None:
    for content in ("nonsense", "[]", "{}"):
        (tmp_path / "report.json").write_text(content)
        refused("card", baked, "--report", tmp_path / "report.json", because="report")


@pytest.mark.tampered
def test_a_base_that_is_gone_is_one_sentence(baked: Path, tmp_path: Path) -> None:
    moved = jobs.copy(baked, tmp_path / "moved")
    manifest = json.loads((moved / "steering.json").read_text())
    manifest["base"]["folder"] = str(tmp_path / "gone")
    (moved / "steering.json").write_text(json.dumps(manifest))
    refused("validate", moved, because="gone")
    refused("validate", moved, "--base", tmp_path / "gone", because="gone")


FULL_DISK = """
import resource, shutil, sys
from pathlib import Path
from click.testing import CliRunner
import steer_bake.pipeline  # now: torch cannot be imported where no file can be written
from steer_bake.cli import main
home, *commands = sys.argv[1:]
for command in commands:
    for limit in (0, 300, 600, 900, 1500, 2500, 3500, 6000, 12000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        result = CliRunner().invoke(main, command.split())
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        there = (Path(home) / "new").exists()
        failed = result.exit_code == 1 and isinstance(result.exception, SystemExit)
        one_line = result.stderr.splitlines()[-1].startswith("Error: ") if failed else False
        assert (failed and one_line and not there) or (result.exit_code == 0 and limit), (
            command, limit, there, result.output, repr(result.exception))
        print(limit, "failed" if failed else "done")
        if not failed:
            break
    shutil.rmtree(Path(home) / "new")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a Unix thing")
def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(llama: Path, vector: Path, tmp_path: Path) -> None:
    """A limit on the size of files, which the system enforces in the middle of a write just as a full disk does."""
    recipe = jobs.write_recipe(tmp_path, llama)
    sites = "--sites resid_post.1"
    commands = [
        f"bake {llama} --vector {vector} {sites} -o {tmp_path}/new/out",
        f"extract {recipe} -o {tmp_path}/new/v",
    ]
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run([*script, *commands], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("failed") >= 6


def test_extract_never_replaces_what_is_no_direction_file(llama: Path, tmp_path: Path) -> None:
    base = jobs.copy(llama, tmp_path / "base")
    before = tree(base)
    recipe = jobs.write_recipe(tmp_path, base)
    refused("extract", recipe, "-o", base / "model.safetensors", because="no direction file of ours")
    assert tree(base) == before
    ok("extract", recipe, "-o", tmp_path / "v.safetensors")
    ok("extract", recipe, "-o", tmp_path / "v.safetensors")  # its own it may


def test_answers_to_the_packaged_harmful_requests_are_not_shown(llama: Path, tmp_path: Path) -> None:
    vector = jobs.write_directions(tmp_path / "v.safetensors")
    ok("bake", llama, "--vector", vector, "--sites", "resid_post.1", "-o", tmp_path / "out")
    refused("compare", tmp_path / "out", "--prompts", "safety/harmful", because="are not shown")


def test_a_plan_of_a_recipe_is_not_that_of_an_older_direction(llama: Path, tmp_path: Path) -> None:
    recipe, folder = jobs.write_recipe(tmp_path, llama), tmp_path / "run"
    ok("run", recipe, "-o", folder)
    current = ok("plan", recipe, "--run-folder", folder, "--json").stdout
    swapped = {"name": "mean_difference", "positive": "cheerful", "negative": "gloomy"}
    jobs.write_recipe(tmp_path, llama, estimator=swapped)
    assert ok("plan", recipe, "--run-folder", folder, "--json").stdout != current
    refused("plan", recipe, "--coefficient", "9", because="leave out the options")
