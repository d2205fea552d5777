"""A model hub on 127.0.0.1 that the real client talks to: repositories are folders, weights come from a second host.

    with LocalHub(root) as hub:          # root/org/name/ is the repository org/name
        hub.users[token] = User("org")   # whoever has this token may write to org/...
        hub.faults.append(Fault(r"\\.safetensors$", status=500))
        ...                              # a process with HF_ENDPOINT=hub.url
        hub.sent("model.safetensors")    # bytes that went over the wire
        hub.commits("org/name")          # what was pushed

``python -m tests.hub --root DIR`` serves a folder until it is stopped. The parts:

    faults    what can go wrong with a request
    store     repositories, commits, branches, large files
    xet       the storage behind Xet uploads
    server    requests and answers, and the routes that read
    writes    the routes that write
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from .faults import Fault as Fault
from .faults import Request as Request
from .server import serve
from .store import Commit, File, Store
from .writes import ROUTES


@dataclass(frozen=True)
class User:
    """Whom a token belongs to, and what it may do."""

    name: str
    role: str = "write"  # or "read"
    orgs: tuple[str, ...] = ()


class LocalHub:
    """A server for the folder ``root``; a context manager."""

    def __init__(self, root: Path, port: int = 0, *, xet: bool = False) -> None:
        self.root = Path(root)
        self.store = Store(self.root)
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.users: dict[str, User] = {}  # by token
        self.tokens: dict[str, str] = {}  # repository -> the token that may read it
        self.gated: set[str] = set()  # repositories that can be seen by all, and whose files by nobody
        self.open_gates: set[str] = set()  # gated ones whose terms everybody here has agreed to
        self.uncopied: set[str] = set()  # repositories whose large files cannot be copied on the server
        self.part_size: int | None = None  # larger files go up in parts of so many bytes
        self.xet = self.root / ".hub" / "xet" if xet else None
        self._lock = threading.Lock()
        self._hub = serve(self, "hub", port, ROUTES)
        self._cdn = serve(self, "cdn", 0, ROUTES)
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

    def received(self, host: str | None = None) -> int:
        """Bytes of bodies that came in; ``"cdn"`` is where large files go."""
        return sum(one.received for one in self.log if host in (None, one.host))

    def requests(self, pattern: str, method: str = "GET") -> list[Request]:
        return [one for one in self.log if one.method == method and re.search(pattern, one.path)]

    def commits(self, name: str) -> list[Commit]:
        """What was pushed to ``name``, oldest first."""
        return [one for one in self.store[name].commits if one.ref]

    def forget(self) -> None:
        self.log.clear()
        self.faults.clear()

    # --- repositories

    def repo(self, name: str, revision: str = "main") -> dict[str, File] | None:
        found = self.store.listing(name, revision) if self.store.exists(name) else None
        return None if found is None else dict(found)

    def commit(self, name: str, revision: str = "main") -> str:
        """The commit at the head of a revision."""
        return str(self.store.head(name, revision))

    def fault(self, host: str, method: str, path: str) -> Fault | None:
        with self._lock:
            for one in self.faults:
                if one.times and one.method == method and one.host in (None, host) and re.search(one.path, path):
                    if one.skip:
                        one.skip -= 1
                        continue
                    one.times -= 1
                    return one
        return None
