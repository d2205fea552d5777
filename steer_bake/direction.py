"""Directions: unit vectors of the residual stream with where they came from, and their file format.

A direction file is a safetensors file with one ``[d]`` tensor per site, named like the site (``resid_post.14``), and
the provenance as JSON in its metadata. A plain safetensors file with bare vectors is read too, and so are the files of
other tools (``interchange.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from . import interchange
from .errors import RecipeError
from .sites import Site

_METADATA_KEY = "steer_bake.directions"


@dataclass(frozen=True, eq=False)
class Direction:
    """A unit vector, the site it was read at, and its natural length there."""

    vector: Tensor  # [d] float32, length 1
    site: Site | None  # None for a bare vector out of somebody else's file
    scale: float = (
        1.0  # natural length in stream units, set by the estimator (mean difference: the norm of the difference)
    )
    stream_norm: float | None = None  # mean |h| at the site, at the read position of the prompts it was estimated on
    model: str | None = None
    revision: str | None = None  # commit hash of the model on the hub, where there is one
    estimator: str | None = None
    recipe_hash: str | None = None
    scale_negative: float | None = None  # natural length for negative coefficients, where it is another one
    neutral: float | None = None  # component of the neutral prompts' mean along the vector: where a clamp counts from

    @property
    def sha256(self) -> str:
        """Hash of the vector's float32 bytes: what plans and ``steering.json`` call this direction by."""
        return hashlib.sha256(self.vector.contiguous().numpy().tobytes()).hexdigest()

    def provenance(self) -> dict[str, object]:
        """Everything but the vector, as JSON-ready values."""
        return {
            "site": None if self.site is None else str(self.site),
            "scale": self.scale,
            "stream_norm": self.stream_norm,
            "model": self.model,
            "revision": self.revision,
            "estimator": self.estimator,
            "recipe_hash": self.recipe_hash,
            **({} if self.scale_negative is None else {"scale_negative": self.scale_negative}),
            **({} if self.neutral is None else {"neutral": self.neutral}),
            "sha256": self.sha256,
        }


def unit(vector: Tensor, what: str = "the direction") -> tuple[Tensor, float]:
    """``vector`` [d] as (float32 unit vector, its length).

    Raises:
        RecipeError: the vector is not one-dimensional, has NaN or infinity in it, or is zero.
    """
    if vector.ndim != 1:
        raise RecipeError(f"{what} has shape {list(vector.shape)}; a vector [d] is needed")
    wide = vector.double()
    length = float(wide.norm())
    if not math.isfinite(length):
        raise RecipeError(f"{what} holds NaN or infinity; estimate it again")
    if length == 0:
        raise RecipeError(f"{what} is zero: the two sides do not differ there; choose other prompts or another site")
    return (wide / length).float(), length


def save(directions: Iterable[Direction], path: Path) -> None:
    """Write ``directions`` (at most one per site) to a safetensors file."""
    found = list(directions)
    tensors = {str(one.site): one.vector.contiguous() for one in found}
    if len(tensors) != len(found):
        raise ValueError("two directions of one site cannot share a file")
    metadata = {str(one.site): one.provenance() for one in found}
    path.write_bytes(to_bytes(tensors, metadata={"format": "pt", _METADATA_KEY: json.dumps(metadata, sort_keys=True)}))


def save_control_vector(directions: Iterable[Direction], path: Path, model_type: str) -> None:
    """Write ``directions`` at their natural lengths as a llama.cpp control vector: ``scale x vector`` per layer.

    Raises:
        RecipeError: one was not read at ``resid_post`` of layer 1 or later: control vectors act nowhere else.
    """
    found = list(directions)
    for one in found:
        if one.site is None or one.site.point != "resid_post" or not one.site.layer:
            raise RecipeError(
                f"a control vector holds vectors of resid_post.1 and later layers; there is one of {one.site}. Read "
                "them there, or write a .safetensors file"
            )
    vectors = {one.site.layer: one.scale * one.vector for one in found if one.site and one.site.layer}
    interchange.write_control_vector(path, vectors, model_type)


def load(path: Path) -> list[Direction]:
    """The directions of a file in its order; bare vectors become unit vectors whose ``scale`` is their old length.

    Beside our own files: plain safetensors, GGUF control vectors, numpy arrays, torch files that hold tensors only. A
    name that is a layer's number (``14``, ``layer_14``, ``direction.14``) is that of ``resid_post.14``.

    Raises:
        RecipeError: the file is missing or damaged, or holds something other than vectors.
    """
    if path.suffix != ".safetensors" and path.suffix.lower() in interchange.ENDINGS:
        return [_direction(name, tensor, None, path) for name, tensor in interchange.read(path).items()]
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise RecipeError(f"{path} is not a readable direction file (safetensors): {error}") from error
    if not tensors:
        raise RecipeError(f"{path} holds no vector")
    try:
        return [_direction(name, tensor, metadata.get(name), path) for name, tensor in tensors.items()]
    except (AttributeError, TypeError) as error:
        raise RecipeError(
            f"the metadata of {path} is not what steer-bake writes ({error}); extract it again"
        ) from error


def is_direction_file(path: Path) -> bool:
    """Whether :func:`save` wrote the file at ``path``, or it is a control vector."""
    if path.suffix == ".gguf":
        try:
            return bool(interchange.read(path))
        except RecipeError:
            return False
    try:
        with safe_open(path, framework="pt") as file:
            return _METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _direction(name: str, tensor: Tensor, known: dict[str, object] | None, path: Path) -> Direction:
    vector, length = unit(tensor.squeeze(), f"{name!r} in {path}")
    if known is None:
        return Direction(vector, interchange.site(name), scale=length)
    fields = {key: value for key, value in known.items() if key not in ("site", "sha256")}
    return Direction(vector if abs(length - 1) > 1e-6 else tensor.float(), interchange.site(name), **fields)  # type: ignore[arg-type]


def orthogonal_to(vector: Tensor, others: Iterable[Tensor]) -> Tensor:
    """``vector`` [d] without its components in the span of ``others`` (each [d]); not normalised."""
    basis = [other.double() for other in others]
    if not basis:
        return vector
    columns, _ = torch.linalg.qr(torch.stack(basis, dim=1))
    wide = vector.double()
    rest: Tensor = wide - columns @ (columns.T @ wide)
    return rest.to(vector)
