"""HYV3: Llama with a norm of every query and key head, biases at every projection, dense or sparse layers."""

from __future__ import annotations

from transformers import PretrainedConfig

from . import House, head_dim

_CORRECTION = "mlp.gate.e_score_correction_bias"


def hy_v3(config: PretrainedConfig) -> House | None:
    if config.model_type == "qwen3":
        return House(
            "hy_v3",
            {
                "mlp_layer_types": ["dense"] * config.num_hidden_layers,
                "head_dim": head_dim(config),
                "attention_bias": config.attention_bias,
            },
        )
    if config.model_type not in ("dots1", "glm4_moe") or config.n_group != 1 or not config.norm_topk_prob:
        return None
    dense = config.first_k_dense_replace
    return House(
        "hy_v3",
        {
            "mlp_layer_types": ["dense" if n < dense else "sparse" for n in range(config.num_hidden_layers)],
            "head_dim": head_dim(config),
            "num_experts": config.n_routed_experts,
            "num_shared_experts": config.n_shared_experts,
            "router_scaling_factor": config.routed_scaling_factor,
            "enable_moe_fp32_combine": False,
        },
        rename={_CORRECTION: "mlp.e_score_correction_bias"},
    )
