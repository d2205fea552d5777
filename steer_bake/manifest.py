"""``steering.json`` and ``steering.safetensors``: what a baked folder says of itself.

The JSON holds the recipe, the base, the plan and the files; the safetensors file holds the vectors. Together they give
back the interventions, so that a folder can be validated, audited and undone without the recipe that made it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from . import __version__
from .affine import Affine
from .checkpoint import FileRecord, check_complete
from .direction import Direction
from .errors import CheckpointError, RecipeError
from .gate import Gate
from .interventions import Intervention
from .models import ModelRef
from .originals import JSON_FILE as JSON_FILE
from .originals import VECTORS_FILE as VECTORS_FILE
from .originals import Originals
from .plan import PAD_TO, Plan, describe
from .sites import Site
from .stages import write_text


@dataclass(frozen=True)
class Manifest:
    """A baked folder's own account of itself."""

    content: Mapping[str, Any]  # steering.json as it is
    interventions: tuple[Intervention, ...]
    files: tuple[FileRecord, ...]  # what the bake wrote
    originals: Originals  # what it kept of the base

    @property
    def prefer(self) -> str:
        """The planner's preference; an older manifest names none."""
        return _of_plan(self.content, "prefer")

    @property
    def target(self) -> str:
        """What was written: a checkpoint, or something to go beside one."""
        return _of_plan(self.content, "target")

    @property
    def pad_to(self) -> int:
        """What the number of neurons was made a multiple of; of no consequence where no gate is held."""
        return int(self.content["plan"].get("pad_to", PAD_TO))

    @property
    def base(self) -> Mapping[str, Any]:
        """``name``, ``folder``, ``hub_id``, ``revision`` and ``packaged`` of the model that was baked."""
        found: Mapping[str, Any] = self.content["base"]
        return found

    @property
    def computed_elsewhere(self) -> str | None:
        """What the edits were computed with, where that is not what this machine has: ``"aarch64, torch 2.9.1"``."""
        recorded = self.content["computed_on"]
        return None if recorded == computed_on() else f"{recorded['machine']}, torch {recorded['torch']}"


def computed_on() -> dict[str, str]:
    """What can make a difference in the last bit of an edit."""
    return {"machine": platform.machine(), "torch": torch.__version__.partition("+")[0]}


def files(folder: Path) -> tuple[Path, Path]:
    return folder / JSON_FILE, folder / VECTORS_FILE


def exists(folder: Path) -> bool:
    """True where ``folder`` was baked before."""
    return (folder / JSON_FILE).is_file()


def preference(folder: Path) -> str:
    """What the plan of a baked folder preferred; ``"smallest"`` where it does not say."""
    return _of_plan(_content(folder), "prefer")


def target(folder: Path) -> str:
    """What the plan of a baked folder was for; ``"checkpoint"`` where it does not say."""
    return _of_plan(_content(folder), "target")


def _content(folder: Path) -> Any:
    """``steering.json`` as far as it can be read: what is damaged is for :func:`read` to say."""
    try:
        return json.loads((folder / JSON_FILE).read_text())
    except (OSError, ValueError):
        return None


def _of_plan(content: Any, key: str) -> str:
    """What the plan says of ``key``; where it says nothing, what older ones meant."""
    try:
        return str(content["plan"][key])
    except (LookupError, TypeError):
        return {"prefer": "smallest", "target": "checkpoint"}[key]


def padding(folder: Path) -> int:
    """What the plan of a baked folder made the number of neurons a multiple of; the default where it does not say."""
    try:
        return int(json.loads((folder / JSON_FILE).read_text())["plan"]["pad_to"])
    except (OSError, ValueError, LookupError, TypeError):
        return PAD_TO


