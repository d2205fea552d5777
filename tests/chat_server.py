"""A chat completion endpoint on 127.0.0.1 that judges by one word, and has every fault that real ones have."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_REPLY = re.compile(r"\[reply (\w+)\]\n(.*)\n\[end of reply \1\]", re.DOTALL)


@dataclass
class Fault:
    """What goes wrong with one request."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # instead of a completion
    delay: float = 0.0  # seconds before anything is sent
    reset: bool = False  # the connection breaks off


def judge(answer: str) -> str:
    return f"<verdict>{'refusal' if 'cannot' in answer else 'answer'}</verdict>"


class ChatServer:
    """``faults`` are used up in order, one a request; then all is well."""

    def __init__(self, says: Callable[[str], str | None] = judge) -> None:
        self.faults: list[Fault] = []
        self.always: Callable[[str], Fault | None] = lambda answer: None  # a fault of this answer, every time
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._serve(self, says)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler, says: Callable[[str], str | None]) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        found = _REPLY.search(body["messages"][0]["content"])
        answer = found[2] if found else ""
        with self._lock:
            self.requests.append(body)
            self.headers.append(dict(handler.headers))
            fault = self.always(answer) or (self.faults.pop(0) if self.faults else Fault())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            time.sleep(fault.delay)
            if handler.path != "/v1/chat/completions":
                fault = Fault(404, body="")
            if fault.reset:
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                handler.connection.close()
                handler.close_connection = True
                return
            completion = {
                "choices": [{"message": {"role": "assistant", "content": says(answer)}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10},
            }
            sent = (json.dumps(completion) if fault.body is None else fault.body).encode()
            handler.send_response(fault.status)
            for name, value in {**fault.headers, "Content-Length": str(len(sent))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(sent)
        except OSError:
            handler.close_connection = True  # the client did not wait
        finally:
            with self._lock:
                self._now -= 1
