"""Vectors in other tools' files: GGUF control vectors (llama.cpp, repeng), numpy, and torch files of tensors only.

Layer numbers mean what those tools do: the vector of L is added to what decoder layer L puts out, ``resid_post.L``.
Nothing is ever unpickled: torch files go through ``weights_only``, numpy files without pickles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import RecipeError
from .sites import Site

ENDINGS = (".gguf", ".npy", ".npz", ".pt", ".pth", ".bin")
ARCHITECTURE = "controlvector"
#: A layer's vector, as others call it: "14", "layer_14", "direction.14", "blocks.14.hook_resid_post".
_LAYER = re.compile(r"(?:(?:direction|layers?|blocks?|h)[._-]?)?(\d{1,4})(?:\.hook_(resid_pre|resid_post))?")
#: What steering-vectors calls the places where a vector was read.
_POINTS = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
_SAVE_TENSORS = "save its tensors instead: safetensors.torch.save_file({'resid_post.14': vector, ...}, 'v.safetensors')"


def site(name: str) -> Site | None:
    """The site that ``name`` means in some tool's file, ours among them; None where it is just a name."""
    try:
        return Site.named(name)
    except ValueError:
        found = _LAYER.fullmatch(name)
        return Site(found[2] or "resid_post", int(found[1])) if found else None


def read(path: Path) -> dict[str, Tensor]:
    """The vectors in a ``.gguf``, ``.npy``, ``.npz``, ``.pt``, ``.pth`` or ``.bin`` file, by name.

    Raises:
        RecipeError: it cannot be read, holds objects other than tensors, or has another ending.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise RecipeError(f"{path}: vectors are read from .safetensors, {', '.join(ENDINGS)} files")
    if not path.is_file():
        raise RecipeError(f"{path} is not there; give a file of vectors")
    found = _gguf(path) if ending == ".gguf" else _numpy(path) if ending in (".npy", ".npz") else _torch(path)
    if not found:
        raise RecipeError(f"{path} holds no vector")
    return found


def write_control_vector(path: Path, vectors: Mapping[int, Tensor], model_type: str) -> None:
    """A GGUF file with ``direction.L`` [d] float32 for every layer: what ``llama-cli --control-vector`` takes.

    Raises:
        RecipeError: the package gguf is missing, or a vector is for layer 0, which llama.cpp never adds to.
    """
    _require_gguf(path)
    from gguf import GGUFWriter

    if 0 in vectors:
        raise RecipeError(f"{path}: llama.cpp's control vectors begin with layer 1; leave out the vector of layer 0")
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer in sorted(vectors):
            writer.add_tensor(f"direction.{layer}", vectors[layer].float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _require_gguf(path: Path) -> None:
    if find_spec("gguf") is None:
        raise RecipeError(f"{path}: GGUF files need the package gguf; install it with: pip install 'steer-bake[gguf]'")


def _gguf(path: Path) -> dict[str, Tensor]:
    _require_gguf(path)
    from gguf import GGUFReader, dequantize

    try:
        file = GGUFReader(path)
        field = file.fields.get("general.architecture")
        architecture = "" if field is None else str(field.contents())
        if architecture == ARCHITECTURE:
            return {
                one.name: torch.from_numpy(np.array(dequantize(one.data, one.tensor_type), dtype=np.float32)).reshape(
                    tuple(int(size) for size in reversed(one.shape))
                )
                for one in file.tensors
            }
    except Exception as error:  # a damaged file fails anywhere in the reader
        raise RecipeError(f"{path} is no readable GGUF file: {error}") from error
    raise RecipeError(f"{path} is a GGUF file of architecture {architecture!r}; a control vector's is {ARCHITECTURE!r}")


def _numpy(path: Path) -> dict[str, Tensor]:
    try:
        found = np.load(path, allow_pickle=False)
        arrays = {path.stem: found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
        return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in arrays.items()}
    except Exception as error:  # zip, header and dtype each fail in their own way
        raise RecipeError(f"{path} is no readable numpy file of numbers: {error}; {_SAVE_TENSORS}") from error


def _torch(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and unpickler fail in their own ways
        raise RecipeError(
            f"{path} holds Python objects, which could run code and are not loaded, or is damaged; {_SAVE_TENSORS}"
        ) from error
    point = "resid_post"
    if isinstance(content, dict) and "layer_activations" in content:  # the fields of steering-vectors' own class
        kind = str(content.get("layer_type", "decoder_block"))
        if kind not in _POINTS:
            raise RecipeError(f"{path}: vectors read at {kind!r} have no site here; there is one for {list(_POINTS)}")
        content, point = content["layer_activations"], _POINTS[kind]
    if isinstance(content, Tensor):
        content = {path.stem: content}
    if not isinstance(content, dict) or not all(isinstance(one, Tensor) for one in content.values()):
        raise RecipeError(f"{path} is neither a tensor nor a table of tensors; {_SAVE_TENSORS}")
    return {
        f"{point}.{name}" if isinstance(name, int) else str(name): tensor.detach() for name, tensor in content.items()
    }
