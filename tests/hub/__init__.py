"""A model hub on 127.0.0.1 that the real client talks to: repositories are folders, weights come from a second host.

    with LocalHub(root) as hub:          # root/org/name/ is the repository org/name
        hub.faults.append(Fault(r"\\.safetensors$", status=500))
        ...                              # a process with HF_ENDPOINT=hub.url
        hub.sent("model.safetensors")    # bytes that went over the wire

``python -m tests.hub --root DIR`` serves a folder until it is stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

#: Files of these kinds, and large ones, are kept by content and served by the other host.
LFS_ENDINGS = (".safetensors", ".bin", ".model", ".gguf")
LFS_SIZE = 1 << 20
#: Of larger files the beginning is hashed: nobody reads gigabytes of a sparse file for a test.
HASHED = 64 << 20
BLOCK = 64 << 10
SIGNATURE = "Signature=of-the-cdn"


@dataclass
class Fault:
    """Something that goes wrong with the next ``times`` requests whose path fits ``path``."""

    path: str  # regular expression
    times: int = 1
    status: int | None = None  # answer with this status and nothing else
    headers: dict[str, str] = field(default_factory=dict)  # added to that answer
    reset_after: int | None = None  # bytes of the body, then a connection reset
    end_after: int | None = None  # bytes of the body, then the connection is closed in good order
    ignore_range: bool = False  # 200 and the whole file
    short_range: int | None = None  # a well-formed answer with fewer bytes than asked for
    other_range: bool = False  # bytes from another place
    size: int | None = None  # what the answer says the whole file's size is
    method: str = "GET"
    host: str | None = None  # "hub" or "cdn"


@dataclass
class Request:
    """One request as it was answered."""

    host: str  # "hub" or "cdn"
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    file: str = ""  # the repository's file that was served
    sent: int = 0  # bytes of the body that went out


@dataclass(frozen=True)
class File:
    """One file of a repository."""

    path: Path
    size: int
    oid: str  # git blob id
    sha256: str | None  # of LFS files


class LocalHub:
    """A server for the folder ``root``; a context manager."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root = Path(root)
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.tokens: dict[str, str] = {}  # repository -> the token that may read it
        self.gated: set[str] = set()  # repositories that can be seen by all, and whose files by nobody
        self._files: dict[tuple[Path, int, int], File] = {}
        self._lock = threading.Lock()
        self._hub = _server(self, "hub", port)
        self._cdn = _server(self, "cdn", 0)
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.cdn_url = f"http://127.0.0.1:{self._cdn.server_port}"

    def __enter__(self) -> LocalHub:
        for server in (self._hub, self._cdn):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in (self._hub, self._cdn):
            server.shutdown()
            server.server_close()

    # --- what tests ask

    def sent(self, file: str = "") -> int:
        """Bytes of bodies that went out, of the repository file ``file`` or of everything."""
        return sum(one.sent for one in self.log if not file or one.file == file)

    def requests(self, pattern: str, method: str = "GET") -> list[Request]:
        return [one for one in self.log if one.method == method and re.search(pattern, one.path)]

    def forget(self) -> None:
        self.log.clear()
        self.faults.clear()

    # --- repositories

    def repo(self, name: str) -> dict[str, File] | None:
        folder = self.root / name
        if not folder.is_dir():
            return None
        found = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): self.file(path) for path in found}

    def file(self, path: Path) -> File:
        status = path.stat()
        key = path, status.st_size, status.st_mtime_ns
        with self._lock:
            if key not in self._files:
                self._files[key] = _file(path, status.st_size)
            return self._files[key]

    def commit(self, name: str) -> str:
        """The one commit of a repository: a hash of what is in it."""
        listing = [(path, file.size, file.sha256 or file.oid) for path, file in (self.repo(name) or {}).items()]
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()

    def fault(self, host: str, method: str, path: str) -> Fault | None:
        with self._lock:
            for one in self.faults:
                if one.times and one.method == method and one.host in (None, host) and re.search(one.path, path):
                    one.times -= 1
                    return one
        return None


def _file(path: Path, size: int) -> File:
    with path.open("rb") as file:
        data = file.read(HASHED)
    if size > HASHED:
        data += str(size).encode()
    lfs = path.suffix in LFS_ENDINGS or size > LFS_SIZE
    oid = hashlib.sha1(f"blob {size}\0".encode() + data).hexdigest()
    return File(path, size, oid, hashlib.sha256(data).hexdigest() if lfs else None)


def _server(hub: LocalHub, host: str, port: int) -> ThreadingHTTPServer:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.host = hub, host
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


class _Error(Exception):
    def __init__(self, status: int, code: str, **headers: str) -> None:
        self.status, self.code, self.headers = status, code, headers


