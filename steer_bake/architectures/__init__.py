"""What each model family's residual stream looks like: one file per layout, variants as data.

Two columns that share nothing: *modules* (what a hook attaches to) and *tensors* (what a bake edits). A mistake in
either one makes hook and bake disagree, and the certificate fails.

A block lists every writer that some variant has; a layer has those whose module, or whose tensor, is there. That is how
one layout serves dense and sparse, attention and state-space layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from .. import registry
from ..errors import CheckpointError, RecipeError, UnknownArchitecture
from ..skeleton import Skeleton, skeleton

#: The two places of a layer where the stream is written, in forward order.
SLOTS = ("attention", "mlp")

Scale = Callable[[Any], float]

NORMED = "a norm stands between the writers and the stream"


def unscaled(config: Any) -> float:
    """Most writers add their output as it is."""
    return 1.0


def sequential(config: Any) -> bool:
    """Most layers add the attention's write before the MLP reads."""
    return False


def always(config: Any, layer: int) -> bool:
    """Most layers hand on nothing but the stream."""
    return True


@dataclass(frozen=True)
class Weight:
    """A tensor on disk that writes to the stream; ``*`` in its name stands for the number of an expert."""

    name: str  # below the layer (of an embedding: in full)
    axis: int = 0  # the residual axis: 0 for a Linear [d, in], 1 for an embedding [vocab, d] or a Conv1D [in, d]
    bias: str = ""  # what the class calls its bias, [d] or [experts, d]; by default the name with "bias" for "weight"
    whole: bool = True  # its bias reaches the stream once, unweighted; not so behind a gate or a router
    mixed: bool = False  # of routed experts: their weights sum to 1, so that what all of them write is whole
    scale: Scale = unscaled  # the stream gets this times what the tensor writes
    offset: float = 0.0  # of a norm: it multiplies by this plus the tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "bias", self.bias or self.name.removesuffix("weight").rstrip("_") + "bias")


#: By the last name of a plain MLP's writer: what stands before it.
_BEFORE = {
    "c_proj": "c_fc",
    "dense_4h_to_h": "dense_h_to_4h",
    "down_proj": "up_proj",
    "fc2": "fc1",
    "fc_out": "fc_in",
}
#: By the last name of a gated MLP's writer: gate and up before it, or both in one tensor.
_GATES = {
    "down_proj": (("gate_proj", "up_proj"), ("gate_up_proj",)),
    "w2": (("w1", "w3"),),
    "fc2": (("fc1",),),
    "output_linear": (("input_linear",),),
}


def gates(name: str) -> tuple[tuple[str, ...], ...]:
    """The tensors that may stand before the writer ``name`` of a gated MLP, as alternatives."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    return tuple(tuple(f"{path}.{one}.weight" for one in pair) for pair in _GATES.get(last, ()))


def before(name: str) -> str:
    """The tensor that may stand before the writer ``name`` of an MLP without a gate; empty where none is known."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{path}.{_BEFORE[last]}.weight".removeprefix(".") if last in _BEFORE else ""


@dataclass(frozen=True)
class Block:
    """A sublayer that writes to the stream. Names are those below its layer; of the embedding, full ones."""

    # Hook column
    module: str  # its output (or the first item of it) is added to the stream
    # Bake column
    weights: tuple[Weight, ...]
    unlock: tuple[str, ...] = ()  # config flags of which one may make the class create the missing bias
    rigid: str = ""  # why no linear part folds into the weights; empty where it does
    alone: bool = False  # where it is there, the slot's other blocks write to it and not to the stream
    inner: tuple[Weight, ...] = ()  # of a norm at a sublayer's end: the sublayer's own writers, which it normalises
    # Hook column again
    scale: Scale = unscaled  # the stream gets this times the module's output
    reads: str = ""  # of an MLP: the module whose input is what the MLP reads; by default the module itself


