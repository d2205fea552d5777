"""``with steer(model, interventions):`` the reference semantics that every bake is compared with.

Hooks act on all token positions of every forward pass, prefill and cached decoding alike, padding included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import architectures
from .affine import Affine
from .architectures import SLOTS, Layout, submodule
from .errors import RecipeError, UnknownArchitecture
from .gate import Gate
from .interventions import Intervention, in_forward_order

Apply = Callable[[Tensor], Tensor]


@contextmanager
def steer(model: PreTrainedModel, interventions: Iterable[Intervention]) -> Iterator[PreTrainedModel]:
    """Apply ``interventions`` to ``model`` inside the block; whatever happens there, the model is restored.

    Works with ``model(...)``, ``model.generate(...)`` and pipelines built on ``model``. Order: forward order of the
    sites, then the order given. ``writes`` and ``writers`` act on the base model's own writes, never on what another
    intervention adds. ``resid_pre.0`` is the stream that enters layer 0: given ``inputs_embeds`` it is steered here,
    while a baked embedding table is not asked. What torch.compile has seen is compiled anew inside and after the block.

    Raises:
        UnknownArchitecture: no file in architectures/ claims the type, and its layers show no stream when tried.
        RecipeError: a vector's width or a layer does not fit the model.
    """
    layout = architectures.layout_of(model)
    with ExitStack() as stack:
        _forget_compiled()
        stack.callback(_forget_compiled)
        for handle in _hooks(model, layout, in_forward_order(interventions)):
            stack.callback(handle.remove)
        yield model


@contextmanager
def watch(model: PreTrainedModel, gates: Sequence[Gate]) -> Iterator[list[list[Tensor]]]:
    """How far ``gates`` open inside the block: for each of them, per forward pass, ``g(x)`` [batch x seq] float32.

    Inside ``steer`` the gates are those that act; without it they show what they would do first.

    Raises:
        RecipeError: the model has not the layer that a gate reads.
    """
    layout = architectures.layout_of(model)
    seen: list[list[Tensor]] = [[] for _ in gates]

    def reading(gate: Gate, found: list[Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            found.append(gate.opening(x, layout.activation).flatten().cpu())

        return hook

    with ExitStack() as stack:
        for gate, found in zip(gates, seen, strict=True):
            if not 0 <= gate.layer < layout.layers:
                raise RecipeError(f"the gate at {gate.site}: this model has layers 0 to {layout.layers - 1}")
            handle = layout.reader(model, gate.layer).register_forward_pre_hook(reading(gate, found), with_kwargs=True)
            stack.callback(handle.remove)
        yield seen


def _forget_compiled() -> None:
    """Code that torch.compile made before does not look at hooks that came later, or at hooks that are gone."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@dataclass
class _Module:
    """What is to be done at one module, in order."""

    on_input: list[Apply] = field(default_factory=list)
    on_output: list[Apply] = field(default_factory=list)


def _hooks(
    model: PreTrainedModel, layout: Layout, interventions: list[Intervention]
) -> list[torch.utils.hooks.RemovableHandle]:
    todo: dict[nn.Module, _Module] = {}

    def at(module: nn.Module) -> _Module:
        return todo.setdefault(module, _Module())

    def on_write(slot: str, layer: int, affine: Affine) -> None:
        """All blocks of a slot write: a projection acts on each of them, a shift is added once."""
        for block, module in layout.modules(model, slot, layer):
            at(module).on_output.append(_apply(affine.divided_by(block.scale(layout.text))))
            affine = affine.without_shift()

    for intervention in interventions:
        point, layer, affine = intervention.site.point, intervention.site.layer, intervention.affine
        if affine.width != layout.width:
            raise RecipeError(
                f"the vector of {intervention.name} has {affine.width} components; the model has {layout.width}"
            )
        if layer is None:
            if point == "writes":
                at(submodule(model, layout.layer(0))).on_input.append(_apply(affine))
            for each in range(layout.layers):
                for slot in _written(model, layout, each):
                    on_write(slot, each, affine.without_shift())
            continue
        if not 0 <= layer < layout.layers:
            raise RecipeError(f"site {intervention.site}: this model has layers 0 to {layout.layers - 1}")
        whole = at(submodule(model, layout.layer(layer)))
        if intervention.gate is not None:
            _hook_gate(intervention, intervention.gate, model, layout, at)
            continue
        wanted = {"attn_out": "attention", "resid_mid": "attention", "mlp_out": "mlp"}.get(point)
        written = _written(model, layout, layer) if wanted else []
        if wanted and (wanted not in written or (point == "resid_mid" and (layout.parallel or len(written) < 2))):
            raise RecipeError(f"there is no {intervention.site} in this model: its layer has no such write or middle")
        if point == "resid_pre":
            whole.on_input.append(_apply(affine))
        elif point == "resid_post":
            whole.on_output.append(_apply(affine))
        elif point == "resid_mid" and affine.is_linear:
            _hook_mid(whole, at(layout.modules(model, "attention", layer)[-1][1]), affine)
        else:  # the middle of the stream is no module's output; adding to the attention's write moves it equally
            on_write(str(wanted), layer, affine)

    # Before every other hook, so that output_hidden_states and other readers see the steered stream.
    handles = []
    for target, module in todo.items():
        if module.on_input:
            handles.append(target.register_forward_pre_hook(_pre_hook(module.on_input), with_kwargs=True, prepend=True))
        if module.on_output:
            handles.append(target.register_forward_hook(_hook(module.on_output), prepend=True))
    return handles


