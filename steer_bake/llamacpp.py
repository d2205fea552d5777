"""The certificate of a control vector: does llama.cpp with that file compute what the hooks compute?

The reference is the base in float32 with hooks, the candidate a GGUF file of the same base in llama.cpp with the
control vector loaded, in a process that never imports steer_bake. A quantised GGUF is another function than its base to
begin with: how far llama.cpp without the vector is from the base without hooks is measured, and is the yardstick.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open

from . import control, llamacpp_worker
from .checkpoint import Checkpoint
from .checks import Check
from .comparison import Distance
from .contents import acted_on
from .control import check_vector
from .errors import CheckpointError
from .interventions import Intervention
from .models import load_model
from .plan import describe, make_plan
from .reload_worker import logits
from .steering import steer
from .validate import Report

#: How much farther from the hooks the steered GGUF may be than the plain one is from the base: it is another stream.
NOISE_MARGIN = 2.0
#: KL of float32 rounding, which a GGUF in float32 has.
LEAST_NOISE = 1e-8
#: The vector must do much more than the noise, or the comparison could not tell.
LEAST_EFFECT = 4.0

Progress = Callable[[int, int], None]


def validate_vector(
    folder: Path,
    base_folder: Path,
    gguf: Path,
    interventions: Sequence[Intervention],
    rows: Sequence[Sequence[int]],
    *,
    progress: Progress | None = None,
) -> Report:
    """Compare llama.cpp, running the model ``gguf`` with the control vector in ``folder``, with the hooked base.

    ``rows`` are tokenised prompts. Failing checks are in the report. ``progress`` counts prompts.

    Raises:
        CheckpointError: the base or ``gguf`` is missing, or llama-cpp-python is not installed.
    """
    if find_spec("llama_cpp") is None:
        raise CheckpointError(
            "proving a control vector takes llama.cpp; install it with: pip install 'steer-bake[llamacpp]'"
        )
    if not gguf.is_file():
        raise CheckpointError(f"{gguf} is not there; give the GGUF file of the model that the control vector is for")
    base = Checkpoint.open(base_folder)
    plan = make_plan(base, interventions, target="gguf_vector")
    checks = [check_vector(folder, plan)]
    effect, noise, exact = Distance(), Distance(), Distance()
    with tempfile.TemporaryDirectory(prefix="steer-bake-validate-") as name:
        scratch = Path(name)
        problem = _run(gguf, folder / control.FILE, rows, scratch) if checks[0].passed else "the vector is another"
        checks.append(Check("llama.cpp", problem is None, None, None, problem or f"{gguf.name} runs with the vector"))
        if problem is None:
            model = load_model(base_folder, dtype="float32")
            with safe_open(scratch / "logits.safetensors", framework="pt") as found:
                for index, row in enumerate(rows):
                    plain = logits(model, [row], 0)
                    with steer(model, plan.interventions):
                        hooked = logits(model, [row], 0)
                    width = plain.shape[1]
                    effect.update(plain, hooked)
                    noise.update(plain, found.get_tensor(f"plain.{index}")[:, :width])
                    exact.update(hooked, found.get_tensor(f"steered.{index}")[:, :width])
                    if progress is not None:
                        progress(index + 1, len(rows))
            checks += _checks(effect, noise, exact)
    gaps = {"llama.cpp": exact.gap(), "llama.cpp, no vector": noise.gap()} if exact.tokens else {}
    return Report(
        str(folder), str(base_folder), plan.sha256, all(check.passed for check in checks), tuple(checks),
        (effect if effect.tokens else _nothing()).gap(), gaps, noise.gap().kl if noise.tokens else None,
        tuple(describe(one) for one in plan.interventions), len(rows), sum(map(len, rows)), acted_on(folder),
    )  # fmt: skip


def _checks(effect: Distance, noise: Distance, exact: Distance) -> list[Check]:
    moved, apart, off = effect.gap(), noise.gap(), exact.gap()
    limit = NOISE_MARGIN * max(apart.kl, LEAST_NOISE)
    needed = LEAST_EFFECT * max(apart.kl, LEAST_NOISE)
    return [
        Check(
            "function, llama.cpp", off.kl <= limit, off.kl, limit,
            f"KL(hooks || llama.cpp) {off.kl:.2e}, without vector and hooks {apart.kl:.2e}; same likeliest token "
            f"{100 * off.top1:.1f} %, without {100 * apart.top1:.1f} %; max gap {off.max_over_std:.1e} std",
        ),
        Check(
            "effect", moved.kl >= needed, moved.kl, needed,
            f"hooks move the logits by {moved.max_over_std:.3g} std, KL {moved.kl:.3g}"
            + ("" if moved.kl >= needed else ": too little to be told from the noise of this GGUF file"),
        ),
    ]  # fmt: skip


def _nothing() -> Distance:
    empty = Distance()
    empty.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
    return empty


def _run(gguf: Path, vector: Path, rows: Sequence[Sequence[int]], scratch: Path) -> str | None:
    """What went wrong; None where the logits lie in ``scratch`` now."""
    job = {
        "gguf": str(gguf.absolute()),
        "vector": str(vector.absolute()),
        "rows": [list(row) for row in rows],
        "threads": torch.get_num_threads(),
        "out": str(scratch / "logits.safetensors"),
    }
    (scratch / "job.json").write_text(json.dumps(job))
    command = [sys.executable, llamacpp_worker.__file__, str(scratch / "job.json")]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", cwd=scratch
    )
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"llama.cpp cannot run {gguf.name} with the vector: {said[-1]}"
