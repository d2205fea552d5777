"""BERT used as a decoder: every sublayer normalises the stream itself, so that only the norms' biases shift it."""

from __future__ import annotations

from dataclasses import replace

from . import NORMED, Architecture, Block, Weight


def _norm(name: str) -> Block:
    return Block(name, (Weight(f"{name}.weight"),), rigid=NORMED)


def _projected(*names: str) -> Block:
    """An embedding of another width than the stream: the first of ``names`` that is there begins the stream."""
    return Block(names[0], tuple(Weight(f"{name}.weight") for name in names), rigid=NORMED)


def _rooted(root: str, *model_types: str, head: str = "lm_head.decoder.weight") -> Architecture:
    return Architecture(
        model_types=model_types,
        stack=f"{root}.encoder.layer",
        embedding=_norm(f"{root}.embeddings.LayerNorm"),
        attention=(_norm("attention.output.LayerNorm"),),
        mlp=(_norm("output.LayerNorm"),),
        head=head,
    )


_WRITERS = {
    "attention": (Block("attention.output.dense", (Weight("attention.output.dense.weight"),)),),
    "mlp": (Block("output.dense", (Weight("output.dense.weight"),), reads="intermediate"),),
}


def _pre_norm(of: Architecture, model_type: str, embedding: Block) -> Architecture:
    return replace(
        of, model_types=(model_type,), embedding=embedding, attention=_WRITERS["attention"], mlp=_WRITERS["mlp"]
    )


def _tables(root: str, *names: str) -> Block:
    return Block(f"{root}.embeddings", tuple(Weight(f"{root}.embeddings.{name}.weight", axis=1) for name in names))


_NAMES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_CLS = "cls.predictions.decoder.weight"

bert = (
    _rooted("bert", "bert", "big_bird", "bert-generation", head=_CLS),
    _rooted("roberta", "roberta", "camembert", "xlm-roberta"),
    _rooted("data2vec_text", "data2vec-text"),
    replace(
        _rooted("electra", "electra", head="generator_lm_head.weight"),
        embedding=_projected("electra.embeddings_project", "electra.embeddings.LayerNorm"),
    ),
    _rooted("ernie", "ernie", head=_CLS),
    replace(
        _rooted("rembert", "rembert", head=_CLS),
        embedding=_projected("rembert.encoder.embedding_hidden_mapping_in"),
    ),
    _rooted("roc_bert", "roc_bert", head=_CLS),
    _rooted("roformer", "roformer", head=_CLS),
    _pre_norm(_rooted("bert", head=_CLS), "megatron-bert", _tables("bert", *_NAMES)),
    _pre_norm(_rooted("roberta"), "xlm-roberta-xl", _tables("roberta", *_NAMES)),
    _pre_norm(
        _rooted("roberta_prelayernorm"), "roberta-prelayernorm", _norm("roberta_prelayernorm.embeddings.LayerNorm")
    ),
)
