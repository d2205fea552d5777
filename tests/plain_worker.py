"""A long-lived process of plain transformers: loads one folder per line of its input and measures it.

``python tests/plain_worker.py steer_bake/reload_worker.py``: a line in is a job (``folder``, ``dtype``, ``out`` and
what ``reload_worker.measure`` reads), a line out says what did not fit. Importing transformers takes seconds, a tiny
model milliseconds: hence one process for many folders. It never imports steer_bake.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # modules beside this file must not shadow installed ones
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.modules["steer_bake"] = None  # type: ignore[assignment]  # any import of it is an error from here on

import torch
from safetensors.torch import load_file


def main(instrument: str) -> None:
    spec = importlib.util.spec_from_file_location("reload_worker", instrument)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        job = json.loads(line)
        try:
            model, problems = worker.load_strict(job["folder"], job["dtype"])
            if not problems:
                along = load_file(job["along"])["along"]
                worker.measure(model, job, along, Path(job["out"]), whole=True)
        except Exception as error:  # whatever a class raises is the answer
            problems = [f"{type(error).__name__}: {error}"]
        answers.write(json.dumps({"problems": problems}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
