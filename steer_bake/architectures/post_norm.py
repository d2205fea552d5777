"""Decoders that normalise a sublayer's output before it enters the stream: Gemma 2 to 4, OLMo 2 and 3, GLM-4, ...

What the stream gets is the norm's output: no bias before it is a shift of the stream, and no edit of the writers is an
exact ablation.
"""

from __future__ import annotations

from dataclasses import replace

from . import NORMED, Architecture, Block, Weight
from .llama import EMBEDDING, root_of_width, scaled_table


def normed(name: str) -> Block:
    """A norm at the end of a sublayer. Its weight is a writer without a bias of its own."""
    return Block(name, (Weight(f"{name}.weight"),), rigid=NORMED)


def _after(attention: str, mlp: str, *model_types: str) -> Architecture:
    return Architecture(model_types, EMBEDDING, (normed(attention),), (normed(mlp),))


_OLMO2 = _after("post_attention_layernorm", "post_feedforward_layernorm", "exaone4", "flex_olmo", "olmo2", "olmo3")
_GEMMA2 = replace(
    _OLMO2,
    model_types=("gemma2", "gemma3_text", "gemma4_unified_text"),
    embedding=scaled_table(root_of_width),
    middle="pre_feedforward_layernorm",
)
_GLM4 = replace(_after("post_self_attn_layernorm", "post_mlp_layernorm", "glm4"), middle="post_attention_layernorm")
_KOLIBRI = _after("post_self_attn_layernorm", "post_mlp_layernorm", "kolibri1")
_AFMOE = replace(_after("post_attention_layernorm", "post_mlp_layernorm", "afmoe"), middle="pre_mlp_layernorm")
_HYPERCLOVAX = _after("post_norm1", "post_norm2", "hyperclovax")
_LFM3 = _after("post_operator_norm", "post_ffn_norm", "lfm3")

post_norm = (_OLMO2, _GEMMA2, _GLM4, _KOLIBRI, _AFMOE, _HYPERCLOVAX, _LFM3)
