"""The base again, out of a baked folder: the same bytes in every weight file, in config, index and what goes along.

New biases, config flags, edited native biases and everything a growing bake added come off with what the folder itself
keeps. An edited matrix does not: rounding forgets. Such a weight file is the base's own, which is linked. What was put
together is audited before it appears at its path: the folder must be exactly this base plus its plan.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import manifest
from .audit import Audit, audit
from .checkpoint import Checkpoint, check_room, publish
from .checkpoint.carry import place
from .checkpoint.folder import CONFIG, INDEX, as_bytes
from .checkpoint.header import Header, TensorInfo, parse_header
from .checkpoint.pieces import Copy
from .checkpoint.pipeline import copy_range
from .checks import require
from .contents import check_files, check_others, places, sha256
from .errors import CheckpointError, ValidationFailed
from .manifest import Manifest
from .originals import FROM_BASE, GROWN, KEPT, BaseFile, Originals
from .plan import CHECKPOINT

Progress = Callable[[int, int], None]

#: How a file comes back.
SAME = "linked to the baked folder's"
REBUILT = "rebuilt from the baked folder"
BASES = "linked to the base's"
COPIED = "copied from the baked folder"
STORED = "as steering.safetensors keeps it"


@dataclass(frozen=True)
class Step:
    """One file of the base, and where it comes from."""

    name: str
    how: str


@dataclass(frozen=True)
class Undone:
    """What was done."""

    folder: str
    out: str
    steps: tuple[Step, ...]
    unproven: Mapping[str, str]  # weight files whose bytes were taken from the baked folder unread, and why
    audit: Audit  # of the baked folder against what was written

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def needs_base(folder: Path) -> bool:
    """Whether ``folder`` cannot be undone from what it keeps itself.

    Raises:
        CheckpointError: it was not baked by steer-bake, or its manifest is damaged.
    """
    return manifest.read(folder).originals.needs_base


def steps(folder: Path, *, with_base: bool) -> list[Step]:
    """What :func:`unbake` will do, with or without the base at hand; nothing is read but headers.

    Raises:
        CheckpointError: the manifest does not say how, or the base is needed.
    """
    told = manifest.read(folder)
    if told.target != CHECKPOINT:
        raise CheckpointError(
            f"{folder} goes beside its base, which was never changed: there is nothing to undo, just do not load it"
        )
    if told.originals.needs_base and not with_base:
        name = next(name for name, way in told.originals.edited.items() if way == FROM_BASE)
        raise CheckpointError(
            f"{folder} has edited matrices ({name}), which only the base has unedited; name it with --base"
        )
    headers = _original_headers(Checkpoint.open(folder), told.originals)
    weights = [
        Step(file.name, _way(headers[file.name], file, told.originals, with_base)) for file in told.originals.files
    ]
    carried = [Step(str(path.relative_to(folder)), COPIED) for path in _carried(folder, told)]
    return [*weights, *carried, *(Step(name, STORED) for name in _stored(told.originals))]


def unbake(
    folder: Path,
    out: Path,
    base: Checkpoint | None = None,
    *,
    hash_files: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Undone:
    """Write the base of the baked ``folder`` to ``out``, bit for bit. A stacked bake is undone by one layer.

    Args:
        base: needed where a matrix was edited (:func:`needs_base`). Where it is given its weight files are linked, all
            of them: nothing then rests on what the baked folder holds.
        hash_files: also read files that are only linked, and compare their recorded hashes.
        progress: called with bytes (done, total) of the closing audit.

    Raises:
        ValidationFailed: the folder is not what a bake wrote, or not the base that is put together plus its plan.
        CheckpointError: the base is needed and not given, or ``out`` is in the way or cannot be written.
    """
    for model in (folder, *([base.folder] if base else [])):
        if out.resolve() == model.resolve() or model.resolve() in out.resolve().parents:
            raise CheckpointError(f"{out} lies in the model's own folder; choose a place outside {model}")
    planned = steps(folder, with_base=base is not None)
    told, found = manifest.read(folder), Checkpoint.open(folder)
    require(str(folder), [check_files(folder, None, told.files), check_others(folder, told.files)])
    if base is not None:
        _check_base(base, told.originals)
    with publish(out, overwrite=overwrite) as fresh:
        rebuild(found, told.originals, base, fresh, _recorded_hashes(told))
        for path in _carried(folder, told):
            target = fresh / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
        again = Checkpoint.open(fresh)
        _check_written(again, told.originals, hash_files)
        proof = audit(folder, again, hash_files=hash_files, progress=progress)
        proof.require()
    return Undone(str(folder), str(out), tuple(planned), _unproven(told, planned, hash_files), proof)


def rebuild(
    found: Checkpoint, kept: Originals, base: Checkpoint | None, out: Path, recorded: Mapping[str, str]
) -> None:
    """Write the base's weight files, config and index, and the steering files of a base that was baked, to ``out``.

    ``recorded``: sha256 of files of ``found`` where known; those whose bytes are used must have it.

    Raises:
        CheckpointError: ``found`` or ``base`` lacks something, or is not what was recorded.
    """
    headers = _original_headers(found, kept)
    for file in kept.files:
        header, raw = headers[file.name]
        way = _way(headers[file.name], file, kept, base is not None)
        if way == BASES:
            if base is None or file.name not in base.headers:
                raise CheckpointError(f"{file.name} can only come from the base, which does not have it; name the base")
            _link(base.folder / file.name, out / file.name)
        elif way == SAME:
            _link(found.folder / file.baked, out / file.name)
        else:
            sources = {_baked(found, kept, info).file for info in header.tensors if info.name not in kept.vectors}
            for source in sorted(sources):
                if source in recorded and sha256(found.folder / source) != recorded[source]:
                    raise ValidationFailed(f"{found.folder / source} is not the file that was written (another sha256)")
            check_room(out, file.size)
            _write(found, kept, header, raw, out / file.name)
    for name in _stored(kept):
        (out / name).write_bytes(kept.texts[name])


def _original_headers(found: Checkpoint, kept: Originals) -> dict[str, tuple[Header, bytes]]:
    """The header of each of the base's weight files, parsed and as bytes."""
    headers = {}
    for file in kept.files:
        raw = kept.texts.get(f"header.{file.name}")
        if raw is None:
            if file.baked not in found.headers:
                raise CheckpointError(f"{found.folder} has no {file.baked}, which stands for the base's {file.name}")
            with open(found.folder / file.baked, "rb") as handle:
                raw = handle.read(found.headers[file.baked].start)
        header = parse_header(raw, file.size, file.name)
        if header.sha256 != file.header_hash:
            raise ValidationFailed(f"the header of {file.baked} is not that of the base's {file.name}; was it changed?")
        headers[file.name] = header, raw
    return headers


