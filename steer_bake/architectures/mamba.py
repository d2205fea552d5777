"""One sublayer per layer: Mamba and its relatives. There is no resid_mid."""

from __future__ import annotations

from dataclasses import replace

from . import Architecture, Block, Weight

_MAMBA = Architecture(
    model_types=("mamba", "mamba2", "falcon_mamba"),
    stack="backbone.layers",
    embedding=Block("backbone.embeddings", (Weight("backbone.embeddings.weight", axis=1),)),
    attention=(Block("mixer", (Weight("mixer.out_proj.weight"),), unlock=("use_bias",)),),
    mlp=(),
)
_NEMOTRON_H = replace(
    _MAMBA,
    model_types=("nemotron_h",),
    stack="model.layers",
    embedding=Block("model.embeddings", (Weight("model.embeddings.weight", axis=1),)),
    attention=(
        Block(
            "mixer",
            (
                Weight("mixer.out_proj.weight"),
                Weight("mixer.o_proj.weight"),
                Weight("mixer.down_proj.weight"),
                Weight("mixer.shared_experts.down_proj.weight"),
                Weight("mixer.experts.*.down_proj.weight", whole=False),
            ),
            unlock=("use_bias", "mlp_bias", "attention_bias"),
        ),
    ),
)
_XLSTM = replace(
    _MAMBA,
    model_types=("xlstm",),
    stack="backbone.blocks",
    attention=(Block("mlstm_layer", (Weight("mlstm_layer.out_proj.weight"),), unlock=("use_bias",)),),
    mlp=(Block("ffn", (Weight("ffn.proj_down.weight"),), unlock=("use_bias",)),),
)

mamba = (_MAMBA, _NEMOTRON_H, _XLSTM)
