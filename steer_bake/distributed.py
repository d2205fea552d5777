"""Several processes under ``torchrun``, each with a share of the prompts; what they sum up is added together.

A process alone needs nothing of this: its share is everything and sums stay as they are. Gloo (CPU) is tested; nccl is
chosen where the model is on CUDA and is untested.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ExtractionError

# A process that failed is missed by the others after so long (torchrun itself ends them at once).
_PATIENCE = timedelta(minutes=30)


def is_launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Be one of the processes that torchrun started; yields this process's own device.

    Raises:
        ExtractionError: the processes do not find each other.
    """
    if not is_launched() or dist.is_initialized():
        yield device
        return
    cuda = device == "cuda"
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else device
    if cuda:
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise ExtractionError(
            f"the processes that torchrun started do not find each other: {error}; on one machine start them with "
            "torchrun --standalone --nproc-per-node N -m steer_bake ..."
        ) from error
    try:
        yield own
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(count: int) -> list[int]:
    """The indices below ``count`` that fall to this process; together the processes have each of them once."""
    return list(range(rank(), count, dist.get_world_size() if dist.is_initialized() else 1))


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; all must come with the same shapes and order."""
    if not dist.is_initialized():
        return
    for tensor in tensors:
        # gloo adds up what is on the CPU, nccl what is on a GPU
        moved = tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()
        dist.all_reduce(moved)
        tensor.copy_(moved)


def gather(text: str) -> list[str]:
    """What each process says, in the order of their ranks; every process must call it."""
    if not dist.is_initialized():
        return [text]
    said = torch.tensor(list(text.encode()), dtype=torch.uint8)
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    sizes[rank()] = len(said)
    add_up([sizes])
    rows = torch.zeros(len(sizes), int(sizes.max()), dtype=torch.uint8)
    rows[rank(), : len(said)] = said
    add_up([rows])
    return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes.tolist(), strict=True)]
