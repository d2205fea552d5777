"""What can go wrong with a request, and the record of those that were made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Something that goes wrong with the next ``times`` requests whose path fits ``path``."""

    path: str  # regular expression
    times: int = 1
    status: int | None = None  # answer with this status and nothing else
    headers: dict[str, str] = field(default_factory=dict)  # added to that answer
    reset_after: int | None = None  # bytes of the body, then a connection reset
    end_after: int | None = None  # bytes of the body, then the connection is closed in good order
    reset_reading: int | None = None  # bytes of the request's body are read, then a connection reset
    lost: bool = False  # everything is done, and the connection reset instead of an answer
    delay: float = 0.0  # seconds before anything is done
    pace: float = 0.0  # seconds between blocks of the answer
    corrupt: bool = False  # a bit of every block is another
    ignore_range: bool = False  # 200 and the whole file
    short_range: int | None = None  # a well-formed answer with fewer bytes than asked for
    other_range: bool = False  # bytes from another place
    size: int | None = None  # what the answer says the whole file's size is
    method: str = "GET"
    host: str | None = None  # "hub" or "cdn"
    then: Callable[[], object] | None = None  # what happens in between, before anything is done
    skip: int = 0  # so many fitting requests are left alone first


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
    received: int = 0  # bytes of the body that came in
