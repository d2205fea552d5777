"""A PEFT adapter: rank-one LoRA for projections, lora_bias for shifts, exactly the edit, in a file of kilobytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save as to_bytes

from .. import adapter, manifest
from ..checkpoint import Checkpoint, check_outside, publish
from ..checkpoint.carry import LICENCES, carry, write_file, write_json
from ..models import ModelRef, is_commit
from ..originals import beside
from ..plan import Plan


def check(plan: Plan, base: Checkpoint) -> None:
    """Raise NotFoldable where PEFT cannot hold the plan in one adapter."""
    adapter.parts(plan, base)


def lora(
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
    """Write ``plan`` as an adapter for ``base`` into the folder ``out``.

    The adapter names its base by hub id and commit where the bytes of ``base`` are proven to be those of that commit,
    and otherwise by its folder. Many adapters can be put on one base, whatever was baked into it: ``stack`` is not
    needed.

    Raises:
        CheckpointError: ``out`` is in the way or cannot be written, the base has other bytes than its commit, or its
            matrices are needed and were left on the hub.
    """
    check_outside(base.folder, out)
    total, done = max(1, sum(base.tensors[one.source].nbytes for one in plan.edits if one.source)), 0

    def advance(size: int) -> None:
        nonlocal done
        done = min(done + size, total)
        if progress is not None:
            progress(done, total)

    proven = is_commit(ref, base)
    name = ref.hub_id if proven and ref.hub_id else str(base.folder.resolve())
    with publish(out, overwrite=overwrite) as folder:
        # No tokenizer: it is the base's, and where one is longer than the embedding PEFT's AutoPeftModel resizes that.
        records = carry(base.folder, folder, LICENCES)
        content = adapter.config(plan, base, name, ref.revision if proven else None)
        records.append(write_json(folder / adapter.CONFIG, content))
        data = to_bytes(adapter.tensors(plan, base, advance), metadata={"format": "pt"})
        records.append(write_file(folder / adapter.WEIGHTS, data))
        manifest.write(folder, plan, ref, records, beside(base), recipe=recipe)
    return out
