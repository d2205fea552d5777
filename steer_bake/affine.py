"""The one place with algebra: the affine map ``h -> h + L(R^T h) + shift`` and its composition.

The hook applies it to activations and the bake applies it to the tensors that write them, along the residual axis:
-1 for activations ``[batch, seq, d]``, 0 for a Linear weight or bias, 1 for a Conv1D weight or an embedding table.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Affine:
    """``h -> h + left (right^T h) + shift`` on vectors of the residual stream.

    All three are float32. ``k`` is the rank of the linear part and is 0 for a pure shift.
    """

    left: Tensor  # [d, k]
    right: Tensor  # [d, k]
    shift: Tensor  # [d]

    def __post_init__(self) -> None:
        for name in ("left", "right", "shift"):
            object.__setattr__(self, name, getattr(self, name).float())

    @classmethod
    def identity(cls, width: int) -> Affine:
        """The map that changes nothing, on vectors of ``width`` components."""
        return cls(torch.zeros(width, 0), torch.zeros(width, 0), torch.zeros(width))

    @property
    def width(self) -> int:
        return self.shift.shape[0]

    @property
    def is_linear(self) -> bool:
        """True where there is a linear part beside the identity."""
        return bool((self.left != 0).any() and (self.right != 0).any())

    @property
    def has_shift(self) -> bool:
        return bool((self.shift != 0).any())

    @property
    def is_identity(self) -> bool:
        return not self.is_linear and not self.has_shift

    def linear(self, x: Tensor, axis: int = -1) -> Tensor:
        """``L(R^T x)`` along ``axis``; same shape as ``x``, in the dtype of ``x``."""
        left, right = self.left.to(x), self.right.to(x)
        if x.ndim == 2 and axis == 0:  # the layout of a Linear weight: no transposed copy of a large matrix
            return left @ (right.T @ x)
        moved = x.movedim(axis, -1)
        return ((moved @ right) @ left.T).movedim(-1, axis)

    def __call__(self, x: Tensor, axis: int = -1) -> Tensor:
        """``x + L(R^T x) + shift`` along ``axis``; same shape and dtype as ``x``."""
        out = x + self.linear(x, axis) if self.left.shape[1] else x.clone()
        if self.has_shift:
            shape = [1] * x.ndim
            shape[axis] = -1
            out += self.shift.to(x).reshape(shape)
        return out

    def then(self, other: Affine) -> Affine:
        """The map ``h -> other(self(h))``.

        Expanding ``(I + L2 R2^T)((I + L1 R1^T) h + s1) + s2`` gives left ``[L1, L2]``, right ``[R1, R2 + R1 L1^T R2]``
        and shift ``s1 + L2 R2^T s1 + s2``.
        """
        right = other.right + product(self.right.T, product(self.left, other.right))
        moved = product(other.left.T, product(other.right, self.shift[:, None]))[:, 0]
        return Affine(
            torch.cat([self.left, other.left], dim=1),
            torch.cat([self.right, right], dim=1),
            self.shift + moved + other.shift,
        )

    def without_shift(self) -> Affine:
        return replace(self, shift=torch.zeros_like(self.shift))

    def without_linear(self) -> Affine:
        return replace(self, left=self.left[:, :0], right=self.right[:, :0])

    def divided_by(self, scale: float) -> Affine:
        """The same map for a tensor whose output is multiplied by ``scale`` before it reaches the stream."""
        return replace(self, shift=self.shift / scale)

    def fixed_functionals(self, tolerance: float = 1e-4) -> Tensor:
        """Unit vectors ``u`` with ``u^T (h + L R^T h) = 0`` for every ``h``: what an ablation removes. ``[d, m]``.

        They lie in the span of ``right``: ``u = R a`` with ``(I + L^T R) a = 0``.
        """
        rank = self.left.shape[1]
        if rank == 0:
            return self.left
        kernel = torch.eye(rank, dtype=torch.float64) + self.left.double().T @ self.right.double()
        _, sizes, rows = torch.linalg.svd(kernel)
        vectors = self.right.double() @ rows[sizes < tolerance].T
        lengths = vectors.norm(dim=0)
        kept: Tensor = vectors[:, lengths > tolerance] / lengths[lengths > tolerance]
        return kept.float()


def compose(affines: Iterable[Affine], width: int) -> Affine:
    """``affines`` applied one after another, first to last; the identity where there are none."""
    out = Affine.identity(width)
    for affine in affines:
        out = out.then(affine)
    return out


def product(one: Tensor, other: Tensor) -> Tensor:
    """``one^T other``, summed in an order that depends on nothing but the length: a plan is the same at any threads."""
    terms = one[:, :, None] * other[:, None, :]
    while len(terms) > 1:
        half = len(terms) // 2
        terms = torch.cat([terms[:half] + terms[half : 2 * half], terms[2 * half :]])
    return terms[0] if len(terms) else one.new_zeros(one.shape[1], other.shape[1])
