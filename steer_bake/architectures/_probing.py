"""What a model's stream looks like, found by trying: for reading and steering with hooks, never for a bake.

The stack is the list of modules of which each takes what the one before gave. In one layer of every kind the output of
a submodule is shifted a little: where the layer's output then moves by a multiple of that shift, and by nothing else,
the submodule writes to the stream. What reacts to a shift on the way is held still meanwhile, the last writer first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import UnknownArchitecture
from . import Architecture, Block, Layout

_TOKENS = 7
#: Of a shift, and of the stream's length: what may be missing of a multiple of it in float32.
_TOLERANCE = 1e-3
_SHIFT = 0.05  # in sizes of what is shifted, which is of another size in every model


def probed(model: PreTrainedModel) -> Layout:
    """The layout of ``model`` as far as it shows by trying. It has modules to hook and no tensor to edit.

    Raises:
        UnknownArchitecture: no stack of layers with a stream through it was found.
    """
    try:
        return _probed(model, model.config)
    except UnknownArchitecture:
        raise
    except Exception as error:  # a class refuses to be called like this in any way it likes
        raise UnknownArchitecture(
            f"the layers of {type(model).__name__} cannot be tried ({error}); the model has to be described in "
            "architectures/ to be steered"
        ) from error


def _probed(model: PreTrainedModel, config: Any) -> Layout:
    text = config.get_text_config(decoder=True)
    calls = _calls(model, config)
    stack, layers = _stack(model, calls)
    width = calls[layers[0]].stream.shape[-1]
    if len(layers) != text.num_hidden_layers or width != text.hidden_size:
        raise UnknownArchitecture(
            f"a {config.model_type} model has a stack {stack!r} of {len(layers)} layers and a stream of {width} "
            f"components, and its config says {text.num_hidden_layers} and {text.hidden_size}; it has to be described "
            "in architectures/ to be steered"
        )
    tried = [_Layer(layer, calls[layer]) for layer in _kinds(layers)]
    writers = [one.writers() for one in tried]
    found = {writer.path: writer for one in writers for writer in one}
    pairs = list(zip(tried, writers, strict=True))
    if any(one.has(path) and path not in {w.path for w in own} for one, own in pairs for path in found):
        pairs, found = [], {}  # a name that writes in one kind of layer and not in another: no layout says that
    several = [(one, own) for one, own in pairs if len(own) > 1]
    side_by_side = bool(several) and not any(writer.late for _, own in several for writer in own)
    middles = {one.middle(own) for one, own in several} if not side_by_side else set()
    attention, mlp = _slots(list(found.values()), side_by_side)
    names = {module: name for name, module in model.named_modules()}
    architecture = Architecture(
        model_types=(str(text.model_type),),
        embedding=Block(names.get(model.get_input_embeddings(), ""), ()),
        attention=attention,
        mlp=mlp,
        stack=stack,
        middle=middles.pop() if len(middles) == 1 else "",
        parallel=lambda config: side_by_side,
    )
    path = next(((name,) for name, value in vars(config).items() if value is text), ())
    return Layout(architecture, config, path)


# --- a small one


#: What a small model of the same class has where the config has a number; nothing grows.
_SIZES = {
    64: ("hidden_size", "d_model", "n_embd", "emb_dim", "attention_hidden_size", "embedding_size"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_experts", "num_local_experts"),
    2: ("num_key_value_heads", "num_experts_per_tok", "moe_topk", "top_k_experts"),
    16: ("head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "qk_nope_head_dim", "state_size"),
    8: ("qk_rope_head_dim", "n_routed_experts", "moe_num_experts"),
    32: ("q_lora_rank", "kv_lora_rank", "router_hidden_size"),
    128: ("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "vocab_size"),
    256: ("max_position_embeddings", "context_length", "n_positions"),
}
_LAYERS = 4


def small(config: PretrainedConfig) -> PreTrainedModel:
    """A random model of the class of ``config``, a few layers deep and narrow, to be tried in place of a large one.

    Raises:
        UnknownArchitecture: its class does not build one from reduced sizes.
    """
    fields = config.to_dict()
    sizes = {name: size for size, names in _SIZES.items() for name in names}
    text = fields
    for name, value in vars(config).items():
        if value is config.get_text_config(decoder=True) and isinstance(fields.get(name), dict):
            text = fields[name]
    layers = config.get_text_config(decoder=True).num_hidden_layers
    kind = type(config.get_text_config(decoder=True))
    few = min(_LAYERS, layers)
    for name, value in list(text.items()):
        if type(value) is int and name in sizes:
            text[name] = min(value, sizes[name])
        elif type(value) is int and name.endswith("_token_id"):
            text[name] = min(value, 1)
        elif isinstance(value, list) and len(value) == layers:
            text[name] = _shown(value, few)
    text[kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = few
    if fields.get("num_key_value_heads") and text["num_key_value_heads"] > text.get("num_attention_heads", 4):
        text["num_key_value_heads"] = text["num_attention_heads"]
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            reduced = type(config).from_dict(fields)
            made: PreTrainedModel = AutoModelForCausalLM.from_config(reduced, dtype=torch.float32)
            _stir(made)
    except Exception as error:  # a class rejects sizes in any way it likes
        raise UnknownArchitecture(
            f"no small {config.model_type} model can be built to be tried: {error}; load the model itself"
        ) from error
    finally:
        logging.set_verbosity(level)
    made.eval()
    return made


def _shown(kinds: list[Any], few: int) -> list[Any]:
    """``few`` of the layers' kinds, every one of them if there is room."""
    different = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    return (different + kinds)[:few]


