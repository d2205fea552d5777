"""Ernie 4.5 MoE: Mixtral with biases at every projection and an expert for all tokens, which is zero but for a bias."""

from __future__ import annotations

from transformers import PretrainedConfig

from . import House, head_dim
from ._heads import neighbours, query_and_key


def ernie4_5_moe(config: PretrainedConfig) -> House | None:
    if config.model_type != "mixtral":
        return None
    size = head_dim(config)
    return House(
        "ernie4_5_moe",
        {
            "head_dim": size,
            "moe_num_experts": config.num_local_experts,
            "moe_k": config.num_experts_per_tok,
            "moe_intermediate_size": config.intermediate_size,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "use_bias": False,
        },
        rename={
            ".block_sparse_moe.": ".mlp.",
            ".w1.weight": ".gate_proj.weight",
            ".w2.weight": ".down_proj.weight",
            ".w3.weight": ".up_proj.weight",
        },
        parts=query_and_key(config, neighbours(size)),
        same_bits=False,  # this class weighs experts and turns heads in float32
    )
