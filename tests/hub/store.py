"""What a :class:`LocalHub` keeps: repositories, their commits and branches, and large files by content.

The main branch of ``org/name`` is the folder ``root/org/name`` itself, as it is at any moment. What a commit replaces
there stays in ``root/.hub/objects``; that history is forgotten when the server stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Files of these kinds, and large ones, are kept by content and served by the other host.
LFS_ENDINGS = (".safetensors", ".bin", ".model", ".gguf")
LFS_SIZE = 1 << 20
#: Of larger files with holes the beginning is hashed: nobody reads gigabytes of zeros for a test.
HASHED = 64 << 20
ATTRIBUTES = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in LFS_ENDINGS)


@dataclass(frozen=True)
class File:
    """One file of a repository."""

    path: Path
    size: int
    oid: str  # git blob id
    sha256: str | None  # of LFS files


Listing = Mapping[str, File]


@dataclass(frozen=True)
class Commit:
    """One commit that came in over the wire."""

    id: str
    parent: str | None
    ref: str
    title: str
    files: Listing


@dataclass
class Pull:
    """One pull request."""

    number: int
    title: str
    author: str
    status: str = "draft"

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass
class Repository:
    """What of a repository is not in its folder."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)  # oldest first, of all branches
    refs: dict[str, Commit] = field(default_factory=dict)  # branches, tags and pull requests; not main
    pulls: list[Pull] = field(default_factory=list)
    objects: set[str] = field(default_factory=set)  # sha256 of large files that may be committed


