"""The files of a baked folder: those the bake wrote, against its record and against the base's; and all others."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .checkpoint import Checkpoint, FileRecord
from .checkpoint.carry import CARRIED, LICENCES, goes_along, lfs_sha256
from .checkpoint.folder import CONFIG, INDEX
from .checkpoint.header import open_regular
from .checks import Check, listed
from .originals import JSON_FILE, VECTORS_FILE

Advance = Callable[[int], None]  # called with the bytes that were read since the last call

#: Bytes compared or hashed at a time.
PIECE = 8 << 20
TEMPLATES = "additional_chat_templates"

#: Files that a loader, a server or a tokenizer looks for by name: where nobody recorded one, it changes what is loaded.
LOADED = (
    *CARRIED,
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx",
    "*.py",
    "*.so",
    "adapter_*",
    "*config*.json",
    "params.json",
    "modules.json",
    "*.template",
    f"{TEMPLATES}/*",
    "*/*.py",
)
#: Of those, what a folder on the hub has anyway.
HARMLESS = (*LICENCES, ".git/*", ".cache/*")


def same_bytes(one: Path, other: Path, spans: Sequence[tuple[int, int, int]], advance: Advance) -> bool:
    """Whether ``size`` bytes of ``one`` from ``start`` on are those of ``other`` from ``begin`` on, for every span
    ``(start, begin, size)``; a piece in memory at a time."""
    with open_regular(one) as left, open_regular(other) as right:
        for start, begin, size in spans:
            for done in range(0, size, PIECE):
                count = min(PIECE, size - done)
                first = os.pread(left.fileno(), count, start + done)
                if len(first) < count or first != os.pread(right.fileno(), count, begin + done):
                    return False
                advance(count)
    return True


def same_file(one: Path, other: Path, advance: Advance = lambda _: None) -> bool:
    """Whether both have the same bytes, all of them."""
    size = one.stat().st_size
    return size == other.stat().st_size and same_bytes(one, other, [(0, 0, size)], advance)


def sha256(path: Path, advance: Advance = lambda _: None) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def check_files(folder: Path, base: Path | None, records: Sequence[FileRecord], *, made: Sequence[str] = ()) -> Check:
    """Everything the bake wrote is there with its recorded size, small files with their recorded hash; what was carried
    along is what ``base`` has, and all of it is there. Of weight files the size is compared here.

    ``made``: the files that the target makes, where it makes no checkpoint; then all of them must be recorded, and of
    the base only licences are carried along.
    """
    problems = [problem for record in records for problem in _recorded(folder, record)]
    problems += [f"{name} is not recorded" for name in made if name not in {one.name for one in records}]
    if base is not None:
        theirs, patterns = [record for record in records if record.name not in made], LICENCES if made else CARRIED
        problems += [*_carried(folder, base, patterns), *_foreign(folder, base, theirs, patterns)]
        if made:
            there = [name for name in (CONFIG, INDEX) if (folder / name).exists()]
            problems += [f"{name} is there, which is a checkpoint's" for name in there]
    small = sum(record.header_hash is None for record in records)
    also = "" if base is None else "; what goes along with the weights is the base's, byte for byte"
    return Check.of("files", problems, f"{len(records)} as recorded, {small} of them by hash{also}")


def places(folder: Path, record: FileRecord) -> list[Path]:
    """Where the file of ``record`` lies: templates beside the main one are recorded by their name alone."""
    if Path(record.name).name != record.name:
        return []  # a record that climbs out of the folder was not written by a bake
    both = (folder / record.name, folder / TEMPLATES / record.name)
    return [path for path in both if path.is_file()]


def _recorded(folder: Path, record: FileRecord) -> Iterator[str]:
    found = places(folder, record)
    if not found:
        yield f"{record.name} is missing"
    elif record.header_hash is not None or record.sha256 is None:
        if found[0].stat().st_size != record.size:
            yield f"{record.name} has {found[0].stat().st_size} bytes, recorded are {record.size}"
    elif record.sha256 not in {sha256(path) for path in found}:
        yield f"{record.name} is not the file that was written (another sha256)"


def _carried(folder: Path, base: Path, patterns: Sequence[str]) -> Iterator[str]:
    templates = base.glob(f"{TEMPLATES}/*.jinja") if patterns is CARRIED else ()
    for path in sorted([*base.iterdir(), *templates]):
        name = path.relative_to(base)
        if not path.is_file() or not (name.parent.name or goes_along(path.name, patterns)):
            continue
        if not (folder / name).is_file():
            yield f"the base's {name} is missing"
        elif not same_file(path, folder / name):
            yield f"{name} is not the base's"


def _foreign(folder: Path, base: Path, records: Sequence[FileRecord], patterns: Sequence[str]) -> Iterator[str]:
    """A record alone makes no file the bake's: what it names must come from the base or be made by every bake."""
    for record in records:
        if record.header_hash is not None or record.name in (CONFIG, INDEX):
            continue
        for path in places(folder, record):
            name = path.relative_to(folder)
            if not (base / name).is_file() or not (name.parent.name or goes_along(path.name, patterns)):
                yield f"{name} is recorded, and no bake of this base writes it"


