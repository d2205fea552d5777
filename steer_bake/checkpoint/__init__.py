"""Checkpoints on disk: open one, write an edited copy of it, publish that copy complete or not at all.

    base = Checkpoint.open(folder)
    with publish(out) as fresh:
        write_edited(base, edits, fresh, config_changes={})

Untouched shards are linked, touched ones streamed, new tensors go into one extra shard. The parts, lowest first:

    header      the file format, read without trust
    remote      files that stay on the hub, read by ranges
    folder      Checkpoint: a validated folder
    edit        Edit: what becomes of a tensor
    pieces      its arithmetic, in bounded pieces
    publishing  complete at its path or not at all
    pipeline    the pieces on two cores
    carry       linked shards and the small files that go along
    writing     which file of the output holds what
"""

from __future__ import annotations

from .carry import CARRIED, FileRecord, goes_along
from .edit import Appended, Diagonal, Edit, Rows
from .folder import CONFIG, INDEX, Checkpoint, check_complete
from .header import TensorInfo
from .pieces import recompute
from .publishing import check_outside, check_room, publish
from .remote import RemoteFiles
from .writing import check_no_weights, write_edited

__all__ = [
    "CARRIED",
    "CONFIG",
    "INDEX",
    "Appended",
    "Checkpoint",
    "Diagonal",
    "Edit",
    "FileRecord",
    "RemoteFiles",
    "Rows",
    "TensorInfo",
    "check_complete",
    "check_no_weights",
    "check_outside",
    "check_room",
    "goes_along",
    "publish",
    "recompute",
    "write_edited",
]
