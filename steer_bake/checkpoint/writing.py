"""Which file of the output holds what: untouched shards linked, touched ones streamed, new tensors in an extra one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .carry import FileRecord, carry, lfs_sha256, place, write_json
from .edit import Edit, check_edit
from .folder import CONFIG, INDEX, ONE_FILE, Checkpoint
from .header import DTYPE_BITS, FLOATS, TensorInfo, pack_header
from .pieces import Block, Copy, Slab, pieces
from .pipeline import NewFile, write_files
from .publishing import cannot_write, check_room


def write_edited(
    base: Checkpoint,
    edits: Sequence[Edit],
    folder: Path,
    *,
    config_changes: Mapping[str, Any],
    dtype: str | None = None,
    rename: Mapping[str, str] | None = None,
    dropped: Sequence[str] = (),
    protect: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[FileRecord]:
    """Fill the empty folder ``folder`` with ``base`` plus ``edits``: a whole checkpoint, with the base's other files.

    Of a base whose weights were left on the hub, its shards are recorded and not written.

    Args:
        config_changes: merged into ``config.json``, tables within tables too.
        dtype: store edited and new tensors in this dtype instead of their own; untouched ones stay as they are.
        rename: new names of tensors of the base (layers behind an inserted one); edits go by the new names, their
            sources by the old. Files without a renamed or edited tensor are linked.
        dropped: tensors of the base that the output does not have under any name (their parts may be edits).
        protect: round such that errors cancel along what an edit removes; otherwise each element to nearest.
        progress: called with bytes (done, total).

    Returns:
        One record per file, in the order in which they were written; the index is the last.

    Raises:
        CheckpointError: an edit does not fit the base or needs weights that were left on the hub, or the folder cannot
            be written; what is in it then is of no use (:func:`publish` removes it).
    """
    if dtype is not None and dtype not in FLOATS:
        raise CheckpointError(f"edits cannot be stored as {dtype!r}; choose one of {', '.join(FLOATS)}")
    shards = _layout(base, edits, dict(rename or {}), dtype, dropped)
    if base.remote is not None:
        _check_untouched(base, shards)
    linked: dict[str, str] = {}
    new: list[NewFile] = []
    needed = 0
    try:
        for shard in shards:
            how = _place(base, shard, folder)
            if how is None:
                new.append(shard.new_file(base, folder, protect))
            else:
                linked[shard.name] = how
        needed = sum(file.size for file in new)
        check_room(folder, needed)
        hashes = write_files(new, progress)
        records = [_record(base, shard, linked.get(shard.name), folder, hashes) for shard in shards]
        records += carry(base.folder, folder)
        records.append(write_json(folder / CONFIG, _merged(base.config, config_changes)))
        if [shard.name for shard in shards] != [ONE_FILE]:
            records.append(write_json(folder / INDEX, _index(base, shards)))
    except OSError as error:
        raise cannot_write(error, folder, needed) from error
    return records


def check_no_weights(
    base: Checkpoint, edits: Sequence[Edit], rename: Mapping[str, str], dropped: Sequence[str] = ()
) -> None:
    """Refuse what needs more of ``base`` than its headers: all but tensors that are new and made from nothing.

    Raises:
        CheckpointError: the message names the tensor and the file that would have to be downloaded.
    """
    _check_untouched(base, _layout(base, edits, dict(rename), None, dropped))


def _check_untouched(base: Checkpoint, shards: Sequence[_Shard]) -> None:
    for shard in shards:
        rewritten = bool(shard.source) and not shard.untouched
        needed = next((edit for edit in shard.edits.values() if rewritten or edit.source is not None), None)
        if needed is None and not rewritten:
            continue
        what = f"a change of {needed.tensor!r}" if needed else "a renamed tensor"
        file = shard.source or base.tensors[str(needed and needed.source)].file
        raise CheckpointError(
            f"{what} needs the weights in {file} of {base.name} ({base.size(file):,} bytes): without them only new "
            "tensors can be written. Bake without --no-download"
        )


def _place(base: Checkpoint, shard: _Shard, folder: Path) -> str | None:
    """How an untouched shard came to be in ``folder``, or ``"remote"``; None where it has to be written."""
    if not shard.untouched:
        return None
    return "remote" if base.remote else place(base.folder / shard.source, folder / shard.name)


@dataclass(frozen=True, eq=False)
class _Shard:
    """One safetensors file of the output."""

    name: str
    source: str  # the base's file that it stands for; "" for the extra shard
    tensors: tuple[TensorInfo, ...]  # as they will lie in it
    header: bytes | None  # None: the base's own header
    edits: Mapping[str, Edit]
    names: Mapping[str, str]  # name in the output -> name in the base

    @property
    def untouched(self) -> bool:
        return bool(self.source) and self.header is None and not self.edits

    def new_file(self, base: Checkpoint, folder: Path, protect: bool) -> NewFile:
        header = self.header
        if header is None:
            with open(base.folder / self.source, "rb") as file:
                header = file.read(base.headers[self.source].start)
        size = self.tensors[-1].end if self.tensors else len(header)
        return NewFile(folder / self.name, header, size, list(_merge_copies(self._pieces(base, protect))))

    def _pieces(self, base: Checkpoint, protect: bool) -> Iterator[Copy | Slab | Block]:
        for info in self.tensors:
            edit = self.edits.get(info.name)
            if edit is not None:
                yield from pieces(base, edit, info.start, info.dtype, protect)
            else:
                found = base.tensors[self.names[info.name]]
                yield Copy(base.folder / found.file, found.start, info.start, found.nbytes)


def _merge_copies(jobs: Iterator[Copy | Slab | Block]) -> Iterator[Copy | Slab | Block]:
    """Neighbouring copies as one, then cut to the size that suits the pipeline."""
    run: Copy | None = None
    for job in jobs:
        if isinstance(job, Copy) and run is not None and _follows(job, run):
            run = replace(run, size=run.size + job.size)
            continue
        if run is not None:
            yield from run.split()
        run = job if isinstance(job, Copy) else None
        if run is None:
            yield job
    if run is not None:
        yield from run.split()


def _follows(job: Copy, run: Copy) -> bool:
    return (job.path, job.source, job.target) == (run.path, run.source + run.size, run.target + run.size)


def _layout(
    base: Checkpoint, edits: Sequence[Edit], rename: Mapping[str, str], dtype: str | None, dropped: Sequence[str]
) -> list[_Shard]:
    """The files of the output; every tensor in exactly one of them."""
    for edit in edits:
        check_edit(base, edit)
    for name in (*rename, *dropped):
        base.info(name)
    staying = [name for name in base.tensors if name not in set(dropped)]
    kept = {rename.get(name, name): name for name in staying}
    by_name = {edit.tensor: edit for edit in edits}
    twice = [name for name, count in Counter(edit.tensor for edit in edits).items() if count > 1]
    if twice or len(kept) < len(staying):
        raise CheckpointError(
            f"two edits or two renamed tensors would both be {(twice or ['one name'])[0]!r}; plan again"
        )
    fresh = [edit for edit in edits if edit.tensor not in kept]
    shards = [_shard(base, file, {v: k for k, v in kept.items()}, by_name, dtype) for file in base.files]
    if not fresh:
        return shards
    # Renumbering links costs nothing and no loader can take the new names for anything but shards.
    count = len(shards) + 1
    shards = [replace(shard, name=_numbered(index + 1, count)) for index, shard in enumerate(shards)]
    wanted = [TensorInfo(edit.tensor, dtype or edit.dtype, edit.shape, "", 0, 0) for edit in fresh]
    wanted.sort(key=lambda info: (-DTYPE_BITS[info.dtype], info.name))  # wide dtypes first keeps every tensor aligned
    header, tensors = pack_header(wanted, {"format": "pt"})
    return [
        *shards,
        _Shard(_numbered(count, count), "", tuple(tensors), header, {edit.tensor: edit for edit in fresh}, {}),
    ]


def _numbered(index: int, count: int) -> str:
    return f"model-{index:05d}-of-{count:05d}.safetensors"


def _shard(
    base: Checkpoint, file: str, new_names: Mapping[str, str], edits: Mapping[str, Edit], dtype: str | None
) -> _Shard:
    old = base.headers[file]
    staying = [info for info in old.tensors if info.name in new_names]
    here = {new_names[info.name]: info.name for info in staying}
    edited = {name: edits[name] for name in here if name in edits}
    tensors = []
    for info in staying:
        edit = edited.get(new_names[info.name])
        if edit is None:
            tensors.append(replace(info, name=new_names[info.name]))
            continue
        if edit.old_shape != info.shape:
            raise CheckpointError(
                f"{info.name!r} is {list(info.shape)} in the base, not {list(edit.old_shape)}; plan again for this base"
            )
        tensors.append(replace(info, name=edit.tensor, dtype=dtype or edit.dtype, shape=edit.shape))
    header = None
    if tensors != list(old.tensors):
        if [info.dtype for info in tensors] != [info.dtype for info in old.tensors]:
            tensors.sort(key=lambda info: -DTYPE_BITS[info.dtype])
        header, tensors = pack_header(tensors, old.metadata, like=old.start)
    return _Shard(file, file, tuple(tensors), header, edited, here)


def _record(base: Checkpoint, shard: _Shard, how: str | None, folder: Path, hashes: Mapping[str, str]) -> FileRecord:
    header = base.header_hash(shard.source) if shard.header is None else hashlib.sha256(shard.header).hexdigest()
    if how == "remote" and base.remote is not None:
        lfs = base.remote.lfs_sha256.get(shard.source)
        return FileRecord(shard.name, base.size(shard.source), how, None, header, lfs, shard.source)
    size = (folder / shard.name).stat().st_size
    if how is None:
        how = "copied" if shard.untouched else "written"
    lfs = lfs_sha256(base.folder / shard.source) if shard.untouched else None
    return FileRecord(shard.name, size, how, hashes.get(shard.name), header, lfs)


def _index(base: Checkpoint, shards: Sequence[_Shard]) -> dict[str, Any]:
    tensors = [(info, shard.name) for shard in shards for info in shard.tensors]
    metadata = {**base.index_metadata, "total_size": sum(info.nbytes for info, _ in tensors)}
    if isinstance(metadata.get("total_parameters"), int):
        before = sum(_count(info) for info in base.tensors.values())
        metadata["total_parameters"] += sum(_count(info) for info, _ in tensors) - before
    return {
        "metadata": metadata,
        "weight_map": {info.name: name for info, name in sorted(tensors, key=lambda one: one[0].name)},
    }


def _count(info: TensorInfo) -> int:
    return info.nbytes * 8 // DTYPE_BITS[info.dtype]


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(old)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
