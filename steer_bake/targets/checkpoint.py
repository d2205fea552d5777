"""A full checkpoint folder for plain transformers: untouched shards linked, edits written, manifest beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .. import manifest, originals
from ..checkpoint import Checkpoint, publish, write_edited
from ..errors import CheckpointError
from ..models import ModelRef
from ..plan import Plan


def checkpoint(
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
    """Bake ``plan`` into a copy of ``base`` at ``out``.

    Raises:
        CheckpointError: ``out`` is in the way, the base was baked before and ``stack`` is not set, or writing failed.
    """
    if out.absolute() == base.folder.absolute() or base.folder.absolute() in out.absolute().parents:
        raise CheckpointError(f"{out} lies in the base model's own folder; choose a place outside {base.folder}")
    before = None
    if manifest.exists(base.folder):
        if not stack:
            raise CheckpointError(
                f"{base.folder} was baked already ({manifest.JSON_FILE} is there); bake its base instead, or stack "
                "this steering on top of it with --stack"
            )
        before = json.loads((base.folder / manifest.JSON_FILE).read_text())
    with publish(out, overwrite=overwrite) as folder:
        records = write_edited(
            base, plan.edits, folder, config_changes=plan.config_changes, rename=plan.rename, dropped=plan.dropped,
            progress=progress,
        )  # fmt: skip
        kept = originals.keep(base, plan.edits, records, plan.rename, plan.dropped)
        manifest.write(folder, plan, ref, records, kept, recipe=recipe, stacked_on=before)
    return out