def _way(header: tuple[Header, bytes], file: BaseFile, kept: Originals, with_base: bool) -> str:
    ways = {kept.edited.get(info.name) for info in header[0].tensors}
    if with_base or FROM_BASE in ways:
        return BASES
    return REBUILT if ways & {KEPT, GROWN} or f"header.{file.name}" in kept.texts else SAME


def _unproven(told: Manifest, planned: Sequence[Step], hash_files: bool) -> dict[str, str]:
    """A file that is linked to the baked folder's is compared with nothing but its recorded hash."""
    hashes, ways = _recorded_hashes(told), {step.name: step.how for step in planned}
    found = {}
    for file in told.originals.files:
        if ways[file.name] in (SAME, REBUILT) and file.baked not in hashes:
            found[file.name] = "no hash of it was recorded; the base itself, with --base, is the proof"
        elif ways[file.name] == SAME and not hash_files:
            found[file.name] = "its recorded hash was not compared; --hash does"
    return found


def _stored(kept: Originals) -> list[str]:
    return [name for name in (CONFIG, INDEX, manifest.JSON_FILE, manifest.VECTORS_FILE) if name in kept.texts]


def _carried(folder: Path, told: Manifest) -> list[Path]:
    return [path for one in told.files if one.how == "copied" and not one.header_hash for path in places(folder, one)]


