"""Llama: biases at every projection, full attention. What most runtimes load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from . import House, Part
from ._heads import gate_and_up, query_key_value, turned

#: Which biases a model of the type has at its attention: the host has them at all four projections or at none.
_ATTENTION_BIAS: dict[str, Callable[[Any], bool]] = {
    "qwen2": lambda config: True,
    "mistral": lambda config: False,
    "ministral": lambda config: False,
    "ministral3": lambda config: False,
    "seed_oss": lambda config: config.attention_bias or config.attention_out_bias,
    "phi3": lambda config: False,
    "gemma": lambda config: config.attention_bias,
    "glm": lambda config: config.attention_bias,
    "helium": lambda config: config.attention_bias,
    "ernie4_5": lambda config: bool(config.use_bias),
}
#: Types that turn neighbours of a head's components, or parts of a head only.
_TURNED = {"phi3": False, "glm": True, "helium": True, "ernie4_5": True}


def llama(config: PretrainedConfig) -> House | None:
    biased = _ATTENTION_BIAS.get(config.model_type)
    if biased is None:
        return None
    house = House("llama", {"attention_bias": biased(config)})
    if config.model_type in _TURNED:
        return _turned(config, house)
    return _scaled(config, house) if config.model_type == "gemma" else house


def _turned(config: PretrainedConfig, house: House) -> House | None:
    found = turned(config, neighbours=_TURNED[config.model_type])
    if found is None:
        return None
    parts = query_key_value(config, found.order) if config.model_type == "phi3" else found.parts(config)
    if config.model_type in ("phi3", "glm"):
        parts |= gate_and_up(config)
    return replace(
        house,
        values={**house.values, **_mlp_bias(config), **found.values},
        parts=parts,
        same_bits=found.order == (0,),  # products of heads are sums, which now run in another order
        needs=("proportional_rope",) if found.partial else (),
    )


def _mlp_bias(config: PretrainedConfig) -> dict[str, Any]:
    return {"mlp_bias": bool(config.use_bias)} if config.model_type == "ernie4_5" else {}


def _scaled(config: PretrainedConfig, house: House) -> House:
    """Gemma multiplies the embedding, which is its head too: without a multiplier they are two tables."""
    table = Part("model.embed_tokens", scale=math.sqrt(config.hidden_size))
    head = {"lm_head": Part("model.embed_tokens")} if config.tie_word_embeddings else {}
    return replace(
        house,
        values={**house.values, "tie_word_embeddings": False},
        parts={"model.embed_tokens": table, **head},
        offset={"layernorm.weight": 1.0, "model.norm.weight": 1.0},  # and by one plus the weight of a norm
        same_bits=False,
    )
