"""Safetensors files that stay on the hub: their headers, and now and then a few of their bytes, by range requests."""

from __future__ import annotations

import errno
import glob
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, imported without a listing
    build_hf_headers,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from .. import __version__
from ..errors import CheckpointError
from .header import MAX_HEADER, Header, header_length, parse_header

#: Bytes that say how long the header is.
PREFIX = 8
#: Bytes that are taken from the connection at a time.
BLOCK = 64 << 10
#: The largest tensor that is fetched by itself: a bias or a norm; a matrix is not.
SMALL = 1 << 20
#: Bytes before the wanted ones that are read and dropped where a server sends the whole file instead of a range.
SKIPPED = 1 << 20
#: Seconds between tries, of a server that does not say how long it wants to be left alone.
PAUSES = (1.0, 2.0, 4.0, 8.0)
#: Seconds that a server may ask to be left alone for; more, and the user had better come back later.
PATIENCE = 60
WORKERS = 8

_TRANSIENT = (408, 429, 500, 502, 503, 504)

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class RemoteFiles:
    """The files of a model on the hub at one commit; nothing of them is on this machine."""

    hub_id: str
    commit: str  # 40 hex digits
    sizes: Mapping[str, int]  # bytes, by path
    lfs_sha256: Mapping[str, str]  # by path, of the files that the hub keeps by content

    @classmethod
    def find(cls, hub_id: str, revision: str | None = None) -> RemoteFiles:
        """Ask the hub what ``revision`` (branch, tag or commit; default: the main branch) holds: one small request.

        Raises:
            Exception: whatever the hub client raises, after a few tries where trying again can help.
        """
        info = patiently(
            lambda: HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=_TIMEOUT),
            httpx2.ConnectError,  # there is no network: a model in the cache is not to wait for it
        )
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
            raise CheckpointError(f"the hub names no commit of {hub_id} but {info.sha!r:.80}; is HF_ENDPOINT right?")
        found = info.siblings or []
        return cls(
            hub_id,
            str(info.sha),
            {one.rfilename: one.lfs.size if one.lfs else one.size or 0 for one in found},
            {one.rfilename: one.lfs.sha256 for one in found if one.lfs},
        )

    @property
    def name(self) -> str:
        return f"{self.hub_id}@{self.commit[:12]}"

    def download(self, names: Iterable[str], bar: type[Any] | None = None) -> Path:
        """Fetch small files into the hub's cache; the snapshot folder that they are in. ``bar`` is a class like tqdm.

        Raises:
            CheckpointError: one of them is larger than any file of its kind.
            Exception: whatever the hub client raises, after a few tries where trying again can help.
        """
        wanted = [name for name in names if name in self.sizes]
        for name in wanted:
            if self.sizes[name] > MAX_HEADER:
                raise CheckpointError(f"{name} of {self.name} is larger than {MAX_HEADER} bytes; do not use this model")
        return Path(
            patiently(
                lambda: snapshot_download(
                    self.hub_id,
                    revision=self.commit,
                    allow_patterns=[glob.escape(name) for name in wanted],
                    tqdm_class=bar,
                )
            )
        )

    def headers(self, files: Sequence[str], progress: Callable[[int, int], None] | None = None) -> dict[str, Header]:
        """The validated headers of safetensors files, several at a time; ``progress`` is called with files.

        Raises:
            CheckpointError: a file is damaged, or the hub does not give its header.
        """
        with ThreadPoolExecutor(WORKERS, "header") as pool:
            waiting = [pool.submit(self.header, file) for file in files]
            try:
                for done, one in enumerate(as_completed(waiting), 1):
                    one.result()
                    if progress is not None:
                        progress(done, len(files))
            except BaseException:
                for one in waiting:
                    one.cancel()
                raise
        return {file: one.result() for file, one in zip(files, waiting, strict=True)}

    def header(self, file: str) -> Header:
        """As :func:`read_header` of a local file."""
        size = self.sizes[file]
        # Two requests and not one for more than most headers have: behind a header come weights, and none are fetched.
        prefix = self.fetch(file, 0, min(PREFIX, size))
        return parse_header(prefix + self.fetch(file, PREFIX, header_length(prefix, size, file)), size, file)

    def fetch(self, file: str, start: int, count: int) -> bytes:
        """``count`` bytes of ``file`` from ``start`` on, and never much more over the wire.

        Raises:
            CheckpointError: the hub does not give them, after a few tries where trying again can help.
        """
        if count == 0:
            return b""
        what = f"{file} of {self.name}"
        try:
            return patiently(lambda: self._range(file, start, count))
        except HfHubHTTPError as error:  # its own text holds the address, which may be signed
            raise CheckpointError(_refused(what, error.response.status_code)) from error
        except httpx2.HTTPError as error:
            raise CheckpointError(
                f"{what} cannot be read: the connection to the hub broke off, or its answer ended early, "
                f"{1 + len(PAUSES)} times ({type(error).__name__}); check the network and try again"
            ) from error

    def _range(self, file: str, start: int, count: int) -> bytes:
        url = hf_hub_url(self.hub_id, file, revision=self.commit)
        headers = {
            **build_hf_headers(library_name="steer-bake", library_version=__version__),
            "Range": f"bytes={start}-{start + count - 1}",
            "Accept-Encoding": "identity",  # a range of compressed bytes would be of no use
        }
        found = bytearray()
        # The client drops the token where it is redirected to another host.
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as answer:
            hf_raise_for_status(answer)
            skipped = self._skipped(file, start, answer)
            for block in answer.iter_raw(BLOCK):
                found += block
                if len(found) >= skipped + count:  # the rest, if there is one, is not read: the connection is closed
                    break
        if len(found) < skipped + count:
            raise httpx2.RemoteProtocolError(f"{len(found)} bytes instead of {skipped + count}")
        return bytes(found[skipped : skipped + count])

    def _skipped(self, file: str, start: int, answer: httpx2.Response) -> int:
        """How many bytes of ``answer`` come before the wanted ones: none, unless the whole file was sent."""
        size, says = self.sizes[file], answer.headers.get("Content-Range", "")
        if answer.status_code == 206:
            given = re.fullmatch(r"bytes (\d{1,20})-\d{1,20}/(\d{1,20}|\*)", says)
            if given is None or int(given[1]) != start or given[2] not in (str(size), "*"):
                raise CheckpointError(
                    f"asked for bytes from {start} on of {file} of {self.name} ({size} bytes), the server sent "
                    f"{says!r:.80}; check HF_ENDPOINT and proxies, or download the model first"
                )
            return 0
        length = answer.headers.get("Content-Length", str(size))
        if answer.status_code != 200 or length != str(size) or start > SKIPPED:
            raise CheckpointError(
                f"the server cannot send a part of {file} of {self.name} (HTTP {answer.status_code}, {length!r:.20} "
                f"bytes of {size}); check HF_ENDPOINT and proxies, or download the model first"
            )
        return start