def write(
    folder: Path,
    plan: Plan,
    ref: ModelRef,
    records: Sequence[FileRecord],
    originals: Originals,
    *,
    recipe: str | None,
    stacked_on: Any = None,
) -> None:
    """Write both files into ``folder``; ``recipe`` is the YAML text, kept verbatim."""
    tensors = {}
    for index, intervention in enumerate(plan.interventions):
        affine = intervention.affine
        parts = {"left": affine.left, "right": affine.right, "shift": affine.shift}
        if intervention.direction is not None:
            parts["direction"] = intervention.direction.vector
        if intervention.gate is not None:
            parts["probe"] = intervention.gate.probe
            if intervention.gate.otherwise is not None:
                parts["otherwise"] = intervention.gate.otherwise
        # clones: one vector may serve as two of these, and the format stores no tensor twice
        tensors.update({f"{index}.{name}": part.contiguous().clone() for name, part in parts.items() if part.numel()})
    vectors = to_bytes(tensors | originals.tensors(), metadata={"format": "pt"})
    (folder / VECTORS_FILE).write_bytes(vectors)
    content = {
        "tool": {"name": "steer-bake", "version": __version__},
        # Where the base lies is of use on this machine only, and only where no name leads to it.
        "base": {**asdict(ref), "folder": None if ref.hub_id or ref.packaged else str(ref.folder.resolve())},
        "recipe": recipe,
        "plan": plan.as_json(),
        "plan_sha256": plan.sha256,
        "vectors_sha256": hashlib.sha256(vectors).hexdigest(),
        "computed_on": computed_on(),
        "files": [asdict(record) for record in records],
        "complete": all(record.how != "remote" for record in records),
        "base_files": originals.listing(),
        "stacked_on": stacked_on,
    }
    (folder / JSON_FILE).write_text(json.dumps(content, indent=2) + "\n")


def set_recipe(folder: Path, recipe: str) -> None:
    """Bring the recipe's text up to date where a part of it changed that does not touch the weights."""
    content = json.loads((folder / JSON_FILE).read_text())
    if content["recipe"] != recipe:
        write_text(folder / JSON_FILE, json.dumps({**content, "recipe": recipe}, indent=2) + "\n")


def read(folder: Path, *, incomplete: bool = False) -> Manifest:
    """The manifest of a baked folder; with ``incomplete`` also of one whose shards are still on the hub.

    Raises:
        CheckpointError: there is none, it is damaged, or its two files do not belong together.
    """
    if not incomplete:
        check_complete(folder)
    if not exists(folder):
        raise CheckpointError(f"{folder} holds no {JSON_FILE}: it was not baked by steer-bake, or the file was removed")
    try:
        content = json.loads((folder / JSON_FILE).read_text())
        tensors = load_file(folder / VECTORS_FILE)
        described = content["plan"]["interventions"]
        found = tuple(_intervention(index, one, tensors) for index, one in enumerate(described))
        for intervention, one in zip(found, described, strict=True):
            again = describe(intervention)
            if any(again.get(key) != one.get(key) for key in ("sha256", "gate")):
                raise CheckpointError(
                    f"{JSON_FILE} and {VECTORS_FILE} in {folder} do not belong together (the vector of {one['name']} "
                    f"at {one['site']}, or its gate, has another hash); bake it again"
                )
        for known in ("name", "folder", "hub_id", "revision", "packaged", "original"):
            content["base"][known]
        for known in ("machine", "torch"):
            content["computed_on"][known]
        content["plan_sha256"], content["recipe"], content["tool"]["version"], content["vectors_sha256"]
        content["stacked_on"]
        records = tuple(FileRecord(**one) for one in content["files"])
        if not all(isinstance(one.name, str) and isinstance(one.size, int) for one in records):
            raise TypeError("a file without name or size")
        originals = Originals.read(content["base_files"], tensors)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError, zlib.error, RecipeError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{JSON_FILE} or {VECTORS_FILE} in {folder} is damaged ({type(error).__name__}: {error}); bake it again"
        ) from error
    return Manifest(content, found, records, originals)


def _intervention(index: int, described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Intervention:
    shift = tensors[f"{index}.shift"]
    none = torch.zeros(len(shift), 0)
    affine = Affine(tensors.get(f"{index}.left", none), tensors.get(f"{index}.right", none), shift)
    return Intervention(
        Site.named(described["site"]),
        affine,
        described["name"],
        described["amount"],
        described["stream_norm"],
        _direction(described["direction"], tensors.get(f"{index}.direction")),
        _gate(described.get("gate"), tensors.get(f"{index}.probe"), tensors.get(f"{index}.otherwise")),
    )


def _gate(
    described: Mapping[str, Any] | None, probe: torch.Tensor | None, otherwise: torch.Tensor | None
) -> Gate | None:
    if described is None or probe is None:
        return None
    threshold, width, sharpness = (float(described[key]) for key in ("threshold", "width", "sharpness"))
    site, name = Site.named(described["site"]), str(described["name"])
    return Gate(site, probe, threshold, width, sharpness, otherwise, name)


def _direction(described: Mapping[str, Any] | None, vector: torch.Tensor | None) -> Direction | None:
    if described is None or vector is None:
        return None
    site = Site.named(described["site"]) if described["site"] else None
    known = {key: value for key, value in described.items() if key not in ("site", "sha256")}
    return Direction(vector, site, **known)
