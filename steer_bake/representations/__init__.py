"""Exact ways to hold an intervention in a checkpoint: one file each, asked in turn by the planner.

``<name>(piece: Piece, base: Base) -> Holding | None``: the edits that hold the piece, ``None`` where this
representation is not for such a piece, or :class:`NotFoldable` with the reason where it is but the model has no room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..affine import Affine
from ..architectures import Architecture, Write, layer_count
from ..checkpoint import Checkpoint, Edit


@dataclass(frozen=True)
class Base:
    """What a plan may look at: the config, the tensors' headers and the architecture. No weights."""

    checkpoint: Checkpoint
    architecture: Architecture

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def layers(self) -> int:
        return layer_count(self.architecture, self.config)

    def has(self, tensor: str) -> bool:
        return tensor in self.checkpoint.tensors

    def edit(self, tensor: str, affine: Affine, axis: int) -> Edit:
        """``affine`` applied to a tensor that the base has."""
        known = self.checkpoint.tensors[tensor]
        return Edit(tensor, known.shape, known.dtype, affine, axis, source=tensor)

    def zeros(self, tensor: str, like: str) -> Edit:
        """A new all-zero bias for the Linear weight ``like`` [out, in]."""
        weight = self.checkpoint.tensors[like]
        dtype = weight.dtype if weight.dtype in ("BF16", "F16", "F32") else self.checkpoint.storage_dtype
        return Edit(tensor, weight.shape[:1], dtype, Affine.identity(weight.shape[0]))


@dataclass(frozen=True, eq=False)
class Piece:
    """One part of one write that must change: its ``weight``, its ``bias``, or the ``embedding`` with its tables."""

    part: str
    write: Write
    layer: int | None  # None for the embedding
    affine: Affine  # composed from every intervention that reaches this write, in the units of its tensors


@dataclass(frozen=True, eq=False)
class Holding:
    """How a piece is held."""

    edits: tuple[Edit, ...]
    config_changes: Mapping[str, Any] = field(default_factory=dict)
