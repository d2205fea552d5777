"""Every call to the hub: tried again where that can help, and what it fails with said in one sentence.

The hub's client tries some calls again and others never; here all are, for as long as ``checkpoint.remote`` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented there, imported without a listing
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from ..checkpoint.remote import asked_pause, goes_back_to, is_disk_full, patiently
from ..errors import PublishError, SteerBakeError

_Result = TypeVar("_Result")

AGAIN = "run the same command again: what has arrived is not sent again"
LOG_IN = "log in (hf auth login) or set HF_TOKEN to a token with the role 'write'"


def ask(doing: str, call: Callable[[], _Result]) -> _Result:
    """``call()``, after a pause again where it failed for a reason that passes. ``doing`` begins the sentence.

    Raises:
        PublishError: what the hub said, and what to do next.
    """
    try:
        return patiently(call)
    except SteerBakeError:
        raise
    except Exception as error:  # the hub client raises a dozen unrelated types, its network library's among them
        raise refusal(doing, error) from error


def refusal(doing: str, error: Exception) -> PublishError:
    """What an exception of the hub's client means, in one sentence."""
    return PublishError(f"{doing}: {_said(error)}")


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an exception goes back to."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return int(error.response.status_code)
        error = error.__cause__
    return None


def _said(error: Exception) -> str:
    if isinstance(error, LocalTokenNotFoundError):
        return f"you are not logged in; {LOG_IN}"
    if is_disk_full(error):
        return f"the disk is full; make room, or point HF_HOME to another disk, then {AGAIN}"
    one = goes_back_to(error, HfHubHTTPError, httpx2.TransportError)
    if one is not None:
        if isinstance(one, GatedRepoError):
            return "it is gated and you have no access; ask for it on the model's page"
        if isinstance(one, RevisionNotFoundError):
            return "there is no such revision; check its name"
        if isinstance(one, RepositoryNotFoundError):
            return f"there is no such repository, or it is private and not yours; check the name, or {LOG_IN}"
        if isinstance(one, HfHubHTTPError):
            return _status(one)
        if isinstance(one, httpx2.TimeoutException):
            return f"the hub did not answer in time; {AGAIN}"
        if isinstance(one, httpx2.TransportError):
            return f"the connection to the hub broke off ({type(one).__name__}); check the network, then {AGAIN}"
    if isinstance(error, ConnectionError):  # the Rust client of Xet, which has its own words and no status
        found = re.search(r"\b(40[134])\b", str(error))
        why = f"HTTP {found[1]}; {LOG_IN}" if found else f"it broke off; {AGAIN}"
        return f"the transfer of large files failed: {why} (HF_HUB_DISABLE_XET=1 takes the older way)"
    return clean(str(error))


def _status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = clean(error.response.headers.get("X-Error-Message") or "")
    told = f"HTTP {status}" + (f" ({said})" if said else "")
    if status == 401:
        return f"the hub does not know this token ({told}); {LOG_IN}"
    if status == 403:
        return f"this token may not do that ({told}); {LOG_IN}, or ask who owns the repository, or use --create-pr"
    if status == 429:
        wait = asked_pause(error.response.headers)
        return f"the hub wants fewer requests ({told}); wait {_seconds(wait)} and {AGAIN}"
    if status >= 500 or status == 408:
        return f"the hub has trouble of its own ({told}); later, {AGAIN}"
    return f"the hub refuses ({told})"


def _seconds(wait: float | None) -> str:
    return "a few minutes" if wait is None else f"{wait:.0f} seconds"


def clean(text: str) -> str:
    """The first line of a foreign message, without the token and what addresses are signed with."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason was given")
    token = get_token()
    line = line.replace(token, "(token)") if token else line
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", line)[:300]


@contextmanager
def without_bars() -> Iterator[None]:
    """The client's own progress bars are for its own users."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