class Store:
    """All repositories under ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.lock = threading.RLock()
        self._files: dict[tuple[Path, int, int], File] = {}
        self._repositories: dict[str, Repository] = {}

    def __getitem__(self, name: str) -> Repository:
        return self._repositories.setdefault(name, Repository())

    def exists(self, name: str) -> bool:
        return (self.root / name).is_dir()

    def create(self, name: str, *, private: bool) -> None:
        (self.root / name).mkdir(parents=True)
        (self.root / name / ".gitattributes").write_text(ATTRIBUTES)
        self._repositories[name] = Repository(private)

    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name)
        self._repositories.pop(name, None)

    # --- reading

    def listing(self, name: str, revision: str = "main") -> Listing | None:
        """The files at a branch, tag, pull request or commit; None where there is no such revision."""
        if revision in ("main", "refs/heads/main") or revision == self.head(name):
            return self._main(name)
        found = self[name].refs.get(revision)
        if found is None:
            found = next((one for one in self[name].commits if one.id == revision), None)
        return None if found is None else found.files

    def head(self, name: str, revision: str = "main") -> str | None:
        """The commit that a revision means."""
        if revision in ("main", "refs/heads/main"):
            count = sum(one.ref == "main" for one in self[name].commits)
            return _commit_id(self._main(name), "main", count)
        if revision in self[name].refs:
            return self[name].refs[revision].id
        known = {self.head(name), *(one.id for one in self[name].commits)}
        return revision if revision in known else None

    def _main(self, name: str) -> dict[str, File]:
        folder = self.root / name
        if not folder.is_dir():
            return {}
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): self.file(path) for path in found}

    def file(self, path: Path) -> File:
        status = path.stat()
        key = path, status.st_size, status.st_mtime_ns
        with self.lock:
            if key not in self._files:
                self._files[key] = _file(path, status.st_size, holes=status.st_blocks * 512 < status.st_size)
            return self._files[key]

    def has_object(self, name: str, sha256: str) -> bool:
        """Whether ``name`` has this large file, committed or not."""
        listings = [self._main(name), *(one.files for one in self[name].commits)]
        return sha256 in self[name].objects or any(file.sha256 == sha256 for one in listings for file in one.values())

    def object(self, sha256: str) -> File | None:
        """A large file, wherever it lies."""
        path = self._object(sha256)
        return _remembered(path, sha256) if path.exists() else None

    def _object(self, key: str) -> Path:
        folder = self.root / ".hub" / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / key

    # --- writing

    def temporary(self, name: str) -> Path:
        return self._object(f"part-{threading.get_ident()}-{name}")

    def keep(self, name: str, sha256: str, path: Path) -> None:
        """``path``, whose content is ``sha256``, becomes a large file that ``name`` may commit."""
        with self.lock:
            os.replace(path, self._object(sha256))
            self[name].objects.add(sha256)

    def share(self, file: File, name: str) -> None:
        """The large ``file`` of another repository may be committed in ``name`` too."""
        with self.lock:
            self._link(file)
            self[name].objects.add(str(file.sha256))

    def blob(self, data: bytes) -> File:
        """A small file."""
        oid = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        path = self._object(f"git-{oid}")
        if not path.exists():
            path.write_bytes(data)
        return File(path, len(data), oid, None)

    def branch(self, name: str, branch: str, start: str) -> None:
        """A new branch, tag or pull request from ``start`` on."""
        with self.lock:
            files = self._frozen(self.listing(name, start) or {})
            self[name].refs[branch] = Commit(str(self.head(name, start)), None, branch, "", files)

    def commit(self, name: str, ref: str, title: str, files: Mapping[str, File]) -> Commit:
        """Make ``files`` what ``ref`` holds."""
        with self.lock:
            repository, parent = self[name], self.head(name, ref)
            before = self._frozen(self.listing(name, ref) or {})
            if not repository.commits:  # what was there before is a commit as well
                repository.commits.append(Commit(str(self.head(name)), None, "", "", self._frozen(self._main(name))))
            frozen = self._frozen(files)
            if ref == "main":
                count = 1 + sum(one.ref == "main" for one in repository.commits)
                self._write_main(name, before, frozen)
            else:
                count = 1 + sum(one.ref == ref for one in repository.commits)
            made = Commit(_commit_id(frozen, ref, count), parent, ref, title, frozen)
            repository.commits.append(made)
            if ref != "main":
                repository.refs[ref] = made
            return made

    def _write_main(self, name: str, before: Listing, after: Listing) -> None:
        folder = self.root / name
        for path in set(before) - set(after):
            (folder / path).unlink()
        for path, file in after.items():
            if before.get(path) == file:
                continue
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).unlink(missing_ok=True)
            os.link(file.path, folder / path)
            status = file.path.stat()
            found = File(folder / path, file.size, file.oid, file.sha256)
            self._files[folder / path, status.st_size, status.st_mtime_ns] = found

    def _frozen(self, files: Listing) -> dict[str, File]:
        """The same files where no commit replaces them."""
        return {path: self._link(file) for path, file in files.items()}

    def _link(self, file: File) -> File:
        path = self._object(file.sha256 or f"git-{file.oid}")
        if not path.exists():
            os.link(file.path, path)
        return File(path, file.size, file.oid, file.sha256)


def is_lfs(name: str, size: int) -> bool:
    return name.endswith(LFS_ENDINGS) or size > LFS_SIZE


def _commit_id(files: Listing, ref: str, count: int) -> str:
    content = [(path, file.size, file.sha256 or file.oid) for path, file in sorted(files.items())]
    return hashlib.sha1(json.dumps([content, ref, count]).encode()).hexdigest()


def _file(path: Path, size: int, *, holes: bool) -> File:
    git, large = hashlib.sha1(f"blob {size}\0".encode()), hashlib.sha256()
    left = min(size, HASHED) if holes else size
    with path.open("rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            git.update(data)
            large.update(data)
            left -= len(data)
    if holes and size > HASHED:
        large.update(str(size).encode())
    return File(path, size, git.hexdigest(), large.hexdigest() if is_lfs(path.name, size) else None)


def _remembered(path: Path, sha256: str) -> File:
    """A file of ``objects``: its name is its hash."""
    return File(path, path.stat().st_size, hashlib.sha1(sha256.encode()).hexdigest(), sha256)
