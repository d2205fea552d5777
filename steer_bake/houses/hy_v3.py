"""HYV3: Llama with a norm of every query and key head, biases at every projection, dense or sparse layers."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..checkpoint import Rows
from . import House, Part, head_dim
from ._heads import turned

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
    if config.model_type == "glm4_moe" and not config.use_qk_norm:
        return None
    heads = turned(config)
    if heads is None:
        return None
    norms = {} if heads.order == (0,) else {f"self_attn.{one}_norm": _norm(one, heads.order) for one in ("q", "k")}
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
            **heads.values,
        },
        rename={_CORRECTION: "mlp.e_score_correction_bias"},
        parts=heads.parts(config) | norms,
        same_bits=heads.order == (0,),
        needs=("proportional_rope",) if heads.partial else (),
    )


def _norm(name: str, order: tuple[int, ...]) -> Part:
    return Part(f"self_attn.{name}_norm", Rows(0, len(order), order))
