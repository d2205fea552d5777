"""Decoders of their own making: MPT, DBRX, CPM-Ant, ModernBERT's decoder."""

from __future__ import annotations

from dataclasses import replace

from . import NORMED, Architecture, Block, Weight

_MPT = Architecture(
    model_types=("mpt",),
    stack="transformer.blocks",
    embedding=Block("transformer.wte", (Weight("transformer.wte.weight", axis=1),)),
    attention=(Block("attn", (Weight("attn.out_proj.weight"),)),),
    # ffn itself adds the stream to its output
    mlp=(Block("ffn.down_proj", (Weight("ffn.down_proj.weight"),), reads="ffn"),),
    middle="norm_2",
)
_DBRX = replace(
    _MPT,
    model_types=("dbrx",),
    attention=(Block("norm_attn_norm.attn", (Weight("norm_attn_norm.attn.out_proj.weight"),)),),
    mlp=(Block("ffn", (Weight("ffn.experts.mlp.w2", axis=1, whole=False),)),),
    middle="",
)
_MODERNBERT = Architecture(
    model_types=("modernbert-decoder",),
    embedding=Block("model.embeddings", (Weight("model.embeddings.norm.weight"),), rigid=NORMED),
    attention=(Block("attn", (Weight("attn.Wo.weight"),), unlock=("attention_bias",)),),
    mlp=(Block("mlp", (Weight("mlp.Wo.weight"),), unlock=("mlp_bias",)),),
    middle="mlp_norm",
    head="decoder.weight",
)

_CPMANT = Architecture(
    model_types=("cpmant",),
    stack="cpmant.encoder.layers",
    embedding=Block(
        "cpmant.input_embedding",
        (Weight("cpmant.input_embedding.weight", axis=1), Weight("cpmant.segment_embedding.weight", axis=1)),
    ),
    attention=(Block("self_att.self_attention", (Weight("self_att.self_attention.attention_out.weight"),)),),
    mlp=(Block("ffn.ffn", (Weight("ffn.ffn.w_out.weight"),)),),
)

mpt = (_MPT, _DBRX, _MODERNBERT, _CPMANT)
