"""Requests and answers of a :class:`LocalHub`, and the routes that read."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .faults import Fault, Request
from .store import File

if TYPE_CHECKING:
    from . import LocalHub, User

BLOCK = 64 << 10
SIGNATURE = "Signature=of-the-cdn"

Route = Callable[..., None]
Routes = Sequence[tuple[str, str, str, Route]]  # (host, methods, path, what answers)


def serve(hub: LocalHub, host: str, port: int, routes: Routes) -> ThreadingHTTPServer:
    class Bound(Handler):
        pass

    Bound.hub, Bound.host, Bound.routes = hub, host, [*routes, *ROUTES]
    server = ThreadingHTTPServer(("127.0.0.1", port), Bound)
    server.daemon_threads = True
    return server


class Error(Exception):
    """An answer that is no success; ``code`` is what the client goes by."""

    def __init__(self, status: int, code: str = "", message: str = "no", **headers: str) -> None:
        self.status, self.code, self.message, self.headers = status, code, message, headers


class Handler(BaseHTTPRequestHandler):
    """Routes and answers. To serve more of the protocol, add a function and a line to ``ROUTES``."""

    hub: LocalHub
    host: str
    routes: list[tuple[str, str, str, Route]]
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

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        self.record = Request(self.host, self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.log.append(self.record)
        self.broken = self.hub.fault(self.host, self.command, self.path) or Fault("")
        length = int(self.headers.get("Content-Length") or 0)
        if self.broken.reset_reading is not None:
            self.record.received = len(self.rfile.read(min(length, self.broken.reset_reading)))
            self.reset()
            return
        self.body, self.upload = b"", None
        if self.command == "PUT":  # a large file: not in memory
            self.upload = self.hub.store.temporary("upload")
            with self.upload.open("wb") as out:
                for block in self._incoming(length):
                    out.write(block)
        else:
            self.body = b"".join(self._incoming(length))  # all of it, before any answer
        if self.broken.delay:
            time.sleep(self.broken.delay)
        if self.broken.then:
            self.broken.then()
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        try:
            if self.broken.status is not None:
                raise Error(self.broken.status, **self.broken.headers)
            for host, method, pattern, route in self.routes:
                found = re.fullmatch(pattern, path)
                if host == self.host and self.command in method.split() and found:
                    route(self, *(unquote(part) for part in found.groups()))  # split first: a revision may hold %2F
                    return
            raise Error(404, "NoSuchRoute")
        except Error as error:
            names = {"X-Error-Code": error.code} if error.code else {}
            names |= {"X-Error-Message": error.message} if error.message != "no" else {}
            text = json.dumps({"error": error.message, "errors": [{"message": error.message}]}).encode()
            self.reply(error.status, {**names, **error.headers}, text)
        finally:
            if self.upload is not None:
                self.upload.unlink(missing_ok=True)

    def _incoming(self, length: int) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                self.record.received += size
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        while length:
            block = self.rfile.read(min(BLOCK, length))
            if not block:
                raise ConnectionError("the client went away")
            length -= len(block)
            self.record.received += len(block)
            yield block

    # --- who is asking

    @property
    def user(self) -> User | None:
        return self.hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def signed_in(self) -> User:
        """Whom the token belongs to."""
        if self.user is None:
            raise Error(401, "", "Invalid credentials in Authorization header")
        return self.user

    def owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user.name, *self.user.orgs)

    def checked(self, name: str, revision: str = "main") -> str:
        """The commit; raises where the repository is not there, or not for this token."""
        wanted = self.hub.tokens.get(name)
        allowed = wanted is None or self.headers.get("Authorization") == f"Bearer {wanted}"
        hidden = self.hub.store[name].private and not self.owns(name.split("/")[0])
        if not allowed or hidden or not self.hub.store.exists(name):
            raise Error(401 if not allowed else 404, "RepoNotFound")
        commit = self.hub.store.head(name, revision)
        if commit is None:
            raise Error(404, "RevisionNotFound")
        return commit

    # --- answers

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.reply(status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.begin(status, headers, len(body))
        self.send(iter([body]))

    def serve(self, file: File, headers: dict[str, str]) -> None:
        size = self.broken.size or file.size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, file.size
        if asked and not self.broken.ignore_range:
            start, end = int(asked[1]), min(int(asked[2] or file.size) + 1, file.size)
            if start >= file.size:
                raise Error(416, **{"Content-Range": f"bytes */{file.size}"})
            if self.broken.short_range is not None:
                end = min(end, start + self.broken.short_range)
            if self.broken.other_range:
                start, end = start + 8, min(end + 8, file.size)
            self.begin(206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}, end - start)
        else:
            self.begin(200, headers, size)
        self.send(_blocks(file.path, start, end))

    def begin(self, status: int, headers: dict[str, str], length: int) -> None:
        if self.broken.lost:
            self.reset()
            raise ConnectionError("the answer is lost")
        self.record.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, blocks: Iterator[bytes]) -> None:
        if self.command == "HEAD":
            return
        fault = self.broken
        limit = fault.reset_after if fault.reset_after is not None else fault.end_after
        for block in blocks:
            if fault.corrupt and block:
                block = block[:-1] + bytes([block[-1] ^ 1])
            if limit is not None and self.record.sent + len(block) > limit:
                rest = block[: limit - self.record.sent]
                self.record.sent = limit
                self.wfile.write(rest)
                self.close_connection = True
                if fault.reset_after is not None:
                    self.reset()
                return
            self.record.sent += len(block)  # before: the client is quicker than the next line
            self.wfile.write(block)
            if fault.pace:
                time.sleep(fault.pace)

    def reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # at once, and not after a polite shutdown


def _blocks(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < end:
            block = file.read(min(BLOCK, end - start))
            if not block:
                return
            start += len(block)
            yield block


# --- routes that read


def info(self: Handler, name: str, revision: str = "main") -> None:
    commit = self.checked(name, revision)
    siblings: list[dict[str, Any]] = []
    files = self.hub.repo(name, revision) or {}
    for path, file in files.items():
        lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
        blobs = {"size": file.size, "blobId": file.oid, **({"lfs": lfs} if file.sha256 else {})}
        siblings.append({"rfilename": path, **(blobs if "blobs" in self.query else {})})
    gated = name in self.hub.gated or name in self.hub.open_gates
    private = name in self.hub.tokens or self.hub.store[name].private
    self.json({"id": name, "modelId": name, "sha": commit, "private": private, "gated": "manual" if gated else False,
               "tags": [], "downloads": 0, "likes": 0, "cardData": _card(files), "siblings": siblings})  # fmt: skip


def _card(files: dict[str, File]) -> Any:
    """The metadata of README.md, as the hub gives it beside everything else."""
    if "README.md" not in files:
        return None
    found = re.match(r"---\n(.*?)\n---\n", files["README.md"].path.read_text(encoding="utf-8"), re.DOTALL)
    return yaml.safe_load(found[1]) if found else None


def tree(self: Handler, name: str, revision: str, folder: str = "") -> None:
    commit = self.checked(name, revision)
    files = self.hub.repo(name, revision) or {}
    if folder and not any(path.startswith(f"{folder}/") for path in files):
        raise Error(404, "EntryNotFound", **{"X-Repo-Commit": commit})
    within = {path: file for path, file in files.items() if not folder or path.startswith(f"{folder}/")}
    self.json([row(self, path, file) for path, file in within.items()])


def row(self: Handler, path: str, file: File, *, copied: bool = False) -> dict[str, Any]:
    """A file as listings have it."""
    found: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
    if file.sha256:
        found["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    xet_hash = xet_hashes(self).get(file.sha256 or "") or (file.sha256 if copied else None)
    return found | ({"xetHash": xet_hash} if xet_hash else {})


def xet_hashes(self: Handler) -> dict[str, str]:
    from . import xet

    return dict(xet.files(self.hub.xet)) if self.hub.xet else {}


def resolve(self: Handler, name: str, revision: str, path: str) -> None:
    commit = self.checked(name, revision)
    file = (self.hub.repo(name, revision) or {}).get(path)
    if file is None:
        raise Error(404, "EntryNotFound", **{"X-Repo-Commit": commit})
    if name in self.hub.gated:
        raise Error(403, "GatedRepo")
    self.record.file = path
    headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if file.sha256 is None:
        self.serve(file, headers)
        return
    headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
    xet_hash = xet_hashes(self).get(file.sha256)
    if xet_hash:
        route = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route}
    location = f"{self.hub.cdn_url}/{name}/{file.sha256}/{path}?{SIGNATURE}"
    self.reply(302, {**headers, "Location": location}, b"")


def stored(self: Handler, name: str, sha256: str, path: str) -> None:
    listings = [self.hub.repo(name) or {}, *(one.files for one in self.hub.commits(name))]
    file = next((one[path] for one in listings if path in one and one[path].sha256 == sha256), None)
    if file is None or SIGNATURE not in self.path:
        raise Error(403)
    self.record.file = path
    self.serve(file, {"ETag": f'"{sha256}-cdn"', "Accept-Ranges": "bytes"})


REPO = r"([^/]+/[^/]+)"
MODEL = rf"/api/models/{REPO}"
#: The first that fits.
ROUTES: Routes = [
    ("hub", "GET", MODEL, info),
    ("hub", "GET", rf"{MODEL}/revision/([^/]+)", info),
    ("hub", "GET", rf"{MODEL}/tree/([^/]+)", tree),
    ("hub", "GET", rf"{MODEL}/tree/([^/]+)/(.+)", tree),
    ("hub", "GET HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)", resolve),
    ("cdn", "GET HEAD", rf"/{REPO}/([0-9a-f]{{64}})/(.+)", stored),
]