def _written(model: PreTrainedModel, layout: Layout, layer: int) -> list[str]:
    """The slots that a layer writes in.

    Raises:
        UnknownArchitecture: in none, so far as architectures/ knows.
    """
    found = [slot for slot in SLOTS if layout.modules(model, slot, layer)]
    if not found:
        raise UnknownArchitecture(
            f"layer {layer} of this {layout.model_type} model has none of the modules that architectures/ says write "
            "to the stream"
        )
    return found


def _apply(affine: Affine) -> Apply:
    """``affine`` on activations: a shift in their own dtype, as a bias would be; a projection in float32."""
    moved: dict[torch.device, Affine] = {}

    def apply(h: Tensor) -> Tensor:
        here = moved.get(h.device)
        if here is None:
            here = moved[h.device] = Affine(*(part.to(h.device) for part in (affine.left, affine.right, affine.shift)))
        if here.left.shape[1]:
            return here(h.float()).to(h.dtype)
        return h + here.shift.to(h.dtype)

    return apply


def _hook_gate(
    intervention: Intervention, gate: Gate, model: PreTrainedModel, layout: Layout, at: Callable[[nn.Module], _Module]
) -> None:
    """The neurons of a gate: fed with what the MLP reads, kept on the way in, and added where the site is."""
    reader = layout.reader(model, gate.layer)
    block, writer = layout.modules(model, "mlp", gate.layer)[-1]
    scale = block.scale(layout.text)
    closed = torch.zeros(layout.width) if gate.otherwise is None else gate.otherwise
    neurons = gate.neurons((intervention.affine.shift - closed) / scale, layout.activation)
    read: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        if x.shape[-1] != layout.width:
            raise RecipeError(f"{gate.site} was not found: what is read there has {x.shape[-1]} components")
        read[:] = [x]
        return x

    at(reader).on_input.append(keep)
    whole = intervention.site.point == "resid_post"
    target = at(submodule(model, layout.layer(gate.layer)) if whole else writer)
    constant = replace(intervention.affine, shift=closed)
    if constant.has_shift:
        target.on_output.append(_apply(constant if whole else constant.divided_by(scale)))
    # Some layers flatten batch and sequence in between.
    target.on_output.append(lambda h: h + (neurons(read[0]) * (scale if whole else 1.0)).reshape(h.shape))


def _hook_mid(layer: _Module, attention: _Module, affine: Affine) -> None:
    """A projection of resid_mid: it needs the stream before the attention's write, kept on the way in."""
    before: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        before[:] = [h]
        return h

    apply = _apply(affine)
    layer.on_input.append(keep)
    attention.on_output.append(lambda write: apply(before[0] + write) - before[0])


def _pre_hook(steps: list[Apply]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        h = args[0] if args else kwargs["hidden_states"]
        for step in steps:
            h = step(h)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    return hook


def _hook(steps: list[Apply]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, (tuple, list)) else output
        for step in steps:
            h = step(h)
        return type(output)((h, *output[1:])) if isinstance(output, (tuple, list)) else h

    return hook
