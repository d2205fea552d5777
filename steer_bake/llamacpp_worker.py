"""Runs in a fresh process that never imports steer_bake: logits of llama.cpp, with and without a control vector.

``python llamacpp_worker.py job.json``: for every row of token ids, ``plain.<row>`` and ``steered.<row>`` [tokens,
vocab] go to ``logits.safetensors``. The vectors are laid out as llama.cpp's own ``common_control_vector_load`` does it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this file lives inside a package whose module names must not shadow installed ones
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
from safetensors.numpy import save_file


def control_vector(path: str, layers: int, width: int) -> np.ndarray[Any, Any]:
    """Layer 1 first, zeros where the file has no vector: what ``llama_set_adapter_cvec`` takes."""
    from gguf import GGUFReader

    out = np.zeros((layers - 1, width), dtype=np.float32)
    for tensor in GGUFReader(path).tensors:
        name, _, layer = tensor.name.partition(".")
        if name != "direction" or not 0 < int(layer) < layers:
            raise SystemExit(f"llama.cpp has no place for {tensor.name} in a model of {layers} layers")
        out[int(layer) - 1] += tensor.data
    return out


def logits(llm: Any, rows: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    found = []
    for row in rows:
        llm.reset()
        llm.eval(row)
        found.append(np.array(llm.scores[: len(row)], dtype=np.float32))
    return found


def plain_kernels() -> None:
    """Leave weights as the file has them: kernels for repacked ones (AMX) crash on some virtual machines."""
    low: Any = importlib.import_module("llama_cpp.llama_cpp")
    defaults = low.llama_model_default_params

    def without() -> Any:
        settings = defaults()
        if hasattr(settings, "use_extra_bufts"):
            settings.use_extra_bufts = False
        return settings

    low.llama_model_default_params = without  # the class has no argument for it


def main(job_file: str) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")
    plain_kernels()
    job = json.loads(Path(job_file).read_text())
    rows = job["rows"]
    longest = max(map(len, rows))
    llm = llama_cpp.Llama(
        job["gguf"], n_ctx=longest + 8, n_batch=longest + 8, n_threads=job["threads"], n_threads_batch=job["threads"],
        logits_all=True, verbose=False, type_k=0, type_v=0, n_gpu_layers=0,  # type 0: a float32 cache
    )  # fmt: skip
    width = llama_cpp.llama_model_n_embd(llm.model)
    layers = llama_cpp.llama_model_n_layer(llm.model)
    out = {f"plain.{index}": one for index, one in enumerate(logits(llm, rows))}
    vector = np.ascontiguousarray(control_vector(job["vector"], layers, width))
    data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if llama_cpp.llama_set_adapter_cvec(llm.ctx, data, vector.size, width, 1, layers):
        raise SystemExit("llama.cpp refuses the control vector")
    out |= {f"steered.{index}": one for index, one in enumerate(logits(llm, rows))}
    save_file(out, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