@dataclass(frozen=True)
class Architecture:
    """A family's layout. Functions of the config take the family's own config object."""

    model_types: tuple[str, ...]
    embedding: Block
    attention: tuple[Block, ...]  # of a layer: those that are there
    mlp: tuple[Block, ...]
    stack: str = "model.layers"  # the list of decoder layers
    middle: str = ""  # the module of a layer whose input is resid_mid; empty where none is
    parallel: Callable[[Any], bool] = sequential
    head: str = "lm_head.weight"  # the tensor that untying creates
    indexed: str = ""  # why no layer may be inserted: what depends on a layer's number
    # Whether a layer like this one hands on unchanged what later layers read beside the stream: it may be inserted then
    bystander: Callable[[Any, int], bool] = always
    gains: tuple[str, ...] = ()  # tensors of a layer that multiply the stream: ones in an inserted layer
    # What an inserted layer can be made of, where no writer has a bias; names below the layer
    value: str = ""  # the attention's value projection
    unit: float = 1.0  # the weight with which the norm before the MLP has gain 1

    def blocks(self, slot: str) -> tuple[Block, ...]:
        return self.attention if slot == "attention" else self.mlp


@dataclass(frozen=True, eq=False)
class Layout:
    """An architecture bound to one model's config."""

    architecture: Architecture
    parsed: PretrainedConfig  # the whole config as its class reads it
    path: tuple[str, ...] = ()  # the keys under which the decoder's own config lies

    @property
    def text(self) -> Any:
        """The decoder's own config object."""
        found: Any = self.parsed
        for key in self.path:
            found = getattr(found, key)
        return found

    @property
    def model_type(self) -> str:
        return str(self.text.model_type)

    @cached_property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return self._number("num_hidden_layers")

    @cached_property
    def width(self) -> int:
        """How many components the residual stream has."""
        return self._number("hidden_size")

    @property
    def parallel(self) -> bool:
        """True where attention and MLP read the same stream: there is no resid_mid then."""
        return self.architecture.parallel(self.text)

    @property
    def activation(self) -> str:
        """What the config calls the MLP's activation function; empty where it has no name for it."""
        names = ("hidden_activation", "hidden_act", "activation_function", "activation")
        found = (getattr(self.text, name, None) for name in names)
        return next((one for one in found if isinstance(one, str)), "")

    def layer(self, number: int) -> str:
        """The path of a decoder layer."""
        return f"{self.architecture.stack}.{number}"

    def key(self, attribute: str) -> str:
        """How config.json spells ``attribute`` of the decoder's config."""
        return str(self.text.attribute_map.get(attribute, attribute))

    def change(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """``values`` of the decoder's config as changes of config.json."""
        found: dict[str, Any] = {self.key(name): value for name, value in values.items()}
        for key in reversed(self.path):
            found = {key: found}
        return found

    @cached_property
    def skeleton(self) -> Skeleton:
        """What the model's class wants to load, by the names of this layout."""
        return self.skeleton_of(self.parsed)

    def skeleton_of(self, config: PretrainedConfig) -> Skeleton:
        """What the class wants to load with another ``config``; a multimodal one has the decoder further inside."""
        found = skeleton(config)
        old, new = self.root(found)
        return {old + name.removeprefix(new) if name.startswith(new) else name: found[name] for name in found}

    def root(self, names: Iterable[str]) -> tuple[str, str]:
        """What the names of the layout begin with, and what ``names`` of tensors begin with instead."""
        first = f"{self.architecture.stack}.0."
        root, _, bare = first.partition(".")
        others = (f"{root}.language_model.", f"language_model.{root}.", f"{root}.text_model.", "backbone.")
        known = list(names)
        for candidate in (first, bare, *(f"{other}{bare}" for other in others)):
            if any(name.startswith(candidate) for name in known):
                return first.removesuffix(bare), candidate.removesuffix(bare)
        return "", ""

    def untied(self) -> dict[str, Any]:
        """The changes of config.json that give the head a table of its own; a wrapper and its decoder both say so."""
        return {"tie_word_embeddings": False, **(self.change({"tie_word_embeddings": False}) if self.path else {})}

    def modules(self, model: nn.Module, slot: str, layer: int) -> list[tuple[Block, nn.Module]]:
        """The blocks of a slot that a layer of ``model`` has, each with the module to hook."""
        parent = submodule(model, self.layer(layer))
        found = []
        for block in self.architecture.blocks(slot):
            try:
                found.append((block, parent.get_submodule(block.module)))
            except AttributeError:
                continue
            if block.alone:
                break
        return found

    def reader(self, model: nn.Module, layer: int) -> nn.Module:
        """The module whose input is what the MLP of a layer reads: the stream behind the MLP's norm.

        Raises:
            RecipeError: no module of this layer is known to read that.
        """
        for block, module in self.modules(model, "mlp", layer):
            if block.reads:
                return submodule(model, self.layer(layer)).get_submodule(block.reads)
            if block.rigid != NORMED:
                return module
        raise RecipeError(f"mlp_in.{layer} is nowhere in this {self.model_type} model: its layer has no MLP that reads")

    def _number(self, attribute: str) -> int:
        value = getattr(self.text, attribute, None)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"config.json has {self.key(attribute)}={value!r}, where a positive number is needed; "
                "is the file complete?"
            )
        return value


