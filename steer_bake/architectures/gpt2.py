"""Decoders in ``transformer.h``: GPT-2 with its learned positions, and its relatives, sequential or parallel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from . import NORMED, Architecture, Block, Weight

_TABLE = Weight("transformer.wte.weight", axis=1)

_GPT2 = Architecture(
    model_types=("gpt2", "gpt-sw3"),
    stack="transformer.h",
    embedding=Block("transformer.wte", (_TABLE, Weight("transformer.wpe.weight", axis=1))),
    attention=(Block("attn", (Weight("attn.c_proj.weight", axis=1),)),),
    mlp=(Block("mlp", (Weight("mlp.c_proj.weight", axis=1),)),),
    middle="ln_2",
)
_BIGCODE = replace(
    _GPT2,
    model_types=("gpt_bigcode",),
    attention=(Block("attn", (Weight("attn.c_proj.weight"),)),),
    mlp=(Block("mlp", (Weight("mlp.c_proj.weight"),)),),
)
_NEO = replace(
    _BIGCODE,
    model_types=("gpt_neo",),
    attention=(Block("attn", (Weight("attn.attention.out_proj.weight"),)),),
)


def _parallel(config: Any) -> bool:
    return True


_GPTJ = replace(
    _GPT2,
    model_types=("gptj", "codegen"),
    embedding=Block("transformer.wte", (_TABLE,)),
    attention=(Block("attn", (Weight("attn.out_proj.weight"),)),),
    mlp=(Block("mlp", (Weight("mlp.fc_out.weight"),)),),
    middle="",
    parallel=_parallel,
)


def _falcon_is_parallel(config: Any) -> bool:
    return bool(config.new_decoder_architecture or config.parallel_attn)


_FALCON = replace(
    _GPT2,
    model_types=("falcon",),
    embedding=Block("transformer.word_embeddings", (Weight("transformer.word_embeddings.weight", axis=1),)),
    attention=(Block("self_attention", (Weight("self_attention.dense.weight"),), unlock=("bias",)),),
    mlp=(Block("mlp", (Weight("mlp.dense_4h_to_h.weight"),), unlock=("bias",)),),
    middle="",
    parallel=_falcon_is_parallel,
)
_BLOOM = replace(
    _FALCON,
    model_types=("bloom",),
    embedding=Block(
        "transformer.word_embeddings_layernorm", (Weight("transformer.word_embeddings_layernorm.weight"),), rigid=NORMED
    ),
    # attention and MLP themselves add the stream to their outputs
    attention=(Block("self_attention.dense", (Weight("self_attention.dense.weight"),)),),
    mlp=(Block("mlp.dense_4h_to_h", (Weight("mlp.dense_4h_to_h.weight"),), reads="mlp"),),
    parallel=lambda config: bool(config.apply_residual_connection_post_layernorm),
)


def _root_of_width(config: Any) -> float:
    return math.sqrt(config.n_embd)


_CTRL = replace(
    _GPT2,
    model_types=("ctrl",),
    embedding=Block(
        "transformer.w",
        (Weight("transformer.w.weight", axis=1, scale=_root_of_width),),
        rigid="sinusoidal positions are added to the embedding and are no tensor of the checkpoint",
    ),
    attention=(Block("multi_head_attention", (Weight("multi_head_attention.dense.weight"),)),),
    mlp=(Block("ffn", (Weight("ffn.2.weight"),)),),
    middle="layernorm2",
)

# layers normalise the stream itself
_OPENAI = replace(
    _GPT2,
    model_types=("openai-gpt",),
    embedding=Block(
        "transformer.tokens_embed",
        (Weight("transformer.tokens_embed.weight", axis=1), Weight("transformer.positions_embed.weight", axis=1)),
    ),
    attention=(Block("ln_1", (Weight("ln_1.weight"),), rigid=NORMED),),
    mlp=(Block("ln_2", (Weight("ln_2.weight"),), rigid=NORMED),),
    middle="",
)

gpt2 = (_GPT2, _BIGCODE, _NEO, _GPTJ, _FALCON, _BLOOM, _CTRL, _OPENAI)
