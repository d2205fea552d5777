"""What happens at the embedding write, held by an adapter on its tables; a shift is one more rank, the same for all."""

from __future__ import annotations

from ..skeleton import is_tied
from . import Base, Holding, Piece
from .embedding_rows import embedding_rows

TARGETS = ("lora",)
NOTE = (
    "the head is tied to this table and keeps its weights, but a merge edits both: do not merge this adapter. Sites "
    "that leave the embedding alone ('writers') can be merged"
)


def lora_embedding(piece: Piece, base: Base) -> Holding | None:
    rows = embedding_rows(piece, base)
    if rows is None:
        return None
    head = base.on_disk(base.layout.architecture.head)
    own = tuple(edit for edit in rows.edits if edit.tensor == edit.source and edit.tensor != head)
    return Holding(own, note=NOTE if is_tied(base.layout.parsed) else "")
