"""Gates, held by further neurons of the MLP that writes the gated shift.

In a gated MLP a neuron's gate row is the probe, its up row zero with bias one; in a plain one its row is the probe. The
columns behind them hold the shift. The config has one size for all layers, so that every layer gets as many more, zeros
but for the gates, up to a multiple that kernels like. A mixture of experts holds them in a shared expert that nothing
weights; its size is a number of experts, whose zeros cost a little more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..affine import Affine
from ..architectures import before, gates
from ..checkpoint import Appended, Edit
from ..errors import NotFoldable
from ..gate import NEURONS, check_activation
from ..skeleton import Skeleton
from . import Base, Gated, Holding, Piece, Writer

#: Config attributes that may be the number of neurons, and such that may count shared experts.
_SIZES = (
    "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "intermediate_size_mlp",
    "shared_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def neurons(piece: Piece, base: Base) -> Holding | None:
    if piece.part != "gates":
        return None
    check_activation(base.layout.activation)
    counts = Counter(one.gate.layer for one in piece.gates)
    mlps = {layer: _mlp(layer, base) for layer in sorted(counts)}
    groups: dict[tuple[str, int], int] = {}
    for layer, mlp in mlps.items():
        key = (mlp.writer.weight.name, mlp.size)
        groups[key] = max(groups.get(key, 0), NEURONS * counts[layer] - mlp.free)
    sizes: dict[str, int] = {}
    for (name, size), more in groups.items():
        if more <= 0:
            continue
        members = [mlp for mlp in mlps.values() if (mlp.writer.weight.name, mlp.size) == (name, size)]
        attribute, value = _wider(members, more, piece.pad_to, base)
        sizes[attribute] = max(value, sizes.get(attribute, 0))
    for flags in _flags(mlps.values(), base):
        changes = _merged(base.layout.change(sizes), flags)
        after = base.after(changes)
        if after is not None and _has_biases(mlps.values(), after, base):
            edits = _edits(piece.gates, mlps, after, base)
            wide = "; " + ", ".join(f"{name} {value}" for name, value in sizes.items()) if sizes else ""
            note = f"{NEURONS * len(piece.gates)} neurons in {len(mlps)} layers{wide}, the rest is zeros"
            return Holding(edits, changes, demands=int(bool(flags)), note=note)
    raise NotFoldable(
        f"a gate needs a bias before the MLP's activation, and the {base.layout.model_type} class has none and no "
        "config flag creates it"
    )


@dataclass(frozen=True)
class _Mlp:
    """The tensors of an MLP, by their names on disk."""

    writer: Writer
    first: str  # what the activation is taken of
    second: str  # what it is multiplied with; empty in an MLP without a gate
    size: int  # neurons
    axis: int  # of ``first`` and ``second``: the residual one
    free: int = 0  # neurons that are zeros: another class has this MLP, and of the model nothing is stored for it

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.first, self.second) if self.second else (self.first,)

    @property
    def tensors(self) -> tuple[str, ...]:
        """All of them, with the biases of ``inputs``."""
        return (self.writer.tensor, *self.inputs, *map(_bias, self.inputs))

    @property
    def widths(self) -> dict[str, int]:
        """Of each weight the residual axis."""
        return {self.writer.tensor: self.writer.weight.axis, **dict.fromkeys(self.inputs, self.axis)}


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _mlp(layer: int, base: Base) -> _Mlp:
    """The MLP of a layer that further neurons can be put into.

    Raises:
        NotFoldable: there is none; the message says why.
    """
    whose = f"layer {layer} of this {base.layout.model_type} model"
    reasons = []
    for writer in base.writers("mlp", layer):
        block, weight = writer.block, writer.weight
        if block.inner or block.rigid:
            reasons.append(f"a norm stands between the MLP and the stream in {whose}: no shift passes it as it is")
        elif not weight.whole:
            reasons.append(f"what {weight.name} writes is weighted before it reaches the stream")
        elif weight.scale is not block.scale:
            reasons.append(f"multipliers inside the MLP of {whose} act on neurons")
        else:
            found = _around(writer, layer, base)
            if isinstance(found, _Mlp):
                return found
            reasons.append(found)
    raise NotFoldable("; ".join(dict.fromkeys(reasons)) or f"{whose} has no MLP, whose neurons a gate would be made of")


def _around(writer: Writer, layer: int, base: Base) -> _Mlp | str:
    """The MLP of ``writer``, or why it takes no further neurons."""
    width, axis = base.layout.width, writer.weight.axis
    shape = _shape(writer.tensor, base)
    if len(shape) != 2 or shape[axis] != width:
        return f"{writer.tensor} is not the matrix of one MLP"
    size = shape[1 - axis]
    inside = (size, width) if axis == 0 else (width, size)
    pairs = [names for names in gates(writer.tensor) if len(names) == 2]
    named = [*pairs, *([(before(writer.tensor), "")] if before(writer.tensor) else [])]
    for first, second in named:
        if all(_shape(name, base) == inside for name in (first, second) if name):
            known = base.checkpoint.tensors
            is_new = all(not known[name].nbytes for name in (writer.tensor, first, second) if name)
            found = _Mlp(writer, first, second, size, 1 - axis, size if is_new else 0)
            strange = _strange(found, layer, base)
            return f"{strange} takes part in the MLP of {writer.tensor}" if strange else found
    if any(len(names) == 1 and _shape(names[0], base) == (2 * size, width) for names in gates(writer.tensor)):
        return f"gate and up projection before {writer.tensor} are one tensor, which has no bias"
    return f"no known tensor of {size} neurons stands before {writer.tensor}"


def _strange(mlp: _Mlp, layer: int, base: Base) -> str:
    """A tensor beside those of the MLP in the same module (a norm of the neurons, say); empty if there is none."""
    module = mlp.writer.tensor.removesuffix(".weight").rpartition(".")[0] + "."
    known = {name for weight in mlp.widths for name in (weight, _bias(weight))}
    if module == base.prefix(layer):
        return ""
    return next((name for name in base.layer_tensors(layer) if name.startswith(module) and name not in known), "")


def _shape(name: str, base: Base) -> tuple[int, ...]:
    info = base.checkpoint.tensors.get(name)
    return () if info is None else info.shape


# --- sizes and biases


def _wider(members: Sequence[_Mlp], more: int, pad_to: int, base: Base) -> tuple[str, int]:
    """The attribute of the config that gives ``members`` at least ``more`` neurons, and its new value.

    Raises:
        NotFoldable: no attribute does that and nothing else.
    """
    size, text = members[0].size, base.layout.text
    other = next((name for one in members for name in one.widths if name not in _on_disk(base.skeleton, base)), None)
    if other is not None:
        raise NotFoldable(
            f"{other} has another name in the {base.layout.model_type} class, which is asked for its size"
        )
    for name, value in _candidates(size, more, pad_to, text):
        after = base.after(base.layout.change({name: value}))
        if after is None:
            continue
        new = _on_disk(after, base)
        enough = all(new[one.writer.tensor][1 - one.writer.weight.axis] >= size + more for one in members)
        grown = {base.on_disk(tensor) for tensor in base.grown(after)}
        if enough and grown <= set(_known_axes(base)):
            return name, value
    raise NotFoldable(
        f"no number in the config of this {base.layout.model_type} model gives {members[0].writer.tensor} more neurons "
        "and changes nothing else"
    )


def _candidates(size: int, more: int, pad_to: int, text: Any) -> Iterator[tuple[str, int]]:
    for name in _SIZES:
        if hasattr(text, name) and getattr(text, name) in (size, None):
            yield name, -(-(size + more) // pad_to) * pad_to
    for name in _EXPERTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and count > 0 and size % count == 0:
            yield name, count + math.ceil(more / (size // count))


def _on_disk(found: Skeleton, base: Base) -> Skeleton:
    return {base.on_disk(name): shape for name, shape in found.items()}


def _known_axes(base: Base) -> dict[str, int]:
    """Every tensor that can be made longer by neurons, in all layers, and its residual axis (of a bias: 0)."""
    found: dict[str, int] = {}
    for layer in range(base.layers):
        for writer in base.writers("mlp", layer):
            mlp = _around(writer, layer, base) if writer.weight.whole else ""
            if isinstance(mlp, _Mlp):
                found |= mlp.widths | {_bias(name): 0 for name in mlp.inputs if base.has(_bias(name))}
    return found


def _flags(mlps: Iterable[_Mlp], base: Base) -> Iterator[dict[str, Any]]:
    """Changes of the config that may give every MLP its biases: none first."""
    yield {}
    tried: list[dict[str, Any]] = []
    for mlp in mlps:
        for flags in base.flags(mlp.writer.block):
            if flags not in tried:
                tried.append(flags)
                yield flags


def _has_biases(mlps: Iterable[_Mlp], after: Skeleton, base: Base) -> bool:
    there = _on_disk(after, base)
    return all(_bias(name) in there for mlp in mlps for name in mlp.inputs)


# --- edits


def _edits(found: Sequence[Gated], mlps: Mapping[int, _Mlp], after: Skeleton, base: Base) -> tuple[Edit, ...]:
    content: dict[str, Tensor] = {}
    for layer, mlp in mlps.items():
        content |= _content([one for one in found if one.gate.layer == layer], mlp, base)
    new, free = _on_disk(after, base), {name for mlp in mlps.values() if mlp.free for name in mlp.tensors}
    wanted = {*map(base.on_disk, base.grown(after)), *(name for name in content if base.has(name))}
    axes = _known_axes(base) if wanted else {}
    edits = [_longer(name, new[name], axes[name], content, base, name in free) for name in new if name in wanted]
    for name, values in content.items():
        if not base.has(name):  # a bias that a flag creates
            shift, first = torch.zeros(new[name]), _size(name, mlps)
            if name in free:
                first = len(shift) - len(values)
            shift[first : first + len(values)] = values
            edits.append(base.new(name, new[name], replace(Affine.identity(len(shift)), shift=shift)))
    return tuple(edits)


def _size(bias: str, mlps: Mapping[int, _Mlp]) -> int:
    return next(mlp.size for mlp in mlps.values() if bias in {_bias(name) for name in mlp.inputs})


def _content(found: Sequence[Gated], mlp: _Mlp, base: Base) -> dict[str, Tensor]:
    """What is appended to the tensors of ``mlp``, the neurons along the axis that grows."""
    scale = mlp.writer.weight.scale(base.layout.text)
    made = [one.gate.neurons(one.shift / scale, base.layout.activation) for one in found]
    rows, biases = torch.cat([one.rows for one in made]), torch.cat([one.biases for one in made])
    columns = torch.cat([one.columns for one in made], dim=1)
    content = {
        mlp.first: rows if mlp.axis == 1 else rows.T,
        _bias(mlp.first): biases,
        mlp.writer.tensor: columns if mlp.writer.weight.axis == 0 else columns.T,
    }
    return content | ({_bias(mlp.second): torch.ones_like(biases)} if mlp.second else {})


def _longer(
    name: str, shape: tuple[int, ...], axis: int, content: Mapping[str, Tensor], base: Base, free: bool
) -> Edit:
    """The tensor ``name`` with more neurons: what ``content`` has for it, then zeros; of a ``free`` one its last."""
    old = _shape(name, base)
    along = 1 - axis if len(shape) == 2 else 0
    more = list(shape)
    more[along] -= old[along]
    if free and name in content:
        values = content[name]
    elif name not in content:
        values = torch.zeros(1).expand(more)  # of a large model these are gigabytes
    else:
        values = torch.zeros(more)
        values.narrow(along, 0, content[name].shape[along]).copy_(content[name])
    kept = list(shape)
    kept[along] -= values.shape[along]
    edit = base.edit(name, Affine.identity(kept[axis]), axis)
    return replace(edit, shape=shape, appended=Appended(values, along))


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(one[key], other[key]) for key in one if isinstance(one[key], dict) and key in other}
    return {**one, **other, **both}