def check_others(folder: Path, records: Sequence[FileRecord]) -> Check:
    """Files that no bake recorded: refused where loaders act on them, else listed."""
    known = {folder / JSON_FILE, folder / VECTORS_FILE, *(path for one in records for path in places(folder, one))}
    others = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path not in known]
    acted_on = [name for name in others if is_loaded(name)]
    harmless = [name for name in others if not is_loaded(name) and not (folder / name).is_dir()]
    return Check.of(
        "other files",
        [f"{name} is not of the bake, and loaders act on it" for name in acted_on],
        f"not of the bake, and nothing loads them: {listed(harmless)}" if harmless else "none",
    )


def is_loaded(name: str) -> bool:
    """Whether loaders, servers or tokenizers act on a file of this name."""

    def fits(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) and ("/" not in name or "/" in pattern) for pattern in patterns)

    return fits(LOADED) and not fits(HARMLESS)


def acted_on(folder: Path) -> dict[str, str]:
    """What a certificate of ``folder`` is for: the sha256 of everything in it that loaders act on."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: sha256(folder / name) for name in names if is_loaded(name) and not name.startswith(".")}


def check_hashes(
    found: Checkpoint,
    base: Checkpoint,
    records: Sequence[FileRecord],
    sources: Mapping[str, str],
    advance: Advance,
) -> Check:
    """Every byte of every recorded file: by its recorded sha256 or hub id, else against the base's file.

    ``sources`` names the base's file that a weight file of ``found`` stands for.
    """
    problems: list[str] = []
    same: list[str] = []
    ways = {"recorded": 0, "compared": 0}
    for record in records:
        source = base.folder / sources[record.name] if sources.get(record.name) in base.files else None
        wanted = record.sha256 or record.lfs_sha256 or (source and lfs_sha256(source))
        paths = places(found.folder, record)
        if wanted is not None:
            ways["recorded"] += 1
            if wanted not in {sha256(path, advance) for path in paths}:
                problems.append(f"{record.name} is not the file that was recorded (another sha256)")
        elif source is None or not paths:
            problems.append(f"of {record.name} no hash is recorded, and the base has no file that it could be")
        elif paths[0].samefile(source):
            same.append(record.name)
            advance(record.size)
        else:
            ways["compared"] += 1
            if not same_file(paths[0], source, advance):
                problems.append(f"{record.name} is not the base's file")
    good = f"{ways['recorded']} files by recorded sha256, {ways['compared']} against the bytes of the base's"
    if same:
        good += f". Not provable: {listed(same, 2)} is the same file as the base's, and no hash of it was recorded"
    return Check.of("hashes", problems, good)
