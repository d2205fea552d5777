"""A shift at the end of a layer, held by a llama.cpp control vector: ``direction.L`` is added behind layer L."""

from __future__ import annotations

from dataclasses import replace

from ..errors import NotFoldable
from . import Base, Holding, Piece

TARGETS = ("gguf_vector",)


def control_vector(piece: Piece, base: Base) -> Holding | None:
    site = piece.site
    if piece.part != "shift" or site is None or site.point != "resid_post":
        raise NotFoldable(
            "a control vector adds a constant at the end of a layer and does nothing else: 'add' at 'resid_post.L' "
            f"from layer 1 on, not what this asks of the {piece.part}" + (f" at {site}" if site else "")
        )
    if site.layer == 0:
        raise NotFoldable(
            "llama.cpp's control vectors begin with layer 1: nothing can be added at resid_post.0; choose a later "
            "layer, or bake a checkpoint and convert it"
        )
    return Holding((replace(base.new(f"direction.{site.layer}", (base.layout.width,), piece.affine), dtype="F32"),))
