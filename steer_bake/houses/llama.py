"""Llama: biases at every projection, full attention. What most runtimes load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig

from . import House

#: Which biases a model of the type has at its attention: the host has them at all four projections or at none.
_ATTENTION_BIAS: dict[str, Callable[[Any], bool]] = {
    "qwen2": lambda config: True,
    "mistral": lambda config: False,
    "ministral": lambda config: False,
    "ministral3": lambda config: False,
    "seed_oss": lambda config: config.attention_bias or config.attention_out_bias,
}


def llama(config: PretrainedConfig) -> House | None:
    biased = _ATTENTION_BIAS.get(config.model_type)
    return None if biased is None else House("llama", {"attention_bias": biased(config)})
