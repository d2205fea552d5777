"""Sequential pre-norm decoders in ``model.layers``: Llama and the many families that copied its module names."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from . import NORMED, Architecture, Block, Scale, Weight, unscaled

EMBEDDING = Block("model.embed_tokens", (Weight("model.embed_tokens.weight", axis=1),))

ATTENTION = Block(
    "self_attn",
    tuple(Weight(f"self_attn.{name}.weight") for name in ("o_proj", "out_proj", "dense", "o_proj.linear")),
    unlock=("attention_bias", "attention_out_bias", "use_bias"),
)
#: What hybrids have in some layers instead of attention, or beside it.
MIXERS = (
    Block("linear_attn", (Weight("linear_attn.out_proj.weight"), Weight("linear_attn.o_proj.weight"))),
    Block("mamba", (Weight("mamba.out_proj.weight"),), unlock=("mamba_proj_bias", "projectors_bias")),
    Block("conv", (Weight("conv.out_proj.weight"),), unlock=("conv_bias",)),
)

DENSE = tuple(Weight(f"mlp.{name}.weight") for name in ("down_proj", "dense_4h_to_h", "fc2", "c_proj"))
#: The experts' outputs are weighted by the router, and qwen's shared expert by a gate: their biases are not whole.
_MIXTRAL = "block_sparse_moe.experts.*.w2.weight"  # on disk; loading renames it
SPARSE = (
    Weight("mlp.shared_experts.down_proj.weight"),
    Weight("mlp.shared_mlp.down_proj.weight", bias="mlp.shared_experts.down_proj.bias"),
    Weight("mlp.shared_expert.down_proj.weight", whole=False),
    Weight("mlp.experts.*.down_proj.weight", whole=False),
    Weight("mlp.experts.down_proj", axis=1, whole=False),
    Weight("mlp.experts.fc2.weight", axis=2, whole=False),
    Weight("block_sparse_moe.down_proj.weight"),
    Weight("block_sparse_moe.shared_experts.down_proj.weight"),
    Weight(_MIXTRAL, whole=False),
)
MLP = Block("mlp", (*DENSE, *SPARSE), unlock=("mlp_bias", "use_bias"))


def scaled(block: Block, scale: Scale, tensors: bool = True) -> Block:
    """``block`` with a multiplier between it and the stream."""
    weights = tuple(replace(weight, scale=scale) for weight in block.weights) if tensors else block.weights
    return replace(block, weights=weights, scale=scale)


def root_of_width(config: Any) -> float:
    return math.sqrt(config.hidden_size)


def residual_multiplier(config: Any) -> float:
    return float(config.residual_multiplier)


def embedding_multiplier(config: Any) -> float:
    return float(config.embedding_multiplier)


def scaled_table(scale: Scale) -> Block:
    """The embedding, whose rows are multiplied before they enter the stream."""
    return replace(EMBEDDING, weights=tuple(replace(weight, scale=scale) for weight in EMBEDDING.weights))


_LLAMA = Architecture(
    model_types=(
        "llama", "arcee", "aria_text", "axk2", "bitnet", "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32",
        "dots1", "dots3_note_text", "ernie4_5", "ernie4_5_moe", "exaone_moe", "flint", "glm", "glm4_moe",
        "glm4_moe_lite", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "internlm3",
        "iquestcoder", "jais2", "laguna", "mellum", "ministral",
        "ministral3", "mistral", "nemotron", "olmo", "olmoe", "persimmon", "phi3", "phimoe",
        "qwen2",
        "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "solar_open", "starcoder2", "youtu",
    ),
    embedding=EMBEDDING,
    attention=(ATTENTION,),
    mlp=(MLP,),
    middle="post_attention_layernorm",
    value="self_attn.v_proj",
)  # fmt: skip

_MIXTRAL_LIKE = replace(
    _LLAMA,
    model_types=("mixtral", "minimax_m2"),
    mlp=(Block("mlp", (Weight(_MIXTRAL, whole=False, mixed=True),)),),
)

# attention sinks take their share of the attention: its weights do not sum to 1
_SINKS = replace(_LLAMA, model_types=("mimo_v2_flash",), value="")
# a clamped activation, whatever its config calls it: no squares of it
_CLAMPED = replace(
    _LLAMA,
    model_types=("minimax_m3_vl_text",),
    mlp=(replace(MLP, weights=tuple(replace(weight, whole=False) for weight in MLP.weights)),),
)
_DOGE = replace(
    _LLAMA,
    model_types=("doge",),
    attention=(replace(ATTENTION, rigid="every layer multiplies the stream itself by a vector"),),
)

_AXK1 = replace(
    _LLAMA,
    model_types=("axk1",),
    mlp=(
        Block(  # of sparse layers; on disk it has another name than in the class
            "mlp.post_mlp_layernorm",
            (Weight("post_mlp_layernorm.weight"),),
            rigid=NORMED,
            inner=MLP.weights,
            alone=True,
        ),
        MLP,
    ),
)

_APERTUS = replace(_LLAMA, model_types=("apertus",), middle="feedforward_layernorm")

_DIFFLLAMA = replace(
    _LLAMA, model_types=("diffllama",), indexed="a layer's attention depends on the layer's number (lambda_init)"
)


def _shares_index(config: Any, layer: int) -> bool:
    return bool(config.indexer_types[layer] == "shared")


# layers attend to the positions that an earlier layer chose
_SHARED_INDEX = replace(_LLAMA, model_types=("glm_moe_dsa",), bystander=_shares_index)

_HYBRID = replace(
    _LLAMA,
    model_types=("kimi_linear",),
    attention=(ATTENTION, *MIXERS),
)
_QWEN3_NEXT = replace(_HYBRID, model_types=("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), unit=0.0)

_BAILING = replace(  # on disk the embedding and the attention have other names than in the class
    _HYBRID,
    model_types=("bailing_hybrid",),
    embedding=Block("model.embed_tokens", (Weight("model.word_embeddings.weight", axis=1),)),
    attention=(replace(ATTENTION, weights=(Weight("attention.dense.weight"),)),),
)

_GPT_OSS = replace(
    _LLAMA,
    model_types=("gpt_oss",),
    # the routing weights sum to 1, so that one bias on every expert is whole
    mlp=(Block("mlp", (Weight("mlp.experts.down_proj", axis=2, bias="mlp.experts.down_proj_bias"),)),),
)

_GEMMA = replace(_LLAMA, model_types=("gemma",), embedding=scaled_table(root_of_width), unit=0.0)
_VAULT_GEMMA = replace(_GEMMA, model_types=("vaultgemma",), middle="pre_feedforward_layernorm")

FEED_FORWARD = Block(
    "feed_forward",
    (
        Weight("feed_forward.down_proj.weight"),
        Weight("feed_forward.w2.weight"),
        Weight("feed_forward.shared_expert.down_proj.weight", whole=False),
        Weight("feed_forward.experts.*.down_proj.weight", whole=False),
        Weight("feed_forward.experts.*.w2.weight", whole=False),
        Weight("feed_forward.experts.down_proj", axis=2, whole=False),
    ),
    unlock=("mlp_bias",),
)
_LLAMA4 = replace(_LLAMA, model_types=("llama4_text",), mlp=(FEED_FORWARD,))
_JAMBA = replace(
    _LLAMA,
    model_types=("bamba", "jamba"),
    attention=(ATTENTION, *MIXERS),
    mlp=(FEED_FORWARD,),
    middle="pre_ff_layernorm",
)
_LFM2 = replace(_JAMBA, model_types=("lfm2", "lfm2_moe"), middle="ffn_norm")


def _attention_multiplier(config: Any) -> float:
    return float(config.attention_out_multiplier)


def _ssm_multiplier(config: Any) -> float:
    return float(config.ssm_out_multiplier)


def _down_multiplier(config: Any) -> float:
    return float(config.mlp_multipliers[1])


_FALCON_H1 = replace(
    _JAMBA,
    model_types=("falcon_h1",),
    embedding=scaled_table(embedding_multiplier),
    attention=(scaled(ATTENTION, _attention_multiplier), scaled(MIXERS[1], _ssm_multiplier)),
    mlp=(replace(scaled(FEED_FORWARD, _down_multiplier), scale=unscaled),),
)

_GRANITE = replace(
    _LLAMA,
    model_types=("granite", "granite_swa"),
    embedding=scaled_table(embedding_multiplier),
    attention=(scaled(ATTENTION, residual_multiplier),),
    mlp=(scaled(MLP, residual_multiplier),),
)
_GRANITE_MOE = replace(
    _GRANITE,
    model_types=("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    attention=tuple(scaled(block, residual_multiplier) for block in (ATTENTION, MIXERS[1])),
    mlp=tuple(
        scaled(block, residual_multiplier)
        for block in (
            Block(
                "block_sparse_moe",
                (
                    Weight("block_sparse_moe.output_linear.weight", axis=1, whole=False),
                    Weight("block_sparse_moe.experts.down_proj", axis=1, whole=False),
                ),
            ),
            Block("shared_mlp", (Weight("shared_mlp.output_linear.weight"),)),
        )
    ),
)


def _depth_scale(config: Any) -> float:
    return float(config.scale_depth) / math.sqrt(config.num_hidden_layers)


def _embedding_scale(config: Any) -> float:
    return float(config.scale_emb)


_MINICPM3 = replace(
    _LLAMA,
    model_types=("minicpm3",),
    embedding=scaled_table(_embedding_scale),
    attention=(scaled(ATTENTION, _depth_scale),),
    mlp=(scaled(MLP, _depth_scale),),
)


def _parallel(config: Any) -> bool:
    return True


_PARALLEL = replace(
    _LLAMA,
    model_types=("cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "phi"),
    middle="",
    parallel=_parallel,
)


def _parallel_residual(config: Any) -> bool:
    return bool(config.use_parallel_residual)


_STABLELM = replace(_LLAMA, model_types=("stablelm",), parallel=_parallel_residual)

_NANOCHAT = replace(_LLAMA, model_types=("nanochat",), embedding=replace(EMBEDDING, weights=(), rigid=NORMED))

_MOSHI = replace(_LLAMA, model_types=("moshi",))

# layers with a shared transformer feed its result to their Mamba, not to the stream
_ZAMBA = replace(
    _LLAMA,
    model_types=("zamba", "zamba2"),
    embedding=replace(EMBEDDING, weights=(), rigid="shared layers read the embedding once more"),
    attention=(
        Block("mamba", (Weight("mamba.out_proj.weight"),), unlock=("mamba_proj_bias", "add_bias_linear")),
        Block(
            "mamba_decoder.mamba",
            (Weight("mamba_decoder.mamba.out_proj.weight"),),
            unlock=("mamba_proj_bias", "add_bias_linear"),
        ),
    ),
    mlp=(),
    middle="",
    indexed="layers read what earlier shared layers hold",
)

_RECURRENT_GEMMA = replace(
    _GEMMA,
    model_types=("recurrent_gemma",),
    attention=(
        Block("temporal_block", (Weight("temporal_block.linear_out.weight"), Weight("temporal_block.o_proj.weight"))),
    ),
    mlp=(Block("mlp_block", (Weight("mlp_block.down_proj.weight"),)),),
    middle="channel_pre_norm",
)

_JETMOE = replace(
    _LLAMA,
    model_types=("jetmoe",),
    attention=(
        Block(
            "self_attention",
            (Weight("self_attention.experts.output_linear.weight", axis=1, bias="self_attention.experts.bias"),),
        ),
    ),
    mlp=(Block("mlp", (Weight("mlp.output_linear.weight", axis=1, bias="mlp.bias"),)),),
)

llama = (
    _LLAMA, _MIXTRAL_LIKE, _SINKS, _CLAMPED, _DOGE, _AXK1, _APERTUS, _DIFFLLAMA, _SHARED_INDEX, _HYBRID, _QWEN3_NEXT,
    _BAILING, _GPT_OSS, _GEMMA, _VAULT_GEMMA, _LLAMA4, _JAMBA, _LFM2, _FALCON_H1, _GRANITE, _GRANITE_MOE, _MINICPM3,
    _PARALLEL, _STABLELM, _NANOCHAT, _MOSHI, _ZAMBA, _RECURRENT_GEMMA, _JETMOE,
)  # fmt: skip
