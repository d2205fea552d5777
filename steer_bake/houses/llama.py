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
    "phi3": lambda config: False,
    "seed_oss": lambda config: config.attention_bias or config.attention_out_bias,
}

#: Phi-3 has in one tensor what others have in several.
FUSED = {
    "self_attn.qkv_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}


def llama(config: PretrainedConfig) -> House | None:
    biased = _ATTENTION_BIAS.get(config.model_type)
    split = FUSED if config.model_type == "phi3" else {}
    return None if biased is None else House("llama", {"attention_bias": biased(config)}, split=split)