#: Seconds without a byte after which a connection counts as broken.
_TIMEOUT = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def patiently(call: Callable[[], _Result], *hopeless: type[Exception]) -> _Result:
    """``call()``, again after a pause where it failed for a reason that passes, but not for ``hopeless`` ones."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:  # the hub client wraps the errors of its network library in a dozen types
            wait = None if goes_back_to(error, *hopeless) else pause_after(error, pause)
            if wait is None:
                raise
        time.sleep(wait)
    return call()


def pause_after(error: BaseException | None, pause: float) -> float | None:
    """Seconds to wait before another try, ``pause`` unless the server says; None where it is of no use, or not soon."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            if error.response.status_code not in _TRANSIENT:
                return None
            asked = asked_pause(error.response.headers)
            return pause if asked is None else asked if asked <= PATIENCE else None
        if isinstance(error, httpx2.TransportError):
            return pause
        error = error.__cause__
    return None


def goes_back_to(error: BaseException | None, *kinds: type[BaseException]) -> BaseException | None:
    """The first exception of one of ``kinds`` on the way to the cause of ``error``."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__ or error.__context__
    return error


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception goes back to a file that could not grow."""
    found: BaseException | None = error
    while found := goes_back_to(found, OSError):
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        found = found.__cause__ or found.__context__
    return False


def asked_pause(headers: httpx2.Headers) -> float | None:
    """The pause that a server asks for."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "").strip()
    return float(after) if re.fullmatch(r"[0-9]{1,9}", after) else None


def _refused(what: str, status: int) -> str:
    if status in (401, 403):
        advice = "ask for access on the model's page and log in (hf auth login, or HF_TOKEN)"
    elif status == 429:
        advice = "it wants fewer requests; wait a few minutes"
    elif status in _TRANSIENT:
        advice = "it has trouble of its own; try again later"
    else:
        advice = "check the name and the revision"
    return f"{what} cannot be read: the hub answers HTTP {status}; {advice}"
