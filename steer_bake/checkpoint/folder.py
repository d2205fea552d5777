"""Opening a checkpoint: config, index and headers validated, no weights in memory; they may be on the hub."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .header import (
    FLOATS,
    MAX_HEADER,
    TORCH_DTYPES,
    Header,
    TensorInfo,
    json_object,
    open_regular,
    read_header,
)
from .remote import SMALL, RemoteFiles

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

#: A plain name in the folder itself: no separator of any system, nothing that could climb out.
_SHARD_NAME = re.compile(r"[^/\\:\x00-\x1f]+\.safetensors", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened, validated folder; no weights in memory."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]  # by name, in the order of files and bytes
    files: tuple[str, ...]  # the safetensors files, sorted by name
    headers: dict[str, Header]  # by file
    index_metadata: dict[str, Any]  # of the index; empty for a one-file checkpoint
    remote: RemoteFiles | None = None  # where the safetensors files are, if not in the folder
    away: Mapping[str, str] = field(default_factory=dict)  # files that are the base's own and only there -> its name

    @classmethod
    def open(
        cls,
        folder: Path,
        remote: RemoteFiles | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Checkpoint:
        """Read and check ``config.json``, the index if there is one, and the header of every safetensors file.

        With ``remote`` the folder holds the JSON files only and the headers come from the hub, a few requests at a
        time; ``progress`` is then called with headers (done, total).

        Raises:
            CheckpointError: something is missing, damaged or unsafe; the message names the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json and the weights")
        if remote is None:
            check_complete(folder)
        config = _read_json(folder, CONFIG)
        if _is_there(folder, ONE_FILE, remote):  # as transformers does: the one file goes before an index
            weight_map: dict[str, str] = {}
            metadata: dict[str, Any] = {}
            files: tuple[str, ...] = (ONE_FILE,)
        elif os.path.lexists(folder / INDEX):
            weight_map, metadata = _index(folder)
            files = tuple(sorted(set(weight_map.values())))
        elif remote is not None:
            raise CheckpointError(_no_weights(remote.name, remote.sizes))
        else:
            raise CheckpointError(_no_weights(str(folder), os.listdir(folder)))
        if remote is None:
            headers = {file: _header(folder, file) for file in files}
        else:
            for file in files:
                if file not in remote.sizes:
                    raise CheckpointError(f"{file} is missing in {remote.name}, though its index names it; use another")
            headers = remote.headers(files, progress)
        return cls(folder, config, _checked_tensors(folder, headers, weight_map), files, headers, metadata, remote)

    @classmethod
    def open_beside(cls, folder: Path, base: Checkpoint, away: Mapping[str, str]) -> Checkpoint:
        """A folder some of whose files are only in ``base``: of those (``away``: name here -> name there) the headers
        are the base's. Everything else is checked as by :meth:`open`.

        Raises:
            CheckpointError: something is missing, damaged or unsafe; the message names the file.
        """
        config = _read_json(folder, CONFIG)
        weight_map, metadata = _index(folder)
        files = tuple(sorted(set(weight_map.values())))
        headers = {}
        for file in files:
            if file in away and away[file] in base.headers:
                theirs = base.headers[away[file]]
                headers[file] = replace(theirs, tensors=tuple(replace(one, file=file) for one in theirs.tensors))
            else:
                headers[file] = _header(folder, file)
        return cls(
            folder, config, _checked_tensors(folder, headers, weight_map), files, headers, metadata, away=dict(away)
        )  # fmt: skip

    @property
    def name(self) -> str:
        """How messages call it: the folder, or the model on the hub that was left there."""
        return str(self.folder) if self.remote is None else self.remote.name

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor (raises CheckpointError where there is none of that name)."""
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            raise CheckpointError(
                f"{self.name} has no tensor {name!r}"
                + (
                    f"; did you mean {close[0]!r}?"
                    if close
                    else f" among its {len(self.tensors)}; is it the right base?"
                )
            )
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its own dtype and shape; of a remote file, its bytes alone are fetched.

        Raises:
            CheckpointError: there is no such tensor, its dtype has no torch equivalent, or the file has changed; of a
                remote file, it is larger than a bias or a norm.
        """
        info = self.info(name)
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"tensor {name!r} is stored as {info.dtype}, which torch cannot hold; use another base"
            )
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        if self.remote is not None:
            as_bytes(buffer)[:] = self._fetch(self.remote, info)
            return buffer.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)
        with open_regular(self.folder / info.file) as file:
            read_exactly(file.fileno(), buffer, info.start, info.file)
        return buffer.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)

    def _fetch(self, remote: RemoteFiles, info: TensorInfo) -> bytes:
        if info.nbytes > SMALL:
            raise CheckpointError(
                f"tensor {info.name!r} of {self.name} is {info.nbytes:,} bytes, and the weights were left on the hub; "
                f"download them first: hf download {remote.hub_id} --revision {remote.commit}"
            )
        return remote.fetch(info.file, info.start, info.nbytes)

    def size(self, file: str) -> int:
        """Bytes of a safetensors file: its header says it."""
        header = self.headers[file]
        return header.tensors[-1].end if header.tensors else header.start

    def header_hash(self, file: str) -> str:
        """sha256 of the header of ``file``: length prefix and JSON."""
        return self.headers[file].sha256

    @property
    def storage_dtype(self) -> str:
        """The floating dtype that holds most bytes: ``"BF16"``, ``"F16"``, ``"F32"`` or ``"F64"`` (F32 if none)."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in FLOATS:
                sizes[info.dtype] += info.nbytes
        return sizes.most_common(1)[0][0] if sizes else "F32"


def read_exactly(descriptor: int, buffer: Tensor, offset: int, name: str) -> None:
    """Fill ``buffer`` (uint8) from ``offset`` of an open file."""
    view = as_bytes(buffer)
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointError(f"{name} became shorter while it was read; is something else writing there?")
        view, offset = view[count:], offset + count


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        with open_regular(folder / name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_HEADER:
                raise CheckpointError(f"{folder / name} is larger than {MAX_HEADER} bytes; that is no {name}")
            raw = file.read(size)  # not more: the buffer is allocated first
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {name}; give the folder of a whole checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
    return json_object(raw, str(folder / name))


def _index(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    path = folder / INDEX
    found = _read_json(folder, INDEX)
    weight_map, metadata = found.get("weight_map"), found.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise CheckpointError(f"{path} has no weight_map; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path} names the shard {file!r:.200}, which is no file name in the folder; do not use it"
            )
    return weight_map, metadata


def _header(folder: Path, file: str) -> Header:
    path = folder / file
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise CheckpointError(f"{path} is missing; download the checkpoint again, all of its shards")
    return read_header(path, file)


def _tensors(folder: Path, headers: dict[str, Header]) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for header in headers.values():
        for info in header.tensors:
            if info.name in found:  # loaders disagree about which of the two counts
                both = f"{found[info.name].file!r} and {info.file!r}"
                raise CheckpointError(f"{folder}: tensor {info.name!r} is in both {both}; save the checkpoint again")
            found[info.name] = info
    return found


def _checked_tensors(
    folder: Path, headers: dict[str, Header], weight_map: Mapping[str, str]
) -> dict[str, TensorInfo]:  # fmt: skip
    """The tensors of all files, each where the index says."""
    tensors = _tensors(folder, headers)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(f"{folder / INDEX}: tensor {name!r} is not in {file!r}; download both again")
    return tensors


def _is_there(folder: Path, file: str, remote: RemoteFiles | None) -> bool:
    return os.path.lexists(folder / file) if remote is None else file in remote.sizes


def check_complete(folder: Path) -> None:
    """Refuse a folder whose ``steering.json`` says that some of its shards are still on the hub, as long as they are.

    Raises:
        CheckpointError: the message names a shard, where it is, and how to come by it.
    """
    try:
        content = json.loads((folder / "steering.json").read_text(encoding="utf-8"))
        away = {} if content.get("complete", True) else {one["name"]: one.get("source") for one in content["files"]}
        base = content["base"]["name"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # not baked, or damaged: whoever needs the file says so
    missing = [name for name, source in away.items() if source and not os.path.exists(folder / name)]
    if missing:
        raise CheckpointError(
            f"{folder} is not complete: it was baked without downloading {base}, and {len(missing)} of its files are "
            f"only there ({missing[0]} is {away[missing[0]]} of the base). Complete it on the hub with: "
            "steer-bake push --from-base, or bake again without --no-download"
        )


def _no_weights(name: str, files: Iterable[str]) -> str:
    endings = {os.path.splitext(file)[1] for file in files}
    if endings & {".bin", ".pt", ".pth"}:
        return (
            f"{name} holds its weights as pickle files (.bin, .pt), which can run code and are not read; convert: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    if ".gguf" in endings:
        return f"{name} holds GGUF files; bake the original checkpoint (safetensors) and convert the result"
    return f"{name} has neither {ONE_FILE} nor {INDEX}; give the folder of a whole checkpoint"
