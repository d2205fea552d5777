"""The figures of a card show its numbers, are drawn once for them, and are done without where nobody can draw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from steer_bake import card, card_figures, direction, manifest, pipeline
from steer_bake.audit import audit
from steer_bake.checkpoint import Checkpoint
from steer_bake.interventions import intervene
from steer_bake.sites import Site

from . import jobs
from .test_card import REPORT, evaluation

TWO = [{"name": "add", "site": f"resid_post.{layer}", "amount": 4.0, "dose": 0.2 * layer} for layer in (1, 2)]


@pytest.fixture
def baked(llama: Path, tmp_path: Path) -> Path:
    vector = direction.load(jobs.write_directions(tmp_path / "v.safetensors"))[0]
    return pipeline.bake(llama, [intervene("add", vector, Site("resid_post", 1), 2.0)], tmp_path / "model")


def written(folder: Path, measured: dict[str, Any] | None, **changes: Any) -> dict[str, bytes]:
    """The figures beside the card, after it was written for these figures."""
    plan = {"plan_sha256": manifest.read(folder).content["plan_sha256"]}
    card.write(folder, {**REPORT, **plan, **changes}, None if measured is None else measured | plan)
    there = sorted((folder / "figures").glob("*.png"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in there}


def shown(folder: Path) -> set[str]:
    return set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (folder / "README.md").read_text(encoding="utf-8")))


def test_a_card_shows_the_figures_that_lie_beside_it(baked: Path, llama: Path) -> None:
    found = written(baked, evaluation(), interventions=TWO)
    assert shown(baked) == set(found) == {"figures/behaviour.png", "figures/dose.png"}
    assert all(data.startswith(b"\x89PNG") and 5_000 < len(data) < 100_000 for data in found.values())
    audit(baked, Checkpoint.open(llama)).require()


def test_a_figure_is_drawn_again_only_for_other_numbers(baked: Path) -> None:
    first = written(baked, evaluation())
    path = baked / "figures" / "behaviour.png"
    stamp = path.stat().st_mtime_ns
    kept = card_figures.drawn(baked, card_figures.numbers(REPORT, evaluation()))
    assert kept == first
    assert card_figures.drawn(baked.parent, card_figures.numbers(REPORT, evaluation())) == first, "the same bytes anew"
    other = written(baked, evaluation(fallen=3))
    assert other != first
    assert path.stat().st_mtime_ns != stamp


def test_without_matplotlib_only_figures_that_are_up_to_date_are_shown(
    baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(baked, evaluation())
    monkeypatch.setattr(card_figures, "find_spec", lambda _name: None)
    assert set(written(baked, evaluation())) == shown(baked) == {"figures/behaviour.png"}
    assert written(baked, evaluation(fallen=3)) == {}, "it showed other numbers"
    assert shown(baked) == set()


def test_where_nothing_was_measured_there_is_no_figure(baked: Path) -> None:
    own = baked / "figures" / "behaviour.png"
    own.parent.mkdir()
    own.write_bytes(b"\x89PNG somebody's own")
    assert set(written(baked, None)) == {"figures/behaviour.png"}
    assert own.read_bytes() == b"\x89PNG somebody's own", "not ours to remove"
    assert shown(baked) == set()
