"""Small jobs on tiny models: prompt files, recipes and directions, written where a test wants them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from steer_bake import direction
from steer_bake.direction import Direction, unit
from steer_bake.sites import parse_sites

from . import tiny

TRAIN = {
    "gloomy": ["All is grey and lost.", "I hate this cold rain.", "Nothing will be good again.", "So tired of it."],
    "cheerful": ["What a bright fine day!", "I love this warm sun.", "All will be well again.", "So glad of it."],
    "plain": ["The box holds six nails.", "Water boils when heated."],
}
QUESTIONS = ["Tell me a story.", "What is a tree?", "How do birds fly?", "Name two rivers."]


def write_prompts(folder: Path) -> None:
    """``train.jsonl`` with three labels, ``test.jsonl`` and ``proof.jsonl`` with none."""
    labelled = [{"text": text, "label": label} for label, texts in TRAIN.items() for text in texts]
    write_rows(folder / "train.jsonl", labelled)
    for name in ("test", "proof"):
        write_rows(folder / f"{name}.jsonl", [{"text": text} for text in QUESTIONS])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(model: Path | str | None, **changes: Any) -> dict[str, Any]:
    """A whole recipe as a mapping; ``changes`` replace its top-level keys, a key that is None is left out."""
    content = {
        "model": None if model is None else str(model),
        "prompts": {"train": "train.jsonl", "test": "test.jsonl"},
        "estimator": {"name": "mean_difference", "positive": "gloomy", "negative": "cheerful"},
        "intervention": {"name": "add", "sites": "resid_post.1", "coefficient": 2.0},
        "validate": {"prompts": "proof.jsonl", "decode_tokens": 4},
        "evaluate": {"judge": "phrases", "label": "refusal", "sets": ["test"], "max_new_tokens": 12},
        "safety": False,
        "damage": False,
    } | changes
    return {key: value for key, value in content.items() if value is not None}


def write_recipe(folder: Path, model: Path | str, **changes: Any) -> Path:
    """``recipe.yaml`` and its prompt files in ``folder``."""
    if not (folder / "train.jsonl").exists():
        write_prompts(folder)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(model, **changes), sort_keys=False), encoding="utf-8")
    return path


def write_directions(
    path: Path, sites: str = "resid_post.1", width: int = tiny.WIDTH, norm: float | None = 5.0
) -> Path:
    """A direction file with one random unit vector per site."""
    generator = torch.Generator().manual_seed(3)
    found = [
        Direction(unit(torch.randn(width, generator=generator))[0], site, scale=2.0, stream_norm=norm)
        for site in parse_sites(sites, tiny.LAYERS)
    ]
    direction.save(found, path)
    return path


def copy(model: Path, folder: Path) -> Path:
    """A copy of a fixture's folder that may be changed."""
    return Path(shutil.copytree(model, folder))
