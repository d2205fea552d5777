"""What a bake keeps of its base, so that it can be undone: what nobody could work out from the folder alone.

Small things are kept whole, in ``steering.safetensors``: the texts of config and index, the headers of weight files
that got another one, edited vectors (native biases), and both steering files of a base that was baked itself. Of edited
matrices nothing is kept: their bytes are the base's. ``steering.json`` lists the base's weight files and their hashes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, Edit, FileRecord
from .checkpoint.carry import lfs_sha256
from .checkpoint.folder import CONFIG, INDEX, ONE_FILE
from .checkpoint.header import MAX_HEADER

#: What a baked folder says of itself; the manifest writes and reads both.
JSON_FILE, VECTORS_FILE = "steering.json", "steering.safetensors"

#: How an edited tensor of the base comes back.
KEPT = "kept"  # it lies in steering.safetensors
GROWN = "grown"  # the baked tensor begins with it, along every axis
FROM_BASE = "base"  # only the base has it


@dataclass(frozen=True)
class BaseFile:
    """A weight file of the base, and the file of the baked folder that stands for it."""

    name: str
    baked: str
    size: int  # bytes
    header_hash: str
    lfs_sha256: str | None  # of files out of a hub cache: the sha256 of the whole file


@dataclass(frozen=True, eq=False)
class Originals:
    """All that is kept."""

    files: tuple[BaseFile, ...]  # in the base's order
    edited: Mapping[str, str]  # of the base's edited tensors, by its own names: KEPT, GROWN or FROM_BASE
    rename: Mapping[str, str]  # the base's name of a tensor -> its name in the baked folder
    vectors: Mapping[str, Tensor]  # the kept tensors, by the base's names
    texts: Mapping[str, bytes]  # the base's config.json, index, steering files by name; headers as "header.<file>"

    @property
    def needs_base(self) -> bool:
        return FROM_BASE in self.edited.values()

    def listing(self) -> list[dict[str, Any]]:
        """For ``steering.json``."""
        return [asdict(file) for file in self.files]

    def tensors(self) -> dict[str, Tensor]:
        """For ``steering.safetensors``."""
        names = json.dumps({"edited": dict(self.edited), "rename": dict(self.rename)}).encode()
        texts = {"tensors": names, **self.texts}
        packed = {
            f"undo.{name}": torch.frombuffer(bytearray(zlib.compress(text)), dtype=torch.uint8)
            for name, text in texts.items()
        }
        return packed | {f"original.{name}": tensor.contiguous() for name, tensor in self.vectors.items()}

    @classmethod
    def read(cls, listing: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> Originals:
        """What :meth:`listing` and :meth:`tensors` gave.

        Raises:
            ValueError, KeyError, TypeError: it is not that.
        """
        texts = {name[5:]: _unpacked(tensor) for name, tensor in tensors.items() if name.startswith("undo.")}
        names = json.loads(texts.pop("tensors"))
        for name in [*texts, *(one["name"] for one in listing)]:
            if Path(name).name != name:
                raise ValueError(f"{name!r} is no file of the folder")
        vectors = {name[9:]: tensor for name, tensor in tensors.items() if name.startswith("original.")}
        return cls(tuple(BaseFile(**one) for one in listing), names["edited"], names["rename"], vectors, texts)


def keep(
    base: Checkpoint,
    edits: Sequence[Edit],
    records: Sequence[FileRecord],
    rename: Mapping[str, str] | None = None,
    dropped: Sequence[str] = (),
) -> Originals:
    """What must be kept of ``base`` to undo ``edits`` after they were written as ``records``.

    ``rename`` and ``dropped`` are those of :func:`checkpoint.write_edited`.
    """
    new_names, by_name = dict(rename or {}), {edit.tensor: edit for edit in edits}
    pairs = [(name, by_name.get(new_names.get(name, name))) for name in base.tensors]
    edited = {name: _way_back(base, name, edit) for name, edit in pairs if edit is not None}
    edited |= dict.fromkeys(dropped, FROM_BASE)
    vectors = {name: base.read(name) for name, way in edited.items() if way == KEPT}
    kept = [CONFIG, *([INDEX] if base.files != (ONE_FILE,) else []), JSON_FILE, VECTORS_FILE]
    texts = {name: (base.folder / name).read_bytes() for name in kept if (base.folder / name).is_file()}
    files = []
    weights = [record for record in records if record.header_hash is not None]
    for name, record in zip(base.files, weights, strict=False):  # a file of new tensors comes after the base's own
        path, header = base.folder / name, base.headers[name]
        if record.header_hash != header.sha256:
            with open(path, "rb") as file:
                texts[f"header.{name}"] = file.read(header.start)
        lfs = base.remote.lfs_sha256.get(name) if base.remote else lfs_sha256(path)
        files.append(BaseFile(name, record.name, base.size(name), header.sha256, lfs))
    return Originals(tuple(files), edited, new_names, vectors, texts)


def _way_back(base: Checkpoint, name: str, edit: Edit) -> str:
    info = base.tensors[name]
    if edit.affine.is_identity and edit.source == name and edit.dtype == info.dtype:
        return GROWN
    return KEPT if len(info.shape) == 1 else FROM_BASE


def _unpacked(tensor: Tensor) -> bytes:
    inflater = zlib.decompressobj()
    text = inflater.decompress(tensor.numpy().tobytes(), MAX_HEADER)  # not more: a few bytes can inflate to any size
    if not inflater.eof:
        raise ValueError(f"a kept text does not end within {MAX_HEADER} bytes")
    return text
