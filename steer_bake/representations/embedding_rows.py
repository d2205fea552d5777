"""What happens at the embedding write, folded into the rows of its tables. A tied head gets its own copy first."""

from __future__ import annotations

from ..affine import Affine
from ..checkpoint import Edit
from ..errors import CheckpointError, NotFoldable
from ..skeleton import is_tied
from . import Base, Constant, Holding, Piece, Writer


def embedding_rows(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "embedding":
        return None
    tables = base.tables()
    if not tables:
        raise NotFoldable(
            f"nothing has an exact home at the embedding of a {base.layout.model_type} model: "
            f"{base.layout.architecture.embedding.rigid}"
        )
    table, *others = tables
    if table.weight.axis == 0:
        table = next((one for one in tables if base.has(one.tensor)), table)
    if not base.has(table.tensor):
        raise CheckpointError(f"the checkpoint has no embedding table {table.tensor!r}; is it complete?")
    if piece.affine.is_linear and table.block.rigid:
        raise NotFoldable(
            f"a projection of the embedding write is no edit of any tensor of a {base.layout.model_type} model: "
            f"{table.block.rigid}. Adding a vector works, and projections at 'writers' do"
        )
    scale = table.weight.scale(base.layout.text)
    if table.weight.axis == 0:
        return _norm_bias(piece, table, base)
    edit = base.edit(table.tensor, piece.affine.divided_by(scale), table.weight.axis)
    edits = [edit, *_linear(piece.affine, others, base)]
    head = base.on_disk(base.layout.architecture.head)
    tied = is_tied(base.layout.parsed)
    if base.has(head):
        if tied:
            raise CheckpointError(
                f"config.json ties the head to the embedding, yet the checkpoint also stores {head!r}; which of the "
                "two counts depends on the loader. Save the model once with transformers and bake that folder"
            )
        return Holding(tuple(edits))
    untied = Edit(head, edit.shape, edit.dtype, Affine.identity(piece.affine.width), 1, source=table.tensor)
    return Holding((*edits, untied, *_head_bias(head, base)), base.layout.untied())


def _head_bias(head: str, base: Base) -> list[Edit]:
    """BERT's head shares its bias with the module around it; untied, each has a copy."""
    own, shared = head.removesuffix("weight") + "bias", head.removesuffix(".decoder.weight") + ".bias"
    if own == shared or base.has(own) or not base.has(shared):
        return []
    known = base.checkpoint.tensors[shared]
    return [Edit(own, known.shape, known.dtype, Affine.identity(known.shape[0]), source=shared)]


def _linear(affine: Affine, others: list[Writer], base: Base) -> list[Edit]:
    """The linear part at every other table that is added to the stream; a shift is added once only."""
    linear = affine.without_shift()
    if not linear.is_linear:
        return []
    missing = [one.tensor for one in others if not base.has(one.tensor)]
    if missing:
        raise NotFoldable(f"the checkpoint has no {missing[0]!r}, which is added to the embedding; is it complete?")
    return [base.edit(one.tensor, linear, one.weight.axis) for one in others]


def _norm_bias(piece: Piece, norm: Writer, base: Base) -> Holding:
    """The stream begins at a norm: its bias is added to the stream once."""
    if norm.bias is None or piece.site is None:
        raise NotFoldable(
            f"the stream of a {base.layout.model_type} model begins at a norm without a bias: a shift has no exact "
            "home there"
        )
    return Holding(
        (base.edit(norm.bias, piece.affine.without_linear(), axis=-1),), constants=(Constant(norm.bias, piece.site),)
    )
