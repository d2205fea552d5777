"""The linear part of an intervention, before the norm that ends a sublayer: close to it, and only where asked for.

The stream gets ``D y / rms(y)`` with ``y = W x`` and ``D`` the norm's weight. ``W <- W + A (B^T W)`` with ``B = D R``
and ``B^T A = R^T L`` leaves, of what the intervention removes, nothing in the stream. Two things it cannot do: keep
``rms(y)`` as it was, and, where ``D A`` is not ``L``, leave the other components alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..affine import Affine, product
from ..errors import NotFoldable
from . import Base, Holding, Piece

#: In units of the mean square of the norm's weight: from ``D A = L`` to an orthogonal projection before the norm.
_RIDGES = (0.0, *(10.0**power for power in range(-6, 5)))


def behind_norm(piece: Piece, base: Base) -> Holding | None:
    writer = piece.writer
    if not base.approximate or piece.part != "weight" or writer is None or not writer.block.inner:
        return None
    norm = base.checkpoint.read(writer.tensor).double() + writer.weight.offset
    folded = _folded(piece.affine.without_shift(), norm)
    edits = []
    for inner in base.inner(writer):
        edits.append(base.edit(inner.tensor, folded, inner.weight.axis))
        if inner.bias is not None:
            edits.append(base.edit(inner.bias, folded, axis=-1))
    if not edits:
        raise NotFoldable(f"the checkpoint has none of the tensors that {writer.tensor} normalises")
    return Holding(tuple(edits), approximate=True, note="an approximation: the norm behind the edit divides by less")


def _folded(affine: Affine, norm: Tensor) -> Affine:
    """``A`` and ``B`` for the weight ``norm`` (D): of a family between the two ends, the one with the least error.

    ``A`` minimises ``|D A - L|^2 + mu |A|^2`` under ``B^T A = R^T L``. The error is that expected for ``y`` without a
    preferred direction: across the intervention ``|(D A - L) B^T|^2``, and by the change of ``rms(y)``
    ``(|A B^T|^2 + 2 A.B)^2 |D|^2 / 4 d^2``.
    """
    left, right, d = affine.left.double(), affine.right.double(), norm[:, None]
    before, kept = d * right, product(right, left)
    best, least = left, float("inf")
    for ridge in _RIDGES:
        pull = d / (d.square() + ridge * d.square().mean()).clamp_min(torch.finfo(torch.float64).tiny)
        free, toward = pull * left, pull * right
        found = free + toward @ torch.linalg.solve(product(before, toward), kept - product(before, free))
        louder = _square(found, before) + 2 * float((found * before).sum())
        error = _square(d * found - left, before) + (louder / len(norm)) ** 2 * float(norm.square().sum()) / 4
        if error < least:
            best, least = found, error
    return replace(affine, left=best.float(), right=before.float())


def _square(left: Tensor, right: Tensor) -> float:
    """``|L R^T|^2``, the sum of squares."""
    return float((product(left, left) * product(right, right)).sum())
