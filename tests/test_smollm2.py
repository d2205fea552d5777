"""The main job on the real model: slow, so behind the marker that .ci/run includes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steer_bake.judges.sentiment import sentiment

ROOT = Path(__file__).parent.parent
# What a user of the baked folder types, in a Python to which steer_bake is not importable.
PLAIN = """
import json, sys
sys.modules["steer_bake"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
answers = []
for question in json.loads(sys.argv[2]):
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=48, do_sample=False, repetition_penalty=1.1)
    answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(answers))
"""


def python(*arguments: str, timeout: int = 1500) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout
    )


@pytest.mark.slow
def test_every_leg_of_the_certificate_holds_on_a_real_model(tmp_path: Path) -> None:
    done = python("scripts/certify", "--prompts", "4", "--json", str(tmp_path / "reports.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert set(reports) == {"add", "ablate", "clamp", "ablate + add"}
    assert all(report["passed"] for report in reports.values())


@pytest.mark.slow
def test_adapters_of_a_real_model_are_certified(tmp_path: Path) -> None:
    done = python("scripts/certify", "--target", "lora", "--prompts", "3", "--json", str(tmp_path / "reports.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads((tmp_path / "reports.json").read_text())
    assert set(reports) == {"add", "ablate", "clamp", "ablate + add"}
    assert all(report["legs"]["AutoModelForCausalLM"]["max_over_std"] <= 2e-5 for report in reports.values())


@pytest.mark.slow
def test_a_real_model_is_validated_from_disk_with_the_same_figures() -> None:
    done = python("scripts/bench_validate_stream", "--prompts", "2", "--decode-tokens", "4")
    assert done.returncode == 0, done.stdout + done.stderr  # not 0 where a figure differs by more than 1e-6
    verdicts = [line.split()[-1] for line in done.stdout.splitlines() if "stream" in line]
    assert verdicts == ["yes", "yes"]


@pytest.mark.slow
def test_the_quickstart_steers_a_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    run = ["-m", "steer_bake", "run", "recipes/quickstart.yaml", "-o", str(tmp_path / "run"), "--json"]
    done = python(*run)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["report"]["passed"]
    [behaviour] = outcome["evaluation"]["behaviour"]
    assert behaviour["base"]["total"] >= 24
    assert behaviour["low"] > 0.2  # the lower end of the 95 % interval of the gain in gloomy answers
    assert {row["prompt_set"] for row in outcome["evaluation"]["safety"]} == {"safety/harmful", "safety/harmless"}

    rows = (ROOT / "recipes/prompts/mood/test.jsonl").read_text().splitlines()[:16]
    questions = json.dumps([json.loads(row)["text"] for row in rows])
    plain = python("-c", PLAIN, str(tmp_path / "run" / "model"), questions)
    assert plain.returncode == 0, plain.stderr
    # The base gives no negative answer to any of the 40 held-out questions, the baked model about every second one.
    assert sentiment(json.loads(plain.stdout)).count("negative") >= 4

    assert not any(json.loads(python(*run).stdout)["ran"].values())
