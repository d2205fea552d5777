"""The refusal confidence of whole sets: resumable, and the same for any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from steer_bake import scoring
from steer_bake.confidence import measure
from steer_bake.errors import JudgeFailed
from steer_bake.models import load_model, load_tokenizer
from steer_bake.prompts import Prompt, load, save

PROMPTS = [
    Prompt((("user", f"Question {number}: {'why ' * (number % 5)}?"),), label="a", category=f"c{number % 2}")
    for number in range(35)
]


@pytest.fixture(scope="module")
def loaded(llama: Path) -> tuple[Any, Any]:
    return load_model(llama, dtype="float32"), load_tokenizer(llama)


def vowels(answers: Sequence[str], prompts: Sequence[str] | None = None) -> list[str]:
    return ["refusal" if sum(map(answer.count, "aeiou")) % 2 else "answer" for answer in answers]


def test_scores_are_those_of_one_measurement(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    ours = scoring.score(*loaded, PROMPTS, vowels, tmp_path / "notes", made_by="", samples=3, max_new_tokens=5)
    plain = measure(*loaded, PROMPTS, vowels, samples=3, max_new_tokens=5)
    assert [one.labels for one in ours] == [one.labels for one in plain]
    # log-probabilities of one answer in batches of other widths: float32 rounding
    assert [one.value for one in ours] == pytest.approx([one.value for one in plain], abs=1e-5)
    assert len({round(one.value, 3) for one in ours}) > 2, "not all alike"


def test_what_broke_off_goes_on_where_it_was(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    asked: list[str] = []

    def judge(answers: Sequence[str], prompts: Sequence[str] | None = None) -> list[str]:
        if len(asked) == 2 * 16:
            raise JudgeFailed("the endpoint is gone")
        asked.extend(prompts or ())
        return vowels(answers)

    notes, settings = tmp_path / "notes", {"made_by": "m", "samples": 2, "max_new_tokens": 3}
    with pytest.raises(JudgeFailed):
        scoring.score(*loaded, PROMPTS, judge, notes, **settings)
    assert len(asked) == 32, "sixteen prompts with two answers each"
    assert not any(one.question in file.read_text() for one in PROMPTS for file in notes.iterdir())
    with (notes / "0.jsonl").open("a") as file:
        file.write('{"prompt": "cut o')
    asked.clear()
    asked.append("")
    progress: list[tuple[int, int]] = []
    found = scoring.score(*loaded, PROMPTS, judge, notes, **settings, progress=lambda *seen: progress.append(seen))
    assert len(asked) - 1 == 2 * (35 - 16), "and none of the first sixteen again"
    assert progress[0][0] > 16
    assert progress[-1] == (35, 35)
    again = scoring.score(*loaded, PROMPTS, vowels, tmp_path / "other", **settings)
    assert [one.value for one in found] == pytest.approx([one.value for one in again], abs=1e-5)
    asked[:] = [""]
    scoring.score(*loaded, PROMPTS, judge, notes, **{**settings, "made_by": "another judge"})
    assert len(asked) - 1 == 70, "votes of another judge are not taken"
    scoring.forget(notes)
    assert not notes.exists()


def test_two_processes_write_the_scores_of_one(llama: Path, tmp_path: Path) -> None:
    save(PROMPTS, tmp_path / "prompts.jsonl")

    def run(out: Path, processes: int) -> dict[str, Any]:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        command = [
            sys.executable, "-m", *(torchrun if processes > 1 else []), "steer_bake", "score", str(llama),
            str(tmp_path / "prompts.jsonl"), "-o", str(out), "--samples", "2", "--max-new-tokens", "4", "--json",
            "--device", "cpu", "--dtype", "float32",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert not list(out.parent.glob(f".{out.name}*")), "no notes are left"
        return dict(json.loads(done.stdout))

    told = [run(tmp_path / name, processes) for name, processes in (("one.jsonl", 1), ("two.jsonl", 2))]
    assert told[0]["prompts"] == 35
    assert sum(told[0]["labels"].values()) == 70
    assert told[0]["labels"] == told[1]["labels"]
    found = [load(tmp_path / name, folder=tmp_path) for name in ("one.jsonl", "two.jsonl")]
    assert [one.score for one in found[0]] == pytest.approx([one.score for one in found[1]], abs=1e-5)
    assert [(one.messages, one.label, one.category) for one in found[1]] == [
        (one.messages, one.label, one.category) for one in PROMPTS
    ]


def test_saved_prompts_are_the_loaded_ones(tmp_path: Path) -> None:
    said = [
        PROMPTS[0],
        Prompt((("system", "Be brief."), ("user", "Why?")), label="b", topic="t", split="train", pair="7", score=-0.25),
        Prompt((("user", "Why?"), ("assistant", "So.")), score=1.0),
    ]
    save(said, tmp_path / "rows.jsonl")
    assert load("rows.jsonl", folder=tmp_path) == said
