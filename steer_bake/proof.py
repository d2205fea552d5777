"""The proof that precedes a re-housing: both classes, on the real config shrunk in sizes only, compute the same logits.

What decides the function stays as it is: every kind of layer, the size of a head, the ratio of query to key heads, rope
parameters, activation, epsilon, multipliers, ties. What only makes it large is small: width, vocabulary, experts,
windows. The tokens lie beyond the window, and also where rope scaling has set in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from .architectures import Layout
from .checkpoint import Checkpoint, write_edited
from .depth import deepened
from .errors import NotFoldable, SteerBakeError
from .houses import Housed, Rule, housed
from .reload_worker import load_strict, pad
from .skeleton import changed, skeleton

#: Greatest gap of float32 logits, in units of their deviation: where only names change, and where values do.
SAME, ROUNDED = 1e-6, 5e-6
VOCABULARY, TOKENS, PADDING, WINDOW = 96, 24, 3, 8
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layer_rope_theta")
_SIZES = {
    "vocab_size": VOCABULARY,
    "sliding_window": WINDOW,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 24),
}
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")

_proven: dict[tuple[type[PretrainedConfig], str, Rule], str] = {}


def prove(claim: Housed) -> None:
    """Compare source and host; remembered by the source's config.

    Raises:
        NotFoldable: they differ; the message has the measured gap.
    """
    config = claim.source.parsed
    key = (type(config), config.to_json_string(use_diff=False), claim.rule)
    if key not in _proven:
        try:
            _proven[key] = _difference(claim.source, claim.rule)
        except SteerBakeError:
            raise
        except Exception as error:  # a class fails in its own way
            _proven[key] = f"one of the two does not run: {error}"
    if _proven[key]:
        raise NotFoldable(
            f"a {config.model_type} model of this config is not the same under the {claim.house.model_type} class: "
            f"{_proven[key]}"
        )


def shrunk(source: Layout) -> PretrainedConfig:
    """A model's config with everything small that only makes it large."""
    text = source.text
    sizes = {name: size for name, size in _SIZES.items() if getattr(text, name, None) is not None}
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    few = min(keys, 2)
    sizes |= {"num_attention_heads": few * heads // keys, "num_key_value_heads": few}
    width = sizes["num_attention_heads"] * -(-64 // sizes["num_attention_heads"])
    sizes |= {"hidden_size": width, "intermediate_size": 2 * width}
    if not hasattr(text, "qk_rope_head_dim"):
        sizes["head_dim"] = getattr(text, "head_dim", None) or text.hidden_size // heads
    top = getattr(text, "num_experts_per_tok", None) or 1
    groups = getattr(text, "n_group", None) or 1
    sizes |= {name: groups * -(-2 * top // groups) for name in _EXPERTS if getattr(text, name, None)}
    for name in ("pad_token_id", "bos_token_id"):
        if (getattr(text, name, None) or 0) >= VOCABULARY:
            sizes[name] = VOCABULARY - 1
    fewer = changed(source.parsed, deepened(source, _one_of_each_kind(source)))
    return changed(fewer, {"quantization_config": None} | {source.key(name): size for name, size in sizes.items()})


def _one_of_each_kind(source: Layout) -> list[int]:
    """At least two layers, among them one of every kind that there is."""
    lists = [getattr(source.text, name, None) for name in _PER_LAYER]
    stack = source.architecture.stack
    found: dict[tuple[Any, ...], int] = {}
    for layer in range(source.layers):
        start = f"{stack}.{layer}."
        tensors = frozenset(name.removeprefix(start) for name in skeleton(source.parsed) if name.startswith(start))
        kind = (tensors, *(one[layer] for one in lists if isinstance(one, list) and len(one) == source.layers))
        found.setdefault(kind, layer)
    return sorted({*found.values(), *range(min(2, source.layers))})


def _difference(source: Layout, rule: Rule) -> str:
    """In words, how the two classes differ; empty where they do not."""
    with tempfile.TemporaryDirectory(prefix="steer-bake-proof-") as name:
        before, after = Path(name) / "source", Path(name) / "host"
        after.mkdir()
        _save_random(shrunk(source), before)
        base = Checkpoint.open(before)
        claim = housed(base, rule)
        write_edited(
            base, claim.edits((), {}), after, config_changes=claim.config_changes, rename=claim.rename({}),
            dropped=claim.dropped,
        )  # fmt: skip
        longest = _longest(source.text.to_dict())
        old, new = _logits(before, "float32", longest), _logits(after, "float32", longest)
        gap = float((old - new).abs().max() / old.std())
        limit = SAME if claim.house.same_bits else ROUNDED
        if not gap <= limit:
            return f"their logits differ by {gap:.1e} standard deviations (at most {limit:.0e} is rounding)"
        same = torch.equal(_logits(before, "bfloat16", longest), _logits(after, "bfloat16", longest))
        return "" if same or not claim.house.same_bits else "their logits differ in bfloat16, which they should not"


def _longest(values: Any) -> int:
    """The greatest context that a config speaks of: its own, or that from which on its rope is another."""
    if not isinstance(values, dict):
        return TOKENS
    known = ("max_position_embeddings", "original_max_position_embeddings")
    own = [value for name, value in values.items() if name in known and isinstance(value, int)]
    return max([TOKENS, *own, *map(_longest, values.values())])


def _save_random(config: PretrainedConfig, folder: Path) -> None:
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape)
                    if tensor.ndim < 2:  # norms, biases, corrections: near their defaults
                        tensor.add_(0.1 * noise)
                    else:
                        tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    model.save_pretrained(folder)


@torch.inference_mode()
def _logits(folder: Path, dtype: str, longest: int) -> Tensor:
    """Of random tokens at positions from 0 on, across the model's longest context and far beyond it, [tokens, vocab].

    Raises:
        NotFoldable: the host's class does not load what was written for it.
    """
    model, problems = load_strict(str(folder), dtype)
    if problems:
        raise NotFoldable(f"the {model.config.model_type} class does not load the model: {'; '.join(problems[:4])}")
    model.set_attn_implementation("eager")  # not every class has a faster one, and each rounds in its own way
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (TOKENS, TOKENS - PADDING)]
    ids, mask = pad(rows, 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found: list[Tensor] = [
        model(input_ids=ids, attention_mask=mask, position_ids=positions + offset, use_cache=False).logits[mask.bool()]
        for offset in (0, max(0, longest - TOKENS // 2), 3 * longest)
    ]
    return torch.cat(found).float()
