"""Decoders that normalise a sublayer's output before it enters the stream: Gemma 2 to 4, OLMo 2 and 3, GLM-4, ...

What the stream gets is the norm's output: no bias before it is a shift of the stream, and no edit of the writers is an
exact ablation.
"""

from __future__ import annotations

from dataclasses import replace

from . import NORMED, Architecture, Block, Weight
from .llama import ATTENTION, EMBEDDING, FEED_FORWARD, MIXERS, MLP, root_of_width, scaled_table


def normed(block: Block, name: str, offset: float = 0.0) -> Block:
    """``block`` with a norm at its end. The norm's weight is the writer, and has no bias."""
    return Block(
        name,
        (Weight(f"{name}.weight", offset=offset),),
        unlock=block.unlock,
        rigid=NORMED,
        inner=block.weights,
        reads=block.module,
    )


def _after(attention: str, mlp: str, *model_types: str, offset: float = 0.0) -> Architecture:
    blocks = (normed(ATTENTION, attention, offset),), (normed(MLP, mlp, offset),)
    return Architecture(model_types, EMBEDDING, *blocks, value="self_attn.v_proj")


_OLMO2 = _after("post_attention_layernorm", "post_feedforward_layernorm", "exaone4", "flex_olmo", "olmo2", "olmo3")
_GEMMA2 = replace(
    _after("post_attention_layernorm", "post_feedforward_layernorm", "gemma2", "gemma3_text", offset=1.0),
    unit=0.0,
    embedding=scaled_table(root_of_width),
    middle="pre_feedforward_layernorm",
)
_GEMMA4 = replace(
    _OLMO2,
    model_types=("gemma4_unified_text",),
    embedding=_GEMMA2.embedding,
    middle=_GEMMA2.middle,
    gains=("layer_scalar",),
)
_OLMO_HYBRID = replace(  # layers with attention normalise what they write, the others what they read
    _OLMO2,
    model_types=("olmo_hybrid",),
    attention=(
        replace(MIXERS[0], alone=True),
        # on disk it has another name than in the class
        replace(normed(ATTENTION, "post_attention_layernorm"), weights=(Weight("feedforward_layer_norm.weight"),)),
    ),
    mlp=(replace(normed(MLP, "post_feedforward_layernorm"), alone=True), MLP),
)
_GLM4 = replace(_after("post_self_attn_layernorm", "post_mlp_layernorm", "glm4"), middle="post_attention_layernorm")
_KOLIBRI = replace(  # on disk the norms have other names than in the class
    _OLMO2,
    model_types=("kolibri1",),
    attention=(replace(normed(ATTENTION, "post_attn_norm"), module="post_self_attn_layernorm"),),
    mlp=(replace(normed(MLP, "post_ffn_norm"), module="post_mlp_layernorm"),),
    middle="post_attention_layernorm",
)
_AFMOE = replace(_after("post_attention_layernorm", "post_mlp_layernorm", "afmoe"), middle="pre_mlp_layernorm")
_HYPERCLOVAX = replace(_after("post_norm1", "post_norm2", "hyperclovax"), middle="post_attention_layernorm")
_LFM3 = replace(
    _OLMO2,
    model_types=("lfm3",),
    attention=(normed(ATTENTION, "post_operator_norm"),),
    mlp=(normed(FEED_FORWARD, "post_ffn_norm"),),
    middle="ffn_norm",
)

post_norm = (_OLMO2, _OLMO_HYBRID, _GEMMA2, _GEMMA4, _GLM4, _KOLIBRI, _AFMOE, _HYPERCLOVAX, _LFM3)