def _recorded_hashes(told: Manifest) -> dict[str, str]:
    known = {record.name: record.sha256 or record.lfs_sha256 for record in told.files}
    return {name: digest for name, digest in known.items() if digest is not None}


def _link(source: Path, target: Path) -> None:
    if place(source, target) is not None:
        return
    size = source.stat().st_size
    check_room(target.parent, size)
    with open(target, "xb") as file:
        copy_range(Copy(source, 0, 0, size), file.fileno())


def _write(found: Checkpoint, kept: Originals, header: Header, raw: bytes, path: Path) -> None:
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        for info in header.tensors:
            for job in _pieces(found, kept, info):
                if isinstance(job, Copy):
                    copy_range(job, file.fileno())
                else:
                    os.pwrite(file.fileno(), as_bytes(job), info.start)


def _pieces(found: Checkpoint, kept: Originals, info: TensorInfo) -> Iterator[Copy | Tensor]:
    """The bytes of the base's tensor ``info``: a stretch of a baked file, or a tensor."""
    if info.name in kept.vectors:
        vector = kept.vectors[info.name]
        if vector.nbytes != info.nbytes:
            raise CheckpointError(f"the kept {info.name} has {vector.nbytes} bytes, the base's has {info.nbytes}")
        yield vector.contiguous()
        return
    now = _baked(found, kept, info)
    fits = now.dtype == info.dtype and len(now.shape) == len(info.shape)
    grown = kept.edited.get(info.name) == GROWN
    if not fits or any(new < old or (new > old and not grown) for new, old in zip(now.shape, info.shape, strict=True)):
        raise CheckpointError(
            f"{now.name} is {now.dtype} {list(now.shape)}, which cannot hold the base's {info.dtype} {list(info.shape)}"
        )
    path = found.folder / now.file
    if now.shape[1:] == info.shape[1:]:  # whole rows are a stretch of bytes
        yield Copy(path, now.start, info.start, info.nbytes)
        return
    whole = found.read(now.name)
    for axis, size in enumerate(info.shape):
        whole = whole.narrow(axis, 0, size)
    yield whole.contiguous()


def _baked(found: Checkpoint, kept: Originals, info: TensorInfo) -> TensorInfo:
    return found.info(kept.rename.get(info.name, info.name))


def _check_base(base: Checkpoint, kept: Originals) -> None:
    wrong = [
        file.name
        for file in kept.files
        if file.name not in base.headers or base.header_hash(file.name) != file.header_hash
    ]
    wrong += [name for name in _stored(kept) if name in (CONFIG, INDEX) and not _holds(base.folder / name, kept, name)]
    if wrong:
        raise CheckpointError(
            f"{base.folder} is not the base: its {wrong[0]} is missing or another one; name the right one with --base"
        )


def _holds(path: Path, kept: Originals, name: str) -> bool:
    return path.is_file() and path.read_bytes() == kept.texts[name]


def _check_written(again: Checkpoint, kept: Originals, hash_files: bool) -> None:
    """Header hashes, and the hub's sha256 where it is known; of linked files only where reading them was asked for."""
    for file in kept.files:
        path = again.folder / file.name
        if again.header_hash(file.name) != file.header_hash or path.stat().st_size != file.size:
            raise ValidationFailed(f"{file.name} did not come back as it was (header or size); nothing was written")
        linked = path.stat().st_nlink > 1
        if file.lfs_sha256 and (hash_files or not linked) and sha256(path) != file.lfs_sha256:
            raise ValidationFailed(f"{file.name} is not the hub's file of that name (sha256); nothing was written")
