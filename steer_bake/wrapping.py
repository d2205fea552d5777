"""What an adapter can be put on: for every tensor of a checkpoint, the module or the parameter of the class it becomes.

PEFT names modules of the class, not tensors on disk: loading renames some tensors and stacks experts into one. The
class is built on the meta device and asked, with the renaming that loading itself uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .architectures import parse
from .checkpoint import Checkpoint
from .skeleton import on_meta

#: Names that PEFT takes for experts in a class that stacks them, wherever they are: by full name it would adapt the
#: experts of every layer instead. As parameters they are taken at their word.
_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True)
class Place:
    """What PEFT wraps to reach a tensor."""

    path: str  # of the module; of a parameter that no module of a known kind holds, its own
    kind: str  # "linear", "conv1d", "embedding" or "parameter"; "bias": the bias of a module that is linear or conv1d
    shape: tuple[int, ...]  # of the class's tensor
    out: int  # the axis of that tensor which lora_B covers; lora_A covers the other one
    sources: tuple[str, ...]  # the tensors on disk, in the order in which they are stacked; one: it is taken as it is
    order: int = 0  # of a parameter among those of its module: PEFT wraps the first one innermost

    @property
    def module(self) -> str:
        """The path of the module that is wrapped."""
        return self.path.rpartition(".")[0] if self.kind == "parameter" else self.path


_known: WeakKeyDictionary[Checkpoint, dict[str, Place]] = WeakKeyDictionary()


def places(base: Checkpoint) -> dict[str, Place]:
    """The place of every tensor of ``base`` that PEFT can reach, by its name on disk.

    Raises:
        CheckpointError: the config's class cannot be built.
        UnknownArchitecture: transformers has no class of this type.
    """
    if base not in _known:
        _known[base] = _found(base, on_meta(parse(base.config)))
    return _known[base]


def _found(base: Checkpoint, model: PreTrainedModel) -> dict[str, Place]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stacks, sparse = _stacks(base, model)
    found = {}
    for path, sources in stacks.items():
        if path not in parameters:
            continue
        inside, _, leaf = path.rpartition(".")
        shape = tuple(parameters[path].shape)
        place = _place(model.get_submodule(inside), inside, leaf, shape, tuple(sources), sparse)
        if place is not None:
            found.update(dict.fromkeys(sources, place))
    return found


def _place(
    module: nn.Module, inside: str, leaf: str, shape: tuple[int, ...], sources: tuple[str, ...], sparse: bool
) -> Place | None:
    remapped = sparse and inside.rpartition(".")[2] in _EXPERTS
    if not remapped and isinstance(module, (nn.Linear, Conv1D)) and leaf in ("weight", "bias"):
        kind = "linear" if isinstance(module, nn.Linear) else "conv1d"
        if leaf == "bias":
            return Place(inside, "bias", shape, 0, sources)
        return Place(inside, kind, shape, 0 if kind == "linear" else 1, sources)
    if isinstance(module, nn.Embedding):
        return Place(inside, "embedding", shape, 1, sources)
    if len(shape) not in (2, 3):
        return None
    out = 0 if len(shape) == 2 else 2 if getattr(module, "is_transposed", False) else 1
    order = [name for name, _ in module.named_parameters(recurse=False)].index(leaf)
    return Place(f"{inside}.{leaf}", "parameter", shape, out, sources, order)


def _stacks(base: Checkpoint, model: PreTrainedModel) -> tuple[dict[str, list[str]], bool]:
    """The tensors on disk of every parameter that is one of them, or several in a stack (other mixtures are left out),
    and whether there is a stack."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # as heavy as all of the models
    from transformers.core_model_loading import (
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    wanted = model.state_dict()
    found: dict[str, list[str]] = {}
    sparse = False
    for name in sorted(base.tensors, key=dot_natural_key):
        path, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        operations = [] if pattern is None else by_pattern[pattern].operations
        stacked = len(operations) == 1 and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0
        sparse = sparse or stacked
        if pattern is None or stacked:
            found.setdefault(path, []).append(name)
    return found, sparse
