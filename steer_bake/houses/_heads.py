"""Rows of the projections of attention: how they come apart, and in which order a head's components are rotated.

Rotary embedding turns pairs of components. Llama's are ``(i, i + h/2)`` of a head of ``h``; some classes turn
neighbours ``(2i, 2i + 1)``, some turn the first ``r`` components only. Queries and keys in another order of components
have the same products, so that any of these is any other under a permutation of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..checkpoint import Rows
from . import Part, head_dim

Order = tuple[int, ...]


@dataclass(frozen=True)
class Turned:
    """What becomes of a model's heads where all their components are turned in pairs ``(i, i + h/2)``."""

    order: Order  # of the components; (0,) where it stays
    values: dict[str, Any]  # of the config
    partial: bool  # whether some components are not turned

    def parts(self, config: PretrainedConfig) -> dict[str, Part]:
        """Query and key projection."""
        return {} if self.order == (0,) else query_and_key(config, self.order)


def turned(config: PretrainedConfig, *, neighbours: bool = False) -> Turned | None:
    """The heads of ``config``, whose class turns ``neighbours`` or halves, of all components or of the first ones.

    Partial: ``rope_type`` proportional turns the first ``r/h`` of the pairs by ``base^(-2i/h)``, which is the model's
    own ``theta^(-2i/r)`` for ``base = theta^(h/r)``. ``None``: the two do not go together with this kind of rope.
    """
    size, rope = head_dim(config), config.rope_parameters
    rotated = int(size * rope.get("partial_rotary_factor", 1.0))
    firsts = range(0, rotated, 2) if neighbours else range(rotated // 2)
    seconds = range(1, rotated, 2) if neighbours else range(rotated // 2, rotated)
    still = range(rotated, size)
    half = len(still) // 2
    order = (*firsts, *still[:half], *seconds, *still[half:])
    if rotated == size:
        return Turned(order if neighbours else (0,), _context(config), partial=False)
    if rotated % 2 or size % 2 or rope.get("rope_type", "default") != "default":
        return None
    share = {"rope_type": "proportional", "partial_rotary_factor": rotated / size}
    return Turned(
        order, {"rope_parameters": {**share, "rope_theta": rope["rope_theta"] ** (size / rotated)}}, partial=True
    )


def _context(config: PretrainedConfig) -> dict[str, Any]:
    """Phi-3 says the context that longrope begins at beside the table of the rope; others ask for it within."""
    begins = getattr(config, "original_max_position_embeddings", None)
    if begins is None or config.rope_parameters.get("rope_type", "default") == "default":
        return {}
    rope = {**config.rope_parameters, "original_max_position_embeddings": begins}
    return {"rope_parameters": rope, "original_max_position_embeddings": begins}


def neighbours(size: int) -> Order:
    """The order in which components that are turned as halves are turned as neighbours."""
    return tuple(one for pair in range(size // 2) for one in (pair, pair + size // 2))


def query_and_key(config: PretrainedConfig, order: Order) -> dict[str, Part]:
    """Both projections with every head in another order."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    return {
        f"self_attn.{name}_proj": Part(f"self_attn.{name}_proj", Rows(0, count * head_dim(config), order))
        for name, count in heads.items()
    }


def query_key_value(config: PretrainedConfig, order: Order) -> dict[str, Part]:
    """The three projections out of ``qkv_proj``."""
    size = head_dim(config)
    queries, keys = size * config.num_attention_heads, size * config.num_key_value_heads
    fused = "self_attn.qkv_proj"
    return {
        "self_attn.q_proj": Part(fused, Rows(0, queries, order)),
        "self_attn.k_proj": Part(fused, Rows(queries, queries + keys, order)),
        "self_attn.v_proj": Part(fused, Rows(queries + keys, queries + 2 * keys)),
    }


def gate_and_up(config: PretrainedConfig) -> dict[str, Part]:
    """Both projections out of ``gate_up_proj``."""
    size = config.intermediate_size
    return {
        "mlp.gate_proj": Part("mlp.gate_up_proj", Rows(0, size)),
        "mlp.up_proj": Part("mlp.gate_up_proj", Rows(size, 2 * size)),
    }
