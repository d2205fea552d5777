"""A decoder with more layers: what its config must say, and the proof that the old layers stay what they were.

A class may decide by a layer's number what the layer is: lists with one entry per layer, lists of layer numbers,
thresholds, periods. Lists and thresholds are carried over; then the class itself is asked, and where any old layer has
become another one the answer is a refusal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from .architectures import Layout
from .errors import NotFoldable
from .skeleton import changed

#: Config attributes whose value is a number of leading layers, or a layer's number.
_THRESHOLDS = (
    "first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index",
    "moe_layer_end_index",
)  # fmt: skip
#: Lists of layer numbers. (A list with one entry per layer needs no name: its length says so.)
_NUMBERS = (
    "mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "global_attn_layers", "cross_attention_layers",
    "full_attention_layers", "moe_layers",
)  # fmt: skip


def deepened(layout: Layout, order: Sequence[int]) -> dict[str, Any]:
    """The changes of config.json for a decoder whose layer ``i`` is of the kind of the old layer ``order[i]``.

    Raises:
        NotFoldable: some old layer would become another one, or the class rejects the deeper config.
    """
    text, layers = layout.text, layout.layers
    values: dict[str, Any] = {"num_hidden_layers": len(order)}
    fields = _fields(text)
    for name, value in fields.items():
        if name in _NUMBERS and isinstance(value, list):
            values[name] = [new for new, old in enumerate(order) if old in value]
        elif isinstance(value, list) and len(value) == layers:
            values[name] = [value[old] for old in order]
        elif name == "per_layer_config" and value:
            values[name] = _per_layer(fields, value, order)
        elif name in _THRESHOLDS and isinstance(value, int) and 0 < value < layers:
            values[name] = sum(old < value for old in order)
    if hasattr(text, "decoder_sparse_step") and hasattr(text, "mlp_only_layers"):  # a period: listed one by one
        dense = [not _has(layout, old, "experts") for old in range(layers)]
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": [new for new, old in enumerate(order) if dense[old]]}
    changes = layout.change(values)
    _check(layout, changes, order)
    return changes


def _per_layer(fields: dict[str, Any], found: dict[Any, Any], order: Sequence[int]) -> dict[str, Any]:
    """What single layers have otherwise than the rest, by their number: spelled out for all of them."""
    different = {str(key): dict(value) for key, value in found.items()}
    names = {name for value in different.values() for name in value}
    usual = {name: fields[name] for name in sorted(names)}
    return {str(new): {**usual, **different.get(str(old), {})} for new, old in enumerate(order)}


def _has(layout: Layout, layer: int, name: str) -> bool:
    start = f"{layout.layer(layer)}."
    return any(key.startswith(start) and f".{name}." in key for key in layout.skeleton)


def _fields(text: PretrainedConfig) -> dict[str, Any]:
    found = text.to_dict()
    for name in ("layer_types", "mlp_layer_types"):  # some classes work them out and do not write them
        derived = isinstance(getattr(type(text), name, None), property)  # it follows from the number of layers
        if name not in found and not derived and getattr(text, name, None) is not None:
            found[name] = list(getattr(text, name))
    # What a class only works out cannot be set.
    spelled = {name: text.attribute_map.get(name, name) for name in found}
    return {
        name: value
        for name, value in found.items()
        if getattr(getattr(type(text), spelled[name], ""), "fset", "") is not None
    }


def _check(layout: Layout, changes: dict[str, Any], order: Sequence[int]) -> None:
    name = layout.model_type
    try:
        deeper = changed(layout.parsed, changes)
        before, after = layout.skeleton, layout.skeleton_of(deeper)
    except Exception as error:  # a config class validates in its own way
        raise NotFoldable(f"the {name} class takes no additional layer: {error}") from error
    stack = layout.architecture.stack

    def inside(found: dict[str, tuple[int, ...]], layer: int) -> dict[str, tuple[int, ...]]:
        start = f"{stack}.{layer}."
        return {key.removeprefix(start): shape for key, shape in found.items() if key.startswith(start)}

    wrong = [old for new, old in enumerate(order) if inside(after, new) != inside(before, old)]
    outside = {key: shape for key, shape in before.items() if not key.startswith(f"{stack}.")}
    wrong += [-1] if any(after.get(key) != shape for key, shape in outside.items()) else []
    old_text, new_text = layout.text, deeper
    for key in layout.path:
        new_text = getattr(new_text, key)
    for kind in ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "indexer_types"):
        old_kinds, new_kinds = getattr(old_text, kind, None), getattr(new_text, kind, None)
        if isinstance(old_kinds, list) and len(old_kinds) == layout.layers:
            wrong += [old for new, old in enumerate(order) if new_kinds is None or new_kinds[new] != old_kinds[old]]
    if wrong:
        raise NotFoldable(
            f"an additional layer would make other layers of this {name} model different from what they are: the class "
            "decides by a layer's number what it is"
        )
