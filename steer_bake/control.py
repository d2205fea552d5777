"""A plan as a llama.cpp control vector, and such a file against the plan."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from . import interchange
from .checks import Check
from .errors import RecipeError
from .plan import Plan

FILE = "control_vector.gguf"


def vectors(plan: Plan) -> dict[int, Tensor]:
    """What is added behind each layer, [d] float32."""
    return {int(edit.tensor.removeprefix("direction.")): edit.affine.shift for edit in plan.edits}


def write(folder: Path, plan: Plan) -> Path:
    """Write ``control_vector.gguf`` into ``folder`` (raises RecipeError where the package gguf is missing)."""
    interchange.write_control_vector(folder / FILE, vectors(plan), plan.model_type)
    return folder / FILE


def check_vector(folder: Path, plan: Plan) -> Check:
    """Every vector of the file, bit for bit the plan's, and no other."""
    planned = {f"direction.{layer}": vector for layer, vector in vectors(plan).items()}
    try:
        found = interchange.read(folder / FILE)
    except RecipeError as error:
        return Check("tensors", False, None, None, str(error))
    wrong = [f"{name} is missing" for name in planned if name not in found]
    wrong += [f"{name} is not of the plan" for name in found if name not in planned]
    wrong += [
        f"{name} is not as planned" for name in found if name in planned and not _same(found[name], planned[name])
    ]
    return Check.of("tensors", wrong, f"{len(planned)} vectors as planned, bit for bit")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
