"""GPT-NeoX: attention and MLP side by side by default, biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import Architecture, Block, Weight


def _parallel(config: Any) -> bool:
    return bool(config.use_parallel_residual)


_NEOX = Architecture(
    model_types=("gpt_neox",),
    stack="gpt_neox.layers",
    embedding=Block("gpt_neox.embed_in", (Weight("gpt_neox.embed_in.weight", axis=1),)),
    attention=(Block("attention", (Weight("attention.dense.weight"),), unlock=("attention_bias",)),),
    mlp=(Block("mlp", (Weight("mlp.dense_4h_to_h.weight"),)),),
    parallel=_parallel,
)

_JAPANESE = replace(
    _NEOX,
    model_types=("gpt_neox_japanese",),
    stack="gpt_neox_japanese.layers",
    embedding=Block("gpt_neox_japanese.embed_in", (Weight("gpt_neox_japanese.embed_in.weight", axis=1),)),
    attention=(
        Block(
            "attention",
            (Weight("attention.dense.weight", bias="attention.dense_bias"),),
            rigid="the last layer adds a bias behind the attention's output",
        ),
    ),
    parallel=lambda config: False,
    head="embed_out.weight",
)

gpt_neox = (_NEOX, _JAPANESE)
