"""What each model family's residual stream looks like: one file per layout, variants as data.

Two columns that share nothing: *modules* (what a hook attaches to) and *tensors* (what a bake edits). A mistake in
either one makes hook and bake disagree, and the certificate fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import registry
from ..errors import CheckpointError, UnknownArchitecture


def unscaled(config: Mapping[str, Any]) -> float:
    """Most writers add their output as it is."""
    return 1.0


@dataclass(frozen=True)
class Write:
    """One writer of the residual stream. ``{layer}`` in a name stands for the layer number."""

    # Hook column
    module: str  # its output (or the first item of it) is what is added to the stream
    # Bake column
    tensor: str  # weight whose ``axis`` is the residual axis
    axis: int  # 0 for a Linear [d, in], 1 for an embedding [vocab, d] or a Conv1D [in, d]
    bias: str | None = None  # the writer's bias tensor, whether or not the checkpoint has it now
    unlock: str | None = None  # the config flag that makes the class create that bias
    siblings: tuple[str, ...] = ()  # weights whose biases the same flag creates: they must be written, as zeros
    scale: Callable[[Mapping[str, Any]], float] = unscaled  # stream write = scale x module output's tensors


@dataclass(frozen=True)
class Architecture:
    """A family's layout: where the stream is written (``embedding``, ``attention``, ``mlp``) and read."""

    model_types: tuple[str, ...]
    embedding: Write
    attention: Write
    mlp: Write
    # Hook column: the modules whose inputs and outputs are the stream itself
    layer: str  # input: resid_pre, output: resid_post
    mid_norm: str  # input: resid_mid
    head: str = "lm_head.weight"  # the tensor that untying creates
    layer_count: str = "num_hidden_layers"
    width: str = "hidden_size"


def layer_count(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """How many decoder layers ``config`` says there are (raises CheckpointError where it does not say)."""
    return _number(config, architecture.layer_count)


def width(architecture: Architecture, config: Mapping[str, Any]) -> int:
    """How many components the residual stream has (raises as :func:`layer_count` does)."""
    return _number(config, architecture.width)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"config.json has {key}={value!r}, where a positive number is needed; is the file complete?"
        )
    return value


def for_config(config: Mapping[str, Any]) -> Architecture:
    """The architecture that claims ``config["model_type"]`` (``config`` as read from config.json).

    Raises:
        UnknownArchitecture: no file claims it; the message lists the types that are known.
    """
    model_type = config.get("model_type")
    known: dict[str, Architecture] = {}
    for variants in registry.load_all("architectures").values():
        for architecture in variants:
            known.update(dict.fromkeys(architecture.model_types, architecture))
    if model_type not in known:
        raise UnknownArchitecture(
            f"model type {model_type!r} is not described in architectures/; known: {', '.join(sorted(known))}. "
            "Add a file there, or choose a model of a known type"
        )
    return known[str(model_type)]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` (``"model.layers.3.mlp"``), also inside a wrapper such as PEFT's, or of a bare decoder.

    Raises:
        UnknownArchitecture: the model has no such module.
    """
    bare = path.partition(".")[2]
    for candidate in (path, f"base_model.model.{path}", f"module.{path}", bare):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    raise UnknownArchitecture(
        f"{type(model).__name__} has no module {path!r}; its layout is not what architectures/ says"
    )
