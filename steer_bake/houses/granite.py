"""Granite: biases at every projection and a multiplier for the embedding, so that Gemma's scaled one stays tied."""

from __future__ import annotations

import math

from transformers import PretrainedConfig

from . import House, head_dim


def granite(config: PretrainedConfig) -> House | None:
    if config.model_type != "gemma":
        return None
    return House(
        "granite",
        {
            "embedding_multiplier": math.sqrt(config.hidden_size),
            "attention_multiplier": head_dim(config) ** -0.5,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "head_dim": head_dim(config),
        },
        offset={"layernorm.weight": 1.0, "model.norm.weight": 1.0},  # Gemma multiplies by one plus the weight
        same_bits=False,
    )
