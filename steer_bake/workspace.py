"""Memory that is used again and again: fresh pages cost more than the arithmetic done in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Workspace:
    """The buffers of one thread."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, use: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with arbitrary content, in the memory that an earlier one for the same ``use`` had."""
        size = math.prod(shape) * dtype.itemsize
        if use not in self._buffers or self._buffers[use].shape[0] < size:
            self._buffers[use] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[use][:size].view(dtype).reshape(shape)
