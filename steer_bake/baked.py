"""What can be done with a folder that was baked before: find its base, prove it, ask both the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import manifest
from .audit import Audit, audit
from .behaviour import context_length, holds_harmful
from .checkpoint import Checkpoint
from .errors import CheckpointError, RecipeError, did_you_mean
from .evaluate import answers
from .interventions import Intervention
from .llamacpp import validate_vector
from .manifest import Manifest
from .models import load_model, load_tokenizer, resolve
from .prompts import Prompt, check_length, encode
from .recipe import Prompts
from .stages import Advance, Progress, no_empty_folder, silent
from .unbake import Undone, unbake
from .validate import Report, validate

DTYPES = ("auto", "float32", "bfloat16", "float16")


def find_base(found: Manifest, name: str | None, *, progress: Progress = silent) -> Checkpoint:
    """The base of a baked folder: ``name`` where given, else what the manifest says, by revision or by folder.

    Raises:
        CheckpointError: it is not to be had.
    """
    base = found.base
    recorded = f"{base['hub_id']}@{base['revision']}" if base["hub_id"] else base["folder"] or base["name"]
    return _open_base(name or recorded, progress)


def _open_base(name: str, progress: Progress) -> Checkpoint:
    with progress("fetching the base") as advance:
        try:
            folder = resolve(name, progress=advance).folder
        except CheckpointError as error:
            raise CheckpointError(
                f"the base of the baked folder is not to be had: {error}; name it with --base"
            ) from error
    return Checkpoint.open(folder)


def audit_against(folder: Path, base: str | None, *, hash_files: bool = False, progress: Progress = silent) -> Audit:
    """:func:`audit.audit` against the base that is named, or that the folder names itself.

    Raises:
        CheckpointError: the base is not to be had, or ``folder`` was not baked.
    """
    # Where the base is given, a damaged manifest is a failed check, not the end.
    reference = _open_base(base, progress) if base else find_base(manifest.read(folder), None, progress=progress)
    with progress("auditing") as advance:
        return audit(folder, reference, hash_files=hash_files, progress=advance)


def undo(folder: Path, out: Path, base: str | None, *, hash_files: bool = False, progress: Progress = silent) -> Undone:
    """:func:`unbake.unbake`, with the base that is named; where it is needed and not named, the one the folder names.

    Raises:
        CheckpointError: the base is needed and not to be had, or ``out`` cannot be written.
        ValidationFailed: the folder is not what a bake wrote.
    """
    found = manifest.read(folder)
    reference = find_base(found, base, progress=progress) if base or found.originals.needs_base else None
    with no_empty_folder(out), progress("undoing") as advance:
        return unbake(folder, out, reference, hash_files=hash_files, progress=advance)


def proof_rows(source: Prompts, home: Path, base: Checkpoint, decode_tokens: int) -> list[tuple[int, ...]]:
    """The tokens of the prompts that hook and file are compared on.

    Raises:
        RecipeError: the set cannot be read, or a prompt and ``decode_tokens`` more do not fit the model's context.
    """
    encoded = encode(load_tokenizer(base.folder), source.load(home))
    check_length(encoded, context_length(base), decode_tokens)
    return [one.ids for one in encoded]


def certify(
    folder: Path,
    base: Checkpoint,
    interventions: Iterable[Intervention],
    rows: Sequence[Sequence[int]],
    *,
    decode_tokens: int,
    device: str,
    stream: bool = False,
    prefer: str = "smallest",
    target: str = "checkpoint",
    gguf: Path | None = None,
    advance: Advance,
) -> Report:
    """:func:`validate.validate` with the base's own pad token; of a control vector :func:`llamacpp.validate_vector`.

    Raises:
        CheckpointError: the base is missing or damaged; or ``folder`` holds a control vector and there is no ``gguf``.
    """
    if target == "gguf_vector":
        if gguf is None:
            raise CheckpointError(
                f"{folder} holds a control vector, which is proven with the GGUF file of the model it is for: give it "
                "with --gguf"
            )
        return validate_vector(
            folder.absolute(), base.folder.absolute(), gguf, list(interventions), rows, progress=advance
        )
    tokenizer = load_tokenizer(base.folder)
    return validate(
        folder.absolute(), base.folder.absolute(), list(interventions), rows,
        pad_id=int(tokenizer.pad_token_id), device=device, decode_tokens=decode_tokens, stream=stream, prefer=prefer,
        target=target, progress=advance,
    )  # fmt: skip


def ask_both(
    folder: Path,
    base: str | None,
    chosen: Sequence[Prompt],
    *,
    max_new_tokens: int,
    device: str,
    dtype: str,
    progress: Progress = silent,
) -> list[dict[str, str]]:
    """Greedy answers of a baked folder and its base to the same prompts: ``{"prompt", "base", "baked"}`` each.

    Raises:
        RecipeError: a packaged harmful request is among them: of those only labels are ever shown, by ``run``.
    """
    if holds_harmful(chosen):
        raise RecipeError("answers to the packaged harmful requests are not shown; 'steer-bake run' measures refusals")
    found = find_base(manifest.read(folder), base, progress=progress)
    sides = []
    for name, place in (("base", found.folder), ("baked", folder)):
        model = load_model(place, dtype=compute_dtype(dtype, device), device=device)
        with progress(f"asking the {name} model") as advance:
            tokenizer = load_tokenizer(place)
            sides.append(answers(model, tokenizer, chosen, max_new_tokens=max_new_tokens, progress=advance))
        del model
    return [
        {"prompt": prompt.beginning, "base": before, "baked": after}
        for prompt, before, after in zip(chosen, *sides, strict=True)
    ]


def compute_dtype(dtype: str, device: str) -> str:
    """``auto`` on a CPU is float32: it has no fast path for bfloat16, and widening the stored values loses nothing.

    Raises:
        RecipeError: no such dtype.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"no compute dtype {dtype!r}: {did_you_mean(dtype, DTYPES)}")
    return "float32" if dtype == "auto" and device == "cpu" else dtype