def layout(config: Mapping[str, Any] | PretrainedConfig) -> Layout:
    """The layout of the model with this config (as read from config.json, or a model's own).

    A decoder inside a multimodal model is found under its ``text_config``.

    Raises:
        UnknownArchitecture: no file claims the type; the message lists the types that are known.
        CheckpointError: the config's own class cannot read it.
    """
    parsed = config if isinstance(config, PretrainedConfig) else parse(config)
    known = claimed()
    found, path = parsed, tuple[str, ...]()
    if parsed.model_type not in known:
        for name in ("text_config", "decoder"):
            inner = getattr(parsed, name, None)
            if isinstance(inner, PretrainedConfig) and inner.model_type in known:
                found, path = inner, (name,)
    if found.model_type not in known:
        raise UnknownArchitecture(
            f"model type {parsed.model_type!r} is not described in architectures/: it can be read and steered with "
            "hooks, and is never baked. Add a file there, or choose a model of a known type: "
            f"{', '.join(sorted(known))}"
        )
    return Layout(known[found.model_type], parsed, path)


def layout_tried(config: PretrainedConfig) -> Layout:
    """What shows when the layers of a small random model of this config's class are tried; for reading only.

    Raises:
        UnknownArchitecture: no small model can be built, or no stream through a stack of layers was found.
    """
    from ._probing import probed, small  # which need what is defined here

    return probed(small(config))


_probed: WeakKeyDictionary[nn.Module, Layout] = WeakKeyDictionary()


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of ``model`` for hooks: the described one, or else what shows when its layers are tried.

    Raises:
        UnknownArchitecture: its type is not described, and no stream through a stack of layers was found.
    """
    try:
        return layout(model.config)
    except UnknownArchitecture:
        if not isinstance(model, PreTrainedModel):
            raise
    from ._probing import probed  # as above

    if model not in _probed:
        _probed[model] = probed(model)
    return _probed[model]


def claimed() -> dict[str, Architecture]:
    """Every described model type and its architecture."""
    return {
        model_type: architecture
        for variants in registry.load_all("architectures").values()
        for architecture in variants
        for model_type in architecture.model_types
    }


def parse(config: Mapping[str, Any]) -> PretrainedConfig:
    """The config object that transformers makes of a ``config.json``.

    Raises:
        UnknownArchitecture: this transformers has no class for its model type.
        CheckpointError: the class rejects its content.
    """
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UnknownArchitecture(
            f"model type {model_type!r} is none that the installed transformers knows; update transformers, or check "
            "model_type in config.json"
        )
    try:
        kind = CONFIG_MAPPING[model_type]
        parsed: PretrainedConfig = kind.from_dict(kind._decode_special_floats(dict(config)))
    except Exception as error:  # every config class validates in its own way
        raise CheckpointError(f"config.json is not a {model_type} config: {error}; download it again") from error
    return parsed


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` (``"model.layers.3"``), also inside a wrapper such as PEFT's, or of a bare decoder.

    Raises:
        UnknownArchitecture: the model has no such module.
    """
    root, _, bare = path.partition(".")
    inside = f"{root}.language_model.{bare}"
    for candidate in (path, f"base_model.model.{path}", f"module.{path}", bare, inside, f"language_model.{path}"):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    raise UnknownArchitecture(
        f"{type(model).__name__} has no module {path!r}; its layout is not what architectures/ says"
    )