def _stir(model: nn.Module) -> None:
    """Every weight away from what it is at first: zeros and ones would hide what they multiply."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


# --- the stack


@dataclass(frozen=True, eq=False)
class _Call:
    """How a module was called, and what it gave."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    @property
    def stream(self) -> Tensor:
        """Its first argument, or what is called so."""
        found = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return found if isinstance(found, Tensor) else torch.empty(0)


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    return found if isinstance(found, Tensor) else torch.empty(0)


def _calls(model: nn.Module, config: PretrainedConfig) -> dict[nn.Module, _Call]:
    """One forward pass over a few tokens: the calls of everything that stands in a list, in order."""
    calls: dict[nn.Module, _Call] = {}
    inside = {item for module in model.modules() if isinstance(module, nn.ModuleList) for item in module}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(module, _Call(args, kwargs, _first(output)))

    training = model.training
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    ids = torch.arange(_TOKENS, device=next(model.parameters()).device).remainder(vocabulary - 1).unsqueeze(0) + 1
    with ExitStack() as handles, torch.no_grad():
        for module in inside:
            handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        model.eval()
        handles.callback(model.train, training)
        model(input_ids=ids, use_cache=False)
    return calls


def _stack(model: nn.Module, calls: Mapping[nn.Module, _Call]) -> tuple[str, list[nn.Module]]:
    """The path of the longest list in which every item takes the output of the one before, and its items."""
    best: tuple[str, list[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        items = list(module) if isinstance(module, nn.ModuleList) else []
        chained = bool(items) and all(item in calls and _is_layer(calls[item]) for item in items)
        if chained and len(items) > len(best[1]) and _hand_on([calls[item] for item in items]):
            best = (name, items)
    if not best[1]:
        raise UnknownArchitecture(
            f"{type(model).__name__} has no list of layers of which each takes the output of the one before; it has to "
            "be described in architectures/ to be steered"
        )
    return best


def _is_layer(call: _Call) -> bool:
    return call.output.ndim == 3 and call.stream.shape == call.output.shape


def _hand_on(calls: list[_Call]) -> bool:
    return all(torch.equal(before.output, after.stream) for before, after in pairwise(calls))


def _kinds(layers: list[nn.Module]) -> Iterator[nn.Module]:
    """One layer of every kind, by the names of their submodules; not the first of a kind where there is another."""
    found: dict[tuple[str, ...], nn.Module] = {}
    for layer in layers:
        found[tuple(name for name, _ in layer.named_modules())] = layer
    return iter(found.values())


# --- one layer


@dataclass(frozen=True)
class _Writer:
    path: str
    scale: float  # the stream gets this times its output
    late: bool  # it reads what another writer wrote


class _Layer:
    """A copy of a layer in float32, which can be called again as the model called it."""

    def __init__(self, layer: nn.Module, call: _Call):
        self._layer = copy.deepcopy(layer).float().eval()
        self._args, self._kwargs = _float(call.args), _float(dict(call.kwargs))
        self._modules = dict(self._layer.named_modules())
        self._norm = ""  # the submodule whose input counts as the layer's output; empty for the output itself
        self._raw: dict[str, Any] = {}
        self._seen = self._outputs(self._raw)
        stream = _stream(self._args, self._kwargs)
        self._vector = torch.randn(stream.shape[-1], generator=torch.Generator().manual_seed(0)).to(stream)

    def writers(self) -> list[_Writer]:
        """The outermost submodules whose output is added to the stream, in the order in which they run.

        In a layer that normalises the stream itself, the norms: what they put out is the stream.
        """
        known = self._known()
        holders = [path for path in known if self._holds_stream(path)]
        if len(holders) == len(known) == 1:
            [self._norm] = holders
            known |= {path: scale for path, scale in self._known().items() if self._holds_stream(path)}
            self._norm = ""
            if len(known) < 2:
                return []
        elif holders and holders == list(self._seen)[:1]:  # behind a norm at the very beginning
            known = {path: scale for path, scale in known.items() if path not in holders}
        elif not self._hands_on_the_rest(known):
            return []
        return [
            _Writer(path, known[path], any(self._moves(other, path) for other in known if other != path))
            for path in self._seen
            if path in known
        ]

    def _hands_on_the_rest(self, known: Mapping[str, float]) -> bool:
        """Whether these are all writers: with them held, what comes in goes out as it is."""
        shift = self._shift(_stream(self._args, self._kwargs))
        with self._held(known):
            return not _moved(self._run() + shift, self._run(shift), shift)

    def has(self, path: str) -> bool:
        return path in self._modules

    def middle(self, writers: list[_Writer]) -> str:
        """The submodule that takes the stream between the early writers and the late ones; empty if none does."""
        stream = _stream(self._args, self._kwargs)
        for writer in writers:
            stream = stream if writer.late else stream + writer.scale * self._seen[writer.path].reshape(stream.shape)
        inputs: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                inputs.setdefault(path, _stream(args, kwargs))

            return hook

        with ExitStack() as handles:
            for path, module in self._layer.named_children():
                handles.callback(module.register_forward_pre_hook(keep(path), with_kwargs=True).remove)
            self._run()
        return next((path for path, found in inputs.items() if _close(found, stream)), "")

    def _known(self) -> dict[str, float]:
        """Writers and how much of them the stream gets; each found while those before are held still."""
        known: dict[str, float] = {}
        while True:
            new = next(self._exact(known), None)
            if new is None:
                return known
            known[new[0]] = new[1]

    def _exact(self, known: Mapping[str, float]) -> Iterator[tuple[str, float]]:
        """Submodules, outermost first, whose shifted output moves the layer's by a multiple and no more."""
        with self._held(known):
            still = self._run()
        for path in sorted(self._seen, key=lambda path: path.count(".")):
            related = any(_within(path, other) or _within(other, path) for other in (*known, self._norm) if other)
            if not path or related or not self._is_write(path):
                continue
            shift = self._shift(self._seen[path])
            with self._held(known), self._shifted(path, shift):
                moved = self._run() - still
            scale = float((moved * shift).sum() / (shift * shift).expand_as(moved).sum())
            exact = (moved - scale * shift).norm() <= _TOLERANCE * (abs(scale) * shift.expand_as(moved)).norm()
            if not exact or abs(scale) <= _TOLERANCE or self._replaces(path, known):
                continue
            if not (self._has_parts(path) and self._holds_stream(path)):
                yield path, scale

    def _shift(self, found: Tensor) -> Tensor:
        shift: Tensor = _SHIFT * found.norm() / found.numel() ** 0.5 * self._vector
        return shift

    def _is_write(self, path: str) -> bool:
        out, stream = self._seen[path], _stream(self._args, self._kwargs)
        return out.shape[-1:] == stream.shape[-1:] and out.numel() == stream.numel()

    def _has_parts(self, path: str) -> bool:
        return any(name.startswith(f"{path}.") for name in self._seen)

    def _replaces(self, path: str, known: Mapping[str, float]) -> bool:
        """Whether a known writer reaches the stream through this submodule (a dropout behind it)."""
        with self._held({path: 1.0}):
            before = self._run()
        for other in known:
            shift = self._shift(self._seen[other])
            with self._held({path: 1.0}), self._shifted(other, shift):
                if not _moved(before, self._run(), shift):
                    return True
        return False

    def _holds_stream(self, path: str) -> bool:
        """Whether the whole stream passes through this submodule, so that its output is the stream and no write."""
        shift = self._shift(_stream(self._args, self._kwargs))
        with self._held({path: 1.0}):
            return not _moved(self._run(), self._run(shift), shift)

    def _moves(self, path: str, other: str) -> bool:
        """Whether a shift of ``path``'s output moves that of ``other``."""
        shift = self._shift(self._seen[path])
        with self._shifted(path, shift):
            return _moved(self._seen[other], self._outputs({})[other], shift)

    # --- runs

    def _run(self, shift: Tensor | None = None) -> Tensor:
        """The layer's output, or the input of the norm that counts as such."""
        args, kwargs = self._args, self._kwargs
        if shift is not None:
            args, kwargs = _shifted_stream(args, kwargs, shift)
        inputs: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(_stream(args, kwargs).clone())

        with ExitStack() as handles, torch.no_grad():
            if self._norm:
                norm = self._modules[self._norm]
                handles.callback(norm.register_forward_pre_hook(keep, with_kwargs=True).remove)
            out = _first(self._layer(*args, **kwargs))
        return inputs[0] if self._norm else out.float()

    def _outputs(self, raw: dict[str, Any]) -> dict[str, Tensor]:
        """What every submodule that runs once put out, in the order in which they were done; ``raw`` with the rest."""
        seen: dict[str, Tensor] = {}
        twice: set[str] = set()

        def keep(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if path in seen:
                    twice.add(path)
                seen[path], raw[path] = _first(output).detach().clone(), copy.copy(output)

            return hook

        with ExitStack() as handles:
            for path, module in self._modules.items():
                handles.callback(module.register_forward_hook(keep(path)).remove)
            self._run()
        return {path: found for path, found in seen.items() if path not in twice}

    @contextmanager
    def _held(self, known: Iterable[str]) -> Iterator[None]:
        """These submodules put out what they did at first, whatever they read."""

        def instead(path: str) -> Callable[..., Any]:
            # a copy: some layers add to it in place
            return lambda *_: _with_first(self._raw[path], self._seen[path].clone())

        with ExitStack() as handles:
            for path in known:
                handles.callback(self._modules[path].register_forward_hook(instead(path)).remove)
            yield

    @contextmanager
    def _shifted(self, path: str, shift: Tensor) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return _with_first(output, _first(output) + shift)

        handle = self._modules[path].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _with_first(output: Any, new: Tensor) -> Any:
    return type(output)((new, *output[1:])) if isinstance(output, (tuple, list)) else new


def _moved(before: Tensor, after: Tensor, shift: Tensor) -> bool:
    return bool((after - before).norm() > _TOLERANCE * shift.norm())


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return _Call(args, kwargs, torch.empty(0)).stream


def _shifted_stream(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], shift: Tensor
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if args:
        return (args[0] + shift, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + shift}


def _float(value: Any) -> Any:
    """``value`` with every floating tensor in it in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_float(one) for one in value)
    if isinstance(value, dict) and type(value) is dict:
        return {name: _float(one) for name, one in value.items()}
    return value


def _within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def _close(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).norm() <= _TOLERANCE * wanted.norm())


def _slots(writers: list[_Writer], parallel: bool) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """The blocks by slot: early and late writers; side by side, the first one and the others."""
    attention = [one for number, one in enumerate(writers) if (number == 0 if parallel else not one.late)]
    mlp = [one for one in writers if one not in attention]
    return tuple(map(_block, attention)), tuple(map(_block, mlp))


def _block(writer: _Writer) -> Block:
    scale = 1.0 if abs(writer.scale - 1.0) < _TOLERANCE else writer.scale
    return Block(writer.path, (), scale=lambda config: scale)
