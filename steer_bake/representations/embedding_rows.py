"""What happens at the embedding write, folded into the rows of its table. A tied head gets its own copy first."""

from __future__ import annotations

from ..affine import Affine
from ..checkpoint import Edit
from ..errors import CheckpointError
from . import Base, Holding, Piece


def embedding_rows(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "embedding":
        return None
    table, head = piece.write.tensor, base.architecture.head
    if not base.has(table):
        raise CheckpointError(f"the checkpoint has no embedding table {table!r}; is it complete?")
    edit = base.edit(table, piece.affine, piece.write.axis)
    if base.has(head):
        if base.config.get("tie_word_embeddings"):
            raise CheckpointError(
                f"config.json ties the head to the embedding, yet the checkpoint also stores {head!r}; which of the "
                "two counts depends on the loader. Save the model once with transformers and bake that folder"
            )
        return Holding((edit,))
    untied = Edit(head, edit.shape, edit.dtype, Affine.identity(piece.affine.width), piece.write.axis, source=table)
    return Holding((edit, untied), {"tie_word_embeddings": False})
