"""A long-lived process of plain transformers that runs the certificate's worker (``reload_worker.py``) on one job after
another: importing transformers takes seconds, a tiny model milliseconds.

:class:`PlainWorker` is its end in the tests. ``python tests/plain_worker.py steer_bake/reload_worker.py`` is the other:
a line in names a job file and where its stderr goes, a line out is the exit status that the worker alone would have.
It never imports steer_bake; ``reload_worker.main`` ends with an error where it did.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Any

if __name__ == "__main__":  # modules beside this file must not shadow installed ones
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

ROOT = Path(__file__).resolve().parent.parent


class PlainWorker:
    """Starts the process when there is a job for it, and anew when the last one killed it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> PlainWorker:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _where: TracebackType | None) -> None:
        if self.process is not None:
            with self.process:
                self.process.kill()

    def start(self, job: Path, said: IO[str]) -> Running:
        """Begin ``job``, whose stderr goes to the file ``said``: takes the place of ``validate.start_worker``."""
        if self.process is None or self.process.poll() is not None:
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            environment.pop("PYTHONPATH", None)
            command = [sys.executable, __file__, str(ROOT / "steer_bake" / "reload_worker.py")]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=environment, cwd=ROOT,
            )  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"job": str(job), "said": said.name}) + "\n")
        self.process.stdin.flush()
        return Running(self.process)

    def measure(self, folder: Path, out: Path, job: dict[str, Any], dtype: str = "float32") -> list[str]:
        """What did not fit when ``folder`` was loaded, one sentence each; where nothing, ``out`` holds ``float32.*``:
        logits by batch, decoded tokens and readings."""
        out.mkdir(exist_ok=True)
        # a name that is decoded and read
        candidate = {"name": "float32", "folder": str(folder), "dtype": dtype, "draws": [0]}
        whole = {"device": "cpu", "stream": False, "threads": 1, **job, "out": str(out)}
        (out / "job.json").write_text(json.dumps({**whole, "candidates": [candidate]}))
        with open(out / "stderr", "w+", encoding="utf-8") as said:
            if self.start(out / "job.json", said).wait():
                return [said.read().strip().splitlines()[-1]]
        problems: dict[str, list[str]] = json.loads((out / "problems.json").read_text())
        return problems["float32"]


class Running:
    """One job of the process, with what ``validate`` asks of a ``subprocess.Popen``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            assert self.process.stdout is not None
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.process.args, timeout or 0.0)
            line = self.process.stdout.readline()
            self.returncode = int(line) if line else self.process.wait()
        return self.returncode

    def kill(self) -> None:
        self.process.kill()


def serve(instrument: str) -> None:
    spec = importlib.util.spec_from_file_location("reload_worker", instrument)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        with open(asked["said"], "ab", buffering=0) as said:
            os.dup2(said.fileno(), 2)
        status = 0
        try:
            worker.main(asked["job"])
        except BaseException:  # its own SystemExit is an answer too
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        answers.write(f"{status}\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
