"""Sequential pre-norm decoders with RMSNorm and a gated MLP: Llama and the families that copied its module names."""

from __future__ import annotations

from dataclasses import replace

from . import Architecture, Write

_LAYER = "model.layers.{layer}"

_LLAMA = Architecture(
    model_types=("llama",),
    embedding=Write(module="model.embed_tokens", tensor="model.embed_tokens.weight", axis=1),
    attention=Write(
        module=f"{_LAYER}.self_attn",
        tensor=f"{_LAYER}.self_attn.o_proj.weight",
        axis=0,
        bias=f"{_LAYER}.self_attn.o_proj.bias",
        unlock="attention_bias",
        siblings=tuple(f"{_LAYER}.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")),
    ),
    mlp=Write(
        module=f"{_LAYER}.mlp",
        tensor=f"{_LAYER}.mlp.down_proj.weight",
        axis=0,
        bias=f"{_LAYER}.mlp.down_proj.bias",
        unlock="mlp_bias",
        siblings=tuple(f"{_LAYER}.mlp.{name}.weight" for name in ("gate_proj", "up_proj")),
    ),
    layer=_LAYER,
    mid_norm=f"{_LAYER}.post_attention_layernorm",
)

# The classes of these types hard-code bias=False on o_proj and down_proj: rank-one edits fit, shifts have no slot.
_NO_BIAS_SLOT = replace(
    _LLAMA,
    model_types=("mistral", "qwen2"),
    attention=replace(_LLAMA.attention, bias=None, unlock=None, siblings=()),
    mlp=replace(_LLAMA.mlp, bias=None, unlock=None, siblings=()),
)

llama = (_LLAMA, _NO_BIAS_SLOT)
