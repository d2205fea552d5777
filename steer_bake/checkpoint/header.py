"""safetensors headers: read without trusting a byte of them, and written.

A safetensors file is an 8-byte little-endian length, a JSON header of that length (padded with spaces where that is
handy) and the bytes of the tensors, which fill the rest of the file without hole or overlap.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError

#: The format's own limit; it also bounds what reading a hostile file can cost.
MAX_HEADER = 100_000_000

#: Bits per element of every dtype of the format.
DTYPE_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}

#: The dtypes that an edit can be stored in; everything else is called quantised.
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes ``start`` to ``end`` of ``file``, counted from the beginning of the file."""

    name: str
    dtype: str  # safetensors spelling: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A validated header; ``tensors`` are in the order of their bytes."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    start: int  # of the data: 8 + length of the JSON
    sha256: str  # of the length prefix and the JSON


def read_header(path: Path, name: str | None = None) -> Header:
    """The header of the safetensors file ``path``, called ``name`` in its tensors and in messages.

    Raises:
        CheckpointError: missing, unreadable, truncated, or not a well-formed safetensors file.
    """
    name = path.name if name is None else name
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            return parse_header(prefix + file.read(header_length(prefix, size, name)), size, name)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); download it again or fix it") from error


def open_regular(path: Path) -> BinaryIO:
    """Open for reading, refusing what could block for ever (a pipe, a device)."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"{path} is not a regular file; put the real file there")
    return open(path, "rb")


def header_length(prefix: bytes, size: int, name: str) -> int:
    """The length that the first 8 bytes of a file of ``size`` bytes announce, if it is a possible one."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > MAX_HEADER or 8 + length > size:
        raise _damaged(name, f"its header would be {length} bytes in a file of {size}")
    return length


def parse_header(raw: bytes, size: int, name: str) -> Header:
    """The header ``raw`` (length prefix and JSON) of a file of ``size`` bytes; raises as :func:`read_header` does."""
    start = 8 + header_length(raw[:8], size, name)
    if len(raw) < start:
        raise _damaged(name, "it ends inside its header")
    found = json_object(raw[8:start], name)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(name, "its metadata is not a table of strings")
    tensors = [_tensor(key, value, start, size, name) for key, value in found.items()]
    tensors.sort(key=lambda info: (info.start, info.end))
    position = start
    for info in tensors:
        if info.start != position:
            raise _damaged(name, f"there is a hole or an overlap before tensor {info.name!r}")
        position = info.end
    if position != size:
        raise _damaged(name, f"its tensors end at byte {position} of {size}")
    return Header(tuple(tensors), metadata, start, hashlib.sha256(raw[:start]).hexdigest())


def json_object(raw: bytes, name: str) -> dict[str, Any]:
    """``raw`` as a JSON object without duplicate keys.

    Raises:
        CheckpointError: it is anything else, or nested so deeply that no reader copes.
    """
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_bounded_int)
    except RecursionError:
        raise _damaged(name, "its JSON is nested too deeply") from None
    except ValueError as error:
        raise _damaged(name, f"its JSON is not readable: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise _damaged(name, "its JSON is not an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    for key in found:
        key.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return found


def _bounded_int(text: str) -> int:
    if len(text) > 20:  # more than any 64-bit number; parsing a million digits takes for ever
        raise ValueError("a number is too long")
    return int(text)


def _tensor(key: str, value: object, start: int, size: int, name: str) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(name, f"the entry of tensor {key!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{name}: tensor {key!r} has the unknown dtype {dtype!r:.40}; update steer-bake")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(name, f"shape or offsets of tensor {key!r} are not lists of whole numbers")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise _damaged(name, f"tensor {key!r} lies outside the file (is the download complete?)")
    if _bits(shape, DTYPE_BITS[dtype], limit=8 * size) != 8 * (end - begin):
        raise _damaged(name, f"the bytes of tensor {key!r} do not match its shape and dtype")
    return TensorInfo(key, dtype, tuple(shape), name, start + begin, start + end)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)  # a bool is no number here


def _bits(shape: Sequence[int], bits: int, limit: int) -> int:
    """The product, or something above ``limit``: thousands of huge factors are not multiplied out."""
    if 0 in shape:
        return 0
    for size in shape:
        bits *= size
        if bits > limit:
            break
    return bits


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return bits // 8


def pack_header(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, str], like: int = 0
) -> tuple[bytes, list[TensorInfo]]:
    """The header of a file that holds ``tensors`` in this order, and the tensors with their new byte ranges.

    Only name, dtype, shape and file of ``tensors`` are read. The data begin at a multiple of 8, and at the same offset
    into a 4096-byte block as byte ``like``: file systems that can share blocks then share them.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for info in tensors:
        end = position + nbytes(info.dtype, info.shape)
        table[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    period = 4096 if like else 8
    text += b" " * ((like - 8 - len(text)) % period)
    start, placed = 8 + len(text), []
    for info in tensors:
        end = start + nbytes(info.dtype, info.shape)
        placed.append(TensorInfo(info.name, info.dtype, info.shape, info.file, start, end))
        start = end
    return len(text).to_bytes(8, "little") + text, placed


def _damaged(name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{name} is damaged: {why}; download or copy it again")
