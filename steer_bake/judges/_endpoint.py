"""A chat model behind an OpenAI-compatible endpoint, asked many questions at the same time, with patience.

What passes (too many requests, trouble in the server, time-outs, broken connections, answers that are no JSON) is tried
again after a growing pause, or after the one that the server asks for. What does not pass (a wrong key, an unknown
model) is said at once. The key goes into one header and nowhere else.
"""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ..errors import RecipeError
from ._kept import Reply

#: Questions in a row that fail after all tries, until the endpoint counts as dead and the rest is not asked.
DEAD_AFTER = 3
PATIENCE = 60.0  # seconds that a server may ask to be left alone for

_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}", re.ASCII)


class _Passing(Exception):
    """A try failed for a reason that may pass."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait  # seconds that the server asks for


class _Hopeless(Exception):
    """A reason that will not pass for this question."""


class _Lasting(Exception):
    """A reason that will not pass and holds for every question."""


@dataclass
class _Work:
    """What the threads of one call share."""

    stop: threading.Event = field(default_factory=threading.Event)
    why: str = ""  # the reason of those that are not asked any more

    def end(self, why: str) -> None:
        self.why = self.why or why
        self.stop.set()


@dataclass
class Endpoint:
    """The chat model ``model`` at ``url``, the address before ``/chat/completions``."""

    url: str
    body: Mapping[str, Any]  # of every request, without its messages
    key: str | None = field(repr=False)
    concurrency: int
    tries: int
    pause: float  # seconds before the second try; doubled before each further one
    timeout: float  # seconds without a byte, and a try has failed

    @property
    def identity(self) -> dict[str, Any]:
        """What a reply depends on besides the messages."""
        return {"endpoint": self.url, "body": dict(self.body)}

    def replies(self, messages: Sequence[str]) -> Generator[tuple[str, Reply | str, int], None, None]:
        """``(message, reply, tries that failed)`` as they come in; where there is no reply, the reason in its place."""
        work = _Work()
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        client = httpx2.Client(headers=headers, timeout=self.timeout, limits=limits, follow_redirects=False)
        pool = ThreadPoolExecutor(self.concurrency, "judge")
        try:
            todo = {pool.submit(self._ask, client, work, message): message for message in messages}
            in_a_row = 0
            for future in as_completed(todo):
                reply, retries, points = future.result()
                in_a_row = in_a_row + points if isinstance(reply, str) else 0
                if in_a_row >= DEAD_AFTER:
                    work.end(str(reply))
                yield todo[future], reply or work.why, retries
        finally:  # also where whoever reads these stops reading
            work.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            pool.shutdown()

    def _ask(self, client: httpx2.Client, work: _Work, message: str) -> tuple[Reply | str, int, int]:
        """The reply or the reason why there is none ("": it was called off), failed tries, and what that says of the
        endpoint: ``DEAD_AFTER`` such points in a row, and it counts as dead."""
        why = ""
        for number in range(self.tries):
            if work.stop.is_set():
                return why, number, 0
            try:
                return self._once(client, message), number, 0
            except _Hopeless as error:
                return str(error), number + 1, 0
            except _Lasting as error:
                work.end(str(error))
                return str(error), number + 1, DEAD_AFTER
            except _Passing as error:
                why = str(error)
                if error.wait is not None and error.wait > PATIENCE:
                    work.end(f"{error}, to be left alone for {error.wait:.0f} seconds")
                    return work.why, number + 1, DEAD_AFTER
                wait = self.pause * 2**number * random.uniform(0.75, 1.25)  # not all threads at the same moment
                wait = wait if error.wait is None else max(error.wait, self.pause)  # some say 0 and mean later
            except RuntimeError:  # the client was closed meanwhile
                if work.stop.is_set():
                    return why, number, 0
                raise
            if number + 1 < self.tries:
                work.stop.wait(wait)
        return why, self.tries, 1

    def _once(self, client: httpx2.Client, message: str) -> Reply:
        body = {**self.body, "messages": [{"role": "user", "content": message}]}
        try:
            answer = client.post(f"{self.url}/chat/completions", json=body)
        except httpx2.TimeoutException as error:
            raise _Passing(f"no answer within {self.timeout:g} seconds") from error
        except httpx2.TransportError as error:
            raise _Passing(f"the connection failed ({type(error).__name__})") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Lasting(f"the request cannot be made ({type(error).__name__})") from error
        if answer.status_code in _TRANSIENT:
            raise _Passing(f"HTTP {answer.status_code}", _asked(answer))
        if answer.status_code in (401, 403, 404) or 300 <= answer.status_code < 400:
            raise _Lasting(self._refused(answer))
        if answer.status_code != 200:
            raise _Hopeless(self._refused(answer))
        return _read(answer)

    def _refused(self, answer: httpx2.Response) -> str:
        status = answer.status_code
        if status in (401, 403):  # such answers like to quote the key
            return f"HTTP {status}: the key was not accepted; name the variable that holds it with the option 'key'"
        if 300 <= status < 400:
            return f"HTTP {status}: the endpoint redirects; give the address that it leads to"
        try:
            said = answer.json()["error"]
            text = str(said["message"] if isinstance(said, dict) else said)
        except (ValueError, KeyError, TypeError):
            text = ""
        if self.key:
            text = text.replace(self.key, "***")
        hint = "; is the address right? It usually ends in /v1" if status == 404 and not text else ""
        return f"HTTP {status}{': ' if text else ''}{' '.join(text.split())[:200]}{hint}"


def check_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        RecipeError: it is no web address, or holds more than one: a password, a query.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(f"the judge's endpoint {url!r:.80} is no address; write it like http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise RecipeError(
            "the judge's endpoint holds more than an address; a key belongs into an environment variable "
            "that the option 'key' names"
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def read_key(name: str | None) -> str | None:
    """The key in the environment variable ``name``.

    Raises:
        RecipeError: ``name`` is not the name of a variable (it may be a key, so it is not repeated), or it is not set.
    """
    if name is None:
        return None
    if not _NAME.fullmatch(name):
        raise RecipeError(
            "the judge's option 'key' takes the name of an environment variable in capitals, such as OPENAI_API_KEY, "
            "and never the key itself"
        )
    found = os.environ.get(name, "").strip()
    if not found:
        raise RecipeError(f"the judge's key is to be in the environment variable {name}, which is not set")
    return found


def _read(answer: httpx2.Response) -> Reply:
    try:
        content = answer.json()
        text = content["choices"][0]["message"].get("content")
        usage = content.get("usage") or {}
        used = [int(usage.get(key) or 0) for key in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _Passing("an answer that is not the JSON of a chat completion") from error
    if text is not None and not isinstance(text, str):
        raise _Passing("an answer whose content is not a text")
    return Reply(text or "", *used)  # no content: the judge thought until its tokens ran out


def _asked(answer: httpx2.Response) -> float | None:
    """The pause that a server asks for, in seconds."""
    after = answer.headers.get("Retry-After", "").strip()
    return float(after) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", after) else None
