"""GLM-4 MoE Lite: DeepSeek-V3 with a list that says which layers are sparse, so that a dense one fits anywhere."""

from __future__ import annotations

from transformers import PretrainedConfig

from . import House


def glm4_moe_lite(config: PretrainedConfig) -> House | None:
    if config.model_type != "deepseek_v3":
        return None
    dense = config.first_k_dense_replace
    kinds = ["dense" if n < dense else "sparse" for n in range(config.num_hidden_layers)]
    return House("glm4_moe_lite", {"mlp_layer_types": kinds})
