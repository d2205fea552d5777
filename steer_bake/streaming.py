"""A model larger than memory: every weight is read from disk when its module runs, and forgotten after it.

Like ``reload_worker.py`` this file knows nothing of steer_bake: it also runs where plain transformers is on trial.
transformers builds the model, maps the checkpoint's keys to it and says which of them do not fit, as it always does;
but what it is given to load are stand-ins that take no memory. Which tensor became which parameter is then read off the
model itself, by address, so that no rule about names is repeated here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

_ONE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def why_not(folder: str) -> str | None:
    """Why the model of ``folder`` cannot be read piece by piece, or None where it can; no weight is looked at.

    It can where transformers loads the tensors of the checkpoint as they are, and not quantised or merged into others.
    """
    empty = _empty(folder, torch.float32)
    if (Path(folder) / "adapter_config.json").exists():
        return f"{folder} holds an adapter"
    if getattr(empty.config, "quantization_config", None) is not None:
        return f"{folder} is quantised"
    if any(isinstance(step, WeightConverter) for step in get_model_conversion_mapping(empty)):
        return f"transformers merges tensors when it loads a model of type {empty.config.model_type!r}"
    return None


def load_streamed(folder: str, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of ``folder``, computing in ``dtype`` on ``device``, and transformers' loading info.

    Between two uses a parameter is a view of a single NaN. A weight that is used where its own module does not run
    therefore makes the outputs NaN, never merely wrong. Memory: the largest tensor in ``dtype`` and as stored.

    Raises:
        ValueError: see :func:`why_not`.
    """
    reason = why_not(folder)
    if reason:
        raise ValueError(f"{reason}, so that it cannot be read piece by piece")
    empty = _empty(folder, dtype)
    places = _places(Path(folder))
    stand_ins = {name: _stand_in(place.shape, dtype) for name, place in places.items()}
    loaded: Any = type(empty).from_pretrained(
        None, config=empty.config, state_dict=stand_ins, dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    model.generation_config = _generation_config(folder)
    if not any(info.values()):
        _read_when_needed(model, {stand_ins[name].data_ptr(): place for name, place in places.items()}, dtype, device)
    return model, info


class _Place(NamedTuple):
    """Where a tensor of the checkpoint lies."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with _opened(self.file) as source:
            tensor: Tensor = source.get_tensor(self.name)
        return tensor


def _empty(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return empty


def _places(folder: Path) -> dict[str, _Place]:
    """Every tensor that transformers would read, by name: the one file goes before an index."""
    files = [_ONE_FILE]
    if not (folder / _ONE_FILE).exists():
        files = sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    found = {}
    for file in files:
        with _opened(folder / file) as source:
            for name in source.keys():
                found[name] = _Place(folder / file, name, tuple(source.get_slice(name).get_shape()))
    return found


def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt", device="cpu")


def _stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    # Two NaN are never equal: what transformers ties where two tensors of a checkpoint are equal stays two tensors.
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


def _generation_config(folder: str) -> GenerationConfig:
    """As ``from_pretrained`` finds it."""
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", local_files_only=True, _from_model_config=True
        )


def _read_when_needed(model: nn.Module, places: Mapping[int, _Place], dtype: torch.dtype, device: str) -> None:
    """Give every module that has weights of its own hooks that read them and forget them; ``places`` by address."""
    stored = model.state_dict(keep_vars=True)
    for path, module in model.named_modules():
        own: dict[str, _Place] = {}
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{path}.{name}" if path else name
            if full not in stored:  # computed, not loaded
                setattr(module, name, tensor.to(device))
            elif tensor.data_ptr() in places and isinstance(tensor, nn.Parameter):
                own[name] = places[tensor.data_ptr()]
            else:
                raise ValueError(f"transformers changes {full} on loading, so that it cannot be read piece by piece")
        if own:
            _hook(module, own, dtype, device)


def _hook(module: nn.Module, own: Mapping[str, _Place], dtype: torch.dtype, device: str) -> None:
    absent = {name: _stand_in(place.shape, dtype, device) for name, place in own.items()}

    def set_all(value: Callable[[str], Tensor]) -> None:
        for name in own:
            setattr(module, name, nn.Parameter(value(name), requires_grad=False))

    def arrive(_module: nn.Module, _args: Any) -> None:
        set_all(lambda name: own[name].read().to(device).to(dtype))

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        set_all(absent.__getitem__)

    set_all(absent.__getitem__)
    module.register_forward_pre_hook(arrive)
    module.register_forward_hook(leave, always_call=True)
