"""A shift, held by one more decoder layer without any bias: the squares of a normalised vector sum to its width.

``t act(t) + (-t) act(-t) = t^2`` for SiLU and GELU (``act(t) - act(-t) = t``). Two neurons per component of the normed
stream sum to ``d ms / (ms + eps)``, ``ms`` being the stream's mean square; their columns are the vector over ``d``.
What is missing of the vector is the share ``eps / ms``: nothing from the second layer on, much at a quiet embedding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..affine import Affine
from ..architectures import Weight, gates
from ..checkpoint import Diagonal, Edit
from ..errors import NotFoldable
from . import Base, Holding, Piece
from ._inserted import Filled, Inserted

#: Activations with ``act(t) - act(-t) = t``.
_ODD_PART = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu")


def squares(piece: Piece, base: Base) -> Holding | None:
    layers = list(Inserted.behind(piece, base))
    if not layers:
        return None
    if layers[0].split:
        raise NotFoldable(f"squares are of what the MLP reads, at the end of a layer, not at {piece.site}")
    weights = [weight for block in base.layout.architecture.mlp for weight in block.weights]
    for layer in layers:
        if not any(writer.block.rigid for writer in base.writers("mlp", layer.number)):
            for weight in weights:
                filled = _filled(weight, piece.affine, layer)
                if filled is not None:
                    return layer.holding(filled)
    raise NotFoldable(
        f"no MLP of a {base.layout.model_type} layer can make a constant out of squares: that takes a gated MLP with "
        f"SiLU or GELU and at least {2 * base.layout.width} neurons behind a norm of the stream"
    )


def missing(norm: nn.Module, h: Tensor) -> Tensor:
    """The share of the vector that squares lack at ``h`` [..., d], read through the layer's ``norm``: [..., 1].

    ``eps / (ms + eps)``; of a LayerNorm, which subtracts the mean, ``ms`` is the variance.
    """
    x = h.float()
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    eps = epsilon(norm)
    return eps / (x.square().mean(-1, keepdim=True) + eps)


def epsilon(owner: Any) -> float:
    """The epsilon of a norm, or of the norms that a config speaks of."""
    names = ("eps", "variance_epsilon", "epsilon", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
    return next(float(value) for name in names if isinstance(value := getattr(owner, name, None), float))


def _filled(down: Weight, affine: Affine, layer: Inserted) -> Filled | None:
    base, width = layer.base, layer.base.layout.width
    architecture, text = base.layout.architecture, base.layout.text
    norm, scale = f"{architecture.middle}.weight", down.scale(text)
    activation = next((getattr(text, name) for name in ("hidden_act", "hidden_activation") if hasattr(text, name)), "")
    names = layer.matching(down.name)
    if activation not in _ODD_PART or layer.shape(norm) != (width,) or not names or not (down.whole or down.mixed):
        return None
    tensors = layer.open_norm()
    for name in names:
        shape = layer.shape(name) or ()
        neurons = shape[-1]
        before = next((pair for pair in gates(name) if all(layer.shape(one) is not None for one in pair)), ())
        shapes = {one: layer.shape(one) or () for one in before}
        fits = all(shape in ((neurons, width), (2 * neurons, width)) for shape in shapes.values())
        if len(shape) != 2 or down.axis != 0 or neurons < 2 * width or not before or not fits:
            return None
        tensors |= {one: _signs(base, shape, neurons) for one, shape in shapes.items()}
        column = base.new("", shape, affine.divided_by(scale * width))
        tensors[name] = replace(column, axis=0, only=(0, 2 * width))
    note = f"its share eps / ms(x) is missing, eps = {epsilon(text)}"
    return Filled(tensors, names[0], scale * width, note=note)


def _signs(base: Base, shape: tuple[int, ...], neurons: int) -> Edit:
    """Rows that read each component with either sign; where gate and up are one tensor, for both of them."""
    width = shape[1]
    diagonals = [
        Diagonal(start + row, 0, width, sign)
        for start in range(0, shape[0], neurons)
        for row, sign in ((0, 1.0), (width, -1.0))
    ]
    return replace(base.new("", shape), diagonals=tuple(diagonals))
