"""A llama.cpp control vector: additions at the end of layers as one small GGUF file, for any GGUF of the base."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .. import control, manifest
from ..checkpoint import Checkpoint, FileRecord, check_outside, publish
from ..checkpoint.carry import LICENCES, carry
from ..models import ModelRef
from ..originals import beside
from ..plan import Plan


def gguf_vector(
    plan: Plan,
    base: Checkpoint,
    ref: ModelRef,
    out: Path,
    *,
    recipe: str | None = None,
    stack: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``plan`` as ``control_vector.gguf``, the licence of the base and a manifest into the folder ``out``.

    Raises:
        CheckpointError: ``out`` is in the way or cannot be written.
        RecipeError: the package gguf is missing.
    """
    check_outside(base.folder, out)
    with publish(out, overwrite=overwrite) as folder:
        records = carry(base.folder, folder, LICENCES)
        path = control.write(folder, plan)
        data = path.read_bytes()
        records.append(FileRecord(path.name, len(data), "written", hashlib.sha256(data).hexdigest(), None, None))
        manifest.write(folder, plan, ref, records, beside(base), recipe=recipe)
        if progress is not None:
            progress(1, 1)
    return out
