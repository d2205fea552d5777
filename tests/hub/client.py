"""A process whose hub client talks to a :class:`LocalHub`: the client reads its address once, when it is imported.

One process runs the command line again and again, because importing torch takes longer than the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

TOKEN = "hf_" + "aBcDeFgHiJ" * 3


def environment(url: str, home: Path, token: str | None = TOKEN, *, xet: bool = False) -> dict[str, str]:
    """For a process that talks to the hub at ``url`` and to no other, and keeps its files in ``home``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    settings = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
        "OMP_NUM_THREADS": "1",
    }
    settings |= {"HF_TOKEN": token} if token else {}
    return {**kept, **settings, **({} if xet else {"HF_HUB_DISABLE_XET": "1"})}


@dataclass(frozen=True)
class Said:
    """What a command said."""

    code: int
    stdout: str
    stderr: str


class Client:
    """``steer-bake`` in a process of its own, with a hub cache and a token of its own; a context manager."""

    def __init__(
        self, url: str, home: Path, *, token: str | None = TOKEN, xet: bool = False, prefix: Sequence[str] = ()
    ) -> None:
        self.home, self._secrets = home, (TOKEN, token or TOKEN, "Signature=")
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.hub.client"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(url, home, token, xet=xet),
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def __call__(self, *arguments: str | Path) -> Said:
        """Run the command line; no token and no signed address may be in what it says."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(one) for one in arguments]) + "\n")
        self._process.stdin.flush()
        said = Said(*json.loads(self._process.stdout.readline()))
        for secret in self._secrets:
            assert secret not in said.stdout + said.stderr
        return said


def serve(commands: Sequence[str]) -> None:
    from click.testing import CliRunner
    from huggingface_hub.utils import _http

    from steer_bake.checkpoint import remote
    from steer_bake.cli import main

    remote.PAUSES = (0.05,) * len(remote.PAUSES)  # as many tries, in less time; of the client's own as well
    _http.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)))
    for line in commands:
        done = CliRunner().invoke(main, json.loads(line))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        sys.stdout.write(json.dumps([done.exit_code, done.stdout, done.stderr]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(sys.stdin)  # type: ignore[arg-type]
