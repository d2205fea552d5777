"""Runs in a fresh process that never imports steer_bake: what a user of plain transformers would get.

``python reload_worker.py job.json``: loads every candidate of the job strictly and writes its logits, greedy tokens and
stream readings to safetensors files. The functions are also what measures the hooked reference, so that both sides are
read with the same instrument.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":  # this file lives inside a package whose module names must not shadow installed ones
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging


def load_strict(
    folder: str, dtype: str, device: str = "cpu", *, stream: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """The model by plain transformers, on ``device`` if it is whole, and one sentence per key that did not fit exactly.

    ``stream``: its weights stay on disk until they are used (``streaming.py``).
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if stream:
        model, info = _streaming().load_streamed(folder, getattr(torch, dtype), device)
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True,
            use_safetensors=True, local_files_only=True, trust_remote_code=False,
        )  # fmt: skip
        model, info = loaded
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    problems = [f"{kind.replace('_', ' ')}: {key}" for kind in kinds for key in sorted(map(str, info[kind]))]
    return model.eval() if problems or stream else model.eval().to(device), problems


def load_adapted(
    base: str, adapter: str, through: str, dtype: str, device: str = "cpu"
) -> tuple[PreTrainedModel, list[str]]:
    """``base`` with the PEFT adapter on it, loaded ``through`` the class of that name, and what did not fit exactly.

    ``AutoModelForCausalLM`` and ``AutoPeftModelForCausalLM`` find the base by themselves: the adapter's config must
    name ``base``.
    """
    import peft

    if through == "PeftModel":
        plain, problems = load_strict(base, dtype, "cpu")
        if problems:
            return plain, problems
        model: Any = peft.PeftModel.from_pretrained(plain, adapter, local_files_only=True)
    else:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        kinds: dict[str, Any] = {
            "AutoModelForCausalLM": AutoModelForCausalLM,
            "AutoPeftModelForCausalLM": peft.AutoPeftModelForCausalLM,
        }
        model = kinds[through].from_pretrained(
            adapter, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    return model.eval().to(device), _adapter_problems(model, load_file(Path(adapter) / "adapter_model.safetensors"))


def _adapter_problems(model: nn.Module, stored: dict[str, Tensor]) -> list[str]:
    """Where the adapter's tensors in ``model`` are not exactly the file's: PEFT itself only warns, or does not."""
    loaded = {}
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            bare = name.removeprefix("base_model.model.").replace(".default", "")
            loaded[f"base_model.model.{bare}"] = tensor
    problems = [f"missing keys: {name}" for name in sorted({*loaded} - {*stored})]
    problems += [f"unexpected keys: {name}" for name in sorted({*stored} - {*loaded})]
    for name in sorted({*loaded} & {*stored}):
        held = loaded[name]
        if held.shape != stored[name].shape or not torch.equal(held.cpu(), stored[name].to(held.dtype)):
            problems.append(f"other values than in the file: {name}")
    return problems


def _streaming() -> Any:
    """The module beside this file, by its path: a process that runs this file has no package to import it from."""
    spec: Any = importlib.util.spec_from_file_location("streaming", Path(__file__).with_name("streaming.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count_passes(model: PreTrainedModel, advance: Callable[[], object]) -> None:
    """Call ``advance`` whenever a forward of ``model`` begins."""

    def began(_model: Any, _args: Any) -> None:
        advance()

    model.register_forward_pre_hook(began)


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their attention mask, both [batch, longest]."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@torch.inference_mode()
def logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Logits of the real tokens of one left-padded batch, [tokens, vocab] float32."""
    ids, mask = (part.to(model.device) for part in pad(rows, pad_id))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return out[mask.bool()].float().cpu()


@contextmanager
def nudged(model: PreTrainedModel, draw: int) -> Iterator[None]:
    """Another draw of the rounding noise: every number of the embedding's output moves by up to half a unit in its
    last place. Draw 0 is the model as it is."""

    def nudge(_module: Any, _args: Any, output: Tensor) -> Tensor:
        wide = torch.float64 if output.dtype == torch.float32 else torch.float32  # holds 1 + eps * random
        random = torch.rand(output.shape, generator=source).to(wide) - 0.5
        moved = output.cpu().to(wide) * (1 + torch.finfo(output.dtype).eps * random)  # not every device has float64
        return moved.to(output.dtype).to(output.device)

    source = torch.Generator().manual_seed(draw)
    handle = model.get_input_embeddings().register_forward_hook(nudge) if draw else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def drawn(model: PreTrainedModel, job: dict[str, Any], draws: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    """Every draw, number of a batch, and its :func:`logits`."""
    for draw in draws:
        with nudged(model, draw):
            for index, rows in enumerate(job["batches"]):
                yield draw, index, logits(model, rows, job["pad_id"])


@torch.inference_mode()
def greedy(model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int, tokens: int) -> Tensor:
    """Cached greedy decoding of one left-padded batch, [batch, <= tokens] ids, padded with ``pad_id`` after the end."""
    ids, mask = (part.to(model.device) for part in pad(rows, pad_id))
    out: Tensor = cast(Any, model).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, num_beams=1,
        repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True, pad_token_id=pad_id,
    )  # fmt: skip
    return out[:, ids.shape[1] :].cpu().contiguous()


@torch.inference_mode()
def readings(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int, probes: Sequence[dict[str, Any]], along: Tensor
) -> Tensor:
    """How far the stream is from what it must be along fixed directions: max over tokens of ``|u.h - expected| / |h|``.

    ``probes``: ``{"module", "side": "input" | "output", "expected": [m numbers]}`` per residual site; ``along``:
    ``[d, m]`` unit vectors. Returns [probes, m].
    """
    found = torch.zeros(len(probes), along.shape[1])
    ids, mask = (part.to(model.device) for part in pad(rows, pad_id))
    real = mask.bool()

    def read(index: int, h: Tensor) -> None:
        # Some layers flatten batch and sequence, and some models put tokens of their own before the prompt.
        wide = h.reshape(len(real), -1, len(along))[:, -real.shape[1] :][real].double().cpu()
        off = (wide @ along.double() - torch.tensor(probes[index]["expected"], dtype=torch.float64)).abs()
        found[index] = torch.maximum(found[index], (off / wide.norm(dim=-1, keepdim=True)).amax(0).float())

    def pre_hook(index: int) -> Any:
        return lambda _module, args, kwargs: read(index, args[0] if args else kwargs["hidden_states"])

    def hook(index: int) -> Any:
        return lambda _module, _args, output: read(index, output[0] if isinstance(output, (tuple, list)) else output)

    with ExitStack() as stack:
        for index, probe in enumerate(probes):
            module = _module(model, probe["module"])
            if probe["side"] == "input":
                handle = module.register_forward_pre_hook(pre_hook(index), with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook(index))
            stack.callback(handle.remove)
        logits(model, rows, pad_id)
    return found


def _module(model: PreTrainedModel, path: str) -> nn.Module:
    """The module at ``path``, also where it is that of the text decoder inside a multimodal model."""
    root, _, bare = path.partition(".")
    for inside in ("", "base_model.model."):  # PEFT puts a model inside its own
        for candidate in (path, f"{root}.language_model.{bare}"):
            try:
                return model.get_submodule(inside + candidate)
            except AttributeError:
                continue
    raise AttributeError(f"the model has no module {path}")


def measure(
    model: PreTrainedModel, job: dict[str, Any], along: Tensor, out: Path, *, draws: Sequence[int], whole: bool
) -> None:
    """Write ``<out>.<batch>.safetensors`` with each batch's logits, ``<out>.<batch>.<draw>.safetensors`` with those of
    further draws; ``whole``: decoding and readings too."""
    for draw, index, found in drawn(model, job, draws):
        save_file({"logits": found}, f"{out}.{index}{f'.{draw}' if draw else ''}.safetensors")
    if whole:
        rest = {"greedy": greedy(model, job["decode"], job["pad_id"], job["decode_tokens"])}
        if job["probes"]:
            probes = [{**probe, "module": probe["baked"]} for probe in job["probes"]]  # layers may have moved
            rest["readings"] = readings(model, job["batches"][0], job["pad_id"], probes, along)
        save_file(rest, f"{out}.safetensors")


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    along = load_file(job["along"])["along"]
    problems = {}
    out = Path(job["out"])
    with open(out / "passes", "wb", buffering=0) as passes:
        for candidate in job["candidates"]:
            name, dtype, draws = candidate["name"], candidate["dtype"], candidate["draws"]
            if "adapter" in candidate:
                model, problems[name] = load_adapted(
                    candidate["folder"], candidate["adapter"], candidate["through"], dtype, job["device"]
                )
            else:
                model, problems[name] = load_strict(candidate["folder"], dtype, job["device"], stream=job["stream"])
            if not problems[name]:
                count_passes(model, lambda: passes.write(b"."))  # a byte for each: the file's length is the count
                measure(model, job, along, out / name, draws=draws, whole=name == "float32" and 0 in draws)
            del model
    if "steer_bake" in sys.modules:
        raise SystemExit("steer_bake was imported; the process is not plain transformers")
    (out / "problems.json").write_text(json.dumps(problems))


if __name__ == "__main__":
    main(sys.argv[1])
