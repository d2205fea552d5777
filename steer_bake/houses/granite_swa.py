"""GraniteSWA: biases at every projection, and sliding windows. Its attention sinks are set to weigh nothing."""

from __future__ import annotations

from transformers import PretrainedConfig

from . import House, head_dim
from .llama import FUSED

_TYPES = ("mistral", "ministral", "phi3", "qwen2")
#: A score so low that its exponential is 0 in every dtype.
_NOTHING = -1e4


def granite_swa(config: PretrainedConfig) -> House | None:
    window = getattr(config, "sliding_window", None)
    if config.model_type not in _TYPES or window is None:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if "sliding_attention" not in kinds:
        return None
    multipliers = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    return House(
        "granite_swa",
        {
            **multipliers,
            "attention_multiplier": head_dim(config) ** -0.5,
            "head_dim": head_dim(config),
            "layer_types": kinds,
            "sliding_window": window,
            "attention_bias": config.model_type == "qwen2",
        },
        fill={"self_attn.sinks": _NOTHING},
        split=FUSED if config.model_type == "phi3" else {},
    )
