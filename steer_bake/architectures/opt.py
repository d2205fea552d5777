"""Decoders with ``self_attn.out_proj`` and ``fc2``: OPT, and the decoder halves of encoder-decoder families."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from . import NORMED, Architecture, Block, Weight

_COMPUTED = "sinusoidal positions are added to the embedding and are no tensor of the checkpoint"


def _table_scale(config: Any) -> float:
    return math.sqrt(config.hidden_size) if config.scale_embedding else 1.0


def _embedding(root: str, *, positions: bool = True, rigid: str = "", scaled: bool = True) -> Block:
    table = Weight(f"{root}.embed_tokens.weight", axis=1)
    learned = (Weight(f"{root}.embed_positions.weight", axis=1),) if positions else ()
    return Block(
        f"{root}.embed_tokens", (replace(table, scale=_table_scale) if scaled else table, *learned), rigid=rigid
    )


def _norm(name: str) -> Block:
    """A norm of the stream itself: its bias shifts the stream, nothing else is exact."""
    return Block(name, (Weight(f"{name}.weight"),), rigid=NORMED)


_ROOT = "model.decoder"
_OPT = Architecture(
    model_types=("opt",),
    stack=f"{_ROOT}.layers",
    embedding=_embedding(_ROOT, scaled=False),
    attention=(Block("self_attn", (Weight("self_attn.out_proj.weight"),), unlock=("enable_bias", "use_bias")),),
    mlp=(Block("fc2", (Weight("fc2.weight"),), unlock=("enable_bias",), reads="fc1"),),
    middle="final_layer_norm",
)
_PEGASUS = replace(
    _OPT, model_types=("pegasus", "blenderbot", "bigbird_pegasus"), embedding=_embedding(_ROOT), middle=""
)
_WHISPER = replace(
    _OPT, model_types=("whisper",), embedding=_embedding(_ROOT, scaled=False), middle="", head="proj_out.weight"
)
_EMBEDDING_NORM = Block(f"{_ROOT}.layernorm_embedding", (Weight(f"{_ROOT}.layernorm_embedding.weight"),), rigid=NORMED)
_MBART = replace(_PEGASUS, model_types=("mbart",), embedding=_EMBEDDING_NORM)
_XGLM = replace(
    _PEGASUS,
    model_types=("xglm",),
    stack="model.layers",
    embedding=_embedding("model", positions=False, rigid=_COMPUTED),
)
_BIOGPT = replace(
    _PEGASUS,
    model_types=("biogpt",),
    stack="biogpt.layers",
    embedding=_embedding("biogpt"),
    head="output_projection.weight",
)
_BART = replace(
    _MBART,
    model_types=("bart", "mvp", "plbart", "blenderbot-small"),
    attention=(_norm("self_attn_layer_norm"),),
    mlp=(_norm("final_layer_norm"),),
)
_TROCR = replace(_BART, model_types=("trocr",), head="output_projection.weight")
_MARIAN = replace(_BART, model_types=("marian",), embedding=_embedding(_ROOT, rigid=_COMPUTED))

_PROPHETNET = replace(
    _BART,
    model_types=("prophetnet",),
    stack="prophetnet.decoder.layers",
    embedding=_norm("prophetnet.decoder.embeddings_layer_norm"),
    attention=(_norm("self_attn_layer_norm"),),
    mlp=(_norm("feed_forward_layer_norm"),),
    indexed="the stream holds several n-gram streams",
)

opt = (_OPT, _PEGASUS, _WHISPER, _MBART, _XGLM, _BIOGPT, _BART, _TROCR, _MARIAN, _PROPHETNET)