class _Handler(BaseHTTPRequestHandler):
    """Routes and answers. To serve more of the protocol, add a method and a line to ``ROUTES``."""

    hub: LocalHub
    host: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 0

    def handle(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 << 10)  # what is sent is near what is read
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))  # all of it, before any answer
        self.record = Request(self.host, self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.log.append(self.record)
        self.broken = self.hub.fault(self.host, self.command, self.path)
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        try:
            if self.broken is not None and self.broken.status is not None:
                raise _Error(self.broken.status, "", **self.broken.headers)
            for host, method, pattern, route in ROUTES:
                found = re.fullmatch(pattern, path)
                if host == self.host and self.command in method and found:
                    route(self, *(unquote(part) for part in found.groups()))  # split first: a revision may hold %2F
                    return
            raise _Error(404, "NoSuchRoute")
        except _Error as error:
            names = {"X-Error-Code": error.code} if error.code else {}
            self.reply(error.status, {**names, **error.headers}, b'{"error": "no"}')

    # --- routes

    def info(self, name: str, revision: str = "main") -> None:
        commit = self.checked(name, revision)
        siblings: list[dict[str, Any]] = []
        for path, file in self.files(name).items():
            lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
            blobs = {"size": file.size, "blobId": file.oid, **({"lfs": lfs} if file.sha256 else {})}
            siblings.append({"rfilename": path, **(blobs if "blobs" in self.query else {})})
        self.json({"id": name, "modelId": name, "sha": commit, "private": name in self.hub.tokens, "tags": [],
                   "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        self.checked(name, revision)
        rows: list[dict[str, Any]] = []
        for path, file in self.files(name).items():
            lfs = {"lfs": {"oid": file.sha256, "size": file.size, "pointerSize": 130}} if file.sha256 else {}
            rows.append({"type": "file", "path": path, "oid": file.oid, "size": file.size, **lfs})
        self.json(rows)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self.checked(name, revision)
        file = self.files(name).get(path)
        if file is None:
            raise _Error(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        if name in self.hub.gated:
            raise _Error(403, "GatedRepo")
        self.record.file = path
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256 is None:
            self.serve(file, headers)
            return
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        location = f"{self.hub.cdn_url}/{name}/{file.sha256}/{path}?{SIGNATURE}"
        self.reply(302, {**headers, "Location": location}, b"")

    def stored(self, name: str, sha256: str, path: str) -> None:
        file = self.files(name).get(path)
        if file is None or file.sha256 != sha256 or SIGNATURE not in self.path:
            raise _Error(403, "")
        self.record.file = path
        self.serve(file, {"ETag": f'"{sha256}-cdn"', "Accept-Ranges": "bytes"})

    # --- parts of them

    def files(self, name: str) -> dict[str, File]:
        return self.hub.repo(name) or {}

    def checked(self, name: str, revision: str) -> str:
        """The commit; raises where the repository is not there, or not for this token."""
        wanted = self.hub.tokens.get(name)
        allowed = wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}"
        if not allowed or self.hub.repo(name) is None:
            raise _Error(401 if not allowed else 404, "RepoNotFound")
        commit = self.hub.commit(name)
        if revision not in ("main", commit):
            raise _Error(404, "RevisionNotFound")
        return commit

    def json(self, value: Any) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.begin(status, headers, len(body))
        self.send(iter([body]))

    def serve(self, file: File, headers: dict[str, str]) -> None:
        fault = self.broken or Fault("")
        size = fault.size or file.size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, file.size
        if asked and not fault.ignore_range:
            start, end = int(asked[1]), min(int(asked[2] or file.size) + 1, file.size)
            if start >= file.size:
                raise _Error(416, "", **{"Content-Range": f"bytes */{file.size}"})
            if fault.short_range is not None:
                end = min(end, start + fault.short_range)
            if fault.other_range:
                start, end = start + 8, min(end + 8, file.size)
            self.begin(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, end - start)
        else:
            self.begin(200, headers, size)
        self.send(_blocks(file.path, start, end))

    def begin(self, status: int, headers: dict[str, str], length: int) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, blocks: Iterator[bytes]) -> None:
        if self.command == "HEAD":
            return
        fault = self.broken or Fault("")
        limit = fault.reset_after if fault.reset_after is not None else fault.end_after
        for block in blocks:
            if limit is not None and self.record.sent + len(block) > limit:
                rest = block[: limit - self.record.sent]
                self.record.sent = limit
                self.wfile.write(rest)
                self.close_connection = True
                if fault.reset_after is not None:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    socket.close(self.connection.detach())  # at once, and not after a polite shutdown
                return
            self.record.sent += len(block)  # before: the client is quicker than the next line
            self.wfile.write(block)


def _blocks(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(BLOCK, end - start))
            if not block:
                return
            start += len(block)
            yield block


_REPO = r"([^/]+/[^/]+)"
Route = Callable[..., None]
#: (host, methods, path, what answers): the first that fits.
ROUTES: list[tuple[str, str, str, Route]] = [
    ("hub", "GET", rf"/api/models/{_REPO}", _Handler.info),
    ("hub", "GET", rf"/api/models/{_REPO}/revision/([^/]+)", _Handler.info),
    ("hub", "GET", rf"/api/models/{_REPO}/tree/([^/]+)", _Handler.tree),
    ("hub", "GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("cdn", "GET HEAD", rf"/{_REPO}/([0-9a-f]{{64}})/(.+)", _Handler.stored),
]
