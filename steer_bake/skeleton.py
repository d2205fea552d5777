"""What the model class wants to load: names and shapes of every parameter, from a config, without a weight.

The class is built on the meta device (tens of milliseconds, whatever its size). It is the authority on which biases a
flag creates, and so catches flags that a class ignores before anything is written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .errors import CheckpointError

Skeleton = dict[str, tuple[int, ...]]

_known: dict[tuple[type[PretrainedConfig], str], tuple[Skeleton, bool]] = {}


def is_tied(config: PretrainedConfig) -> bool:
    """Whether head and embedding are one tensor in the class; some say so in their config and are not."""
    return _of(config)[1]


def skeleton(config: PretrainedConfig) -> Skeleton:
    """Shape by name of what a checkpoint of this config's causal-LM class holds (parameters and saved buffers).

    Raises:
        CheckpointError: transformers has no causal-LM class for the config, or the class rejects it.
    """
    return _of(config)[0]


def _of(config: PretrainedConfig) -> tuple[Skeleton, bool]:
    key = (type(config), config.to_json_string(use_diff=False))
    if key not in _known:
        _known[key] = _built(config)
    return _known[key]


def changed(config: PretrainedConfig, changes: Mapping[str, Any]) -> PretrainedConfig:
    """``config`` with ``changes`` of its config.json, tables within tables too."""
    fields = config.to_dict()
    _merge(fields, changes)
    found: PretrainedConfig = type(config).from_dict(fields)
    return found


def _merge(fields: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(fields.get(key), dict):
            _merge(fields[key], value)
        else:
            fields[key] = value


def stored(config: PretrainedConfig) -> Skeleton:
    """Shape by name of what ``save_pretrained`` writes: names on disk, where experts are apart, and no tied copies.

    Raises:
        CheckpointError: as :func:`skeleton` does.
    """
    from transformers.core_model_loading import revert_weight_conversion  # as heavy as all of transformers' models

    model = on_meta(config)
    ignored = set(model._keys_to_ignore_on_save or ())
    kept: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored and name not in model.all_tied_weights_keys:
            kept.setdefault(id(tensor), (name, tensor))
    saved = revert_weight_conversion(model, dict(kept.values()))
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The config's causal-LM class without a weight.

    Raises:
        CheckpointError: transformers has none, or the class rejects the config.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
            model.tie_weights()  # which is otherwise part of the initialisation
    except Exception as error:  # a class rejects a config in any way it likes
        raise CheckpointError(
            f"transformers builds no causal language model from this {config.model_type} config: {error}"
        ) from error
    finally:
        logging.set_verbosity(level)
    return model


def _built(config: PretrainedConfig) -> tuple[Skeleton, bool]:
    model = on_meta(config)
    saved = model.state_dict(keep_vars=True)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and table is not None and head.weight is table.weight
    return {name: tuple(tensor.shape) for name, tensor in saved.items()}, tied
