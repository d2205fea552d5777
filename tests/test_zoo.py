"""The tiny models that other tests rely on: they reload exactly, every weight matters, and they generate."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import zoo

FEW = (
    *("llama", "qwen2", "qwen3_moe", "mixtral", "gpt2", "gpt_neox", "opt", "falcon", "gemma2", "olmo2"),
    *("mamba", "bamba", "deepseek_v3"),
)
every_type = pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in zoo.TYPES]
)
PROMPT, ANSWER, PADDING = 14, 8, 5
# Of std(logits): the same weights at other addresses may be summed in another order (1.7e-6 was seen). A weight that
# did not come back moves logits by more: test_every_parameter_reaches_the_logits has this bound too.
RELOADED = 1e-5
SAME = 0.02  # of logits of size 1 to 2: some recurrent classes have another formula for one step than for many


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def greedy(model: PreTrainedModel, tokens: torch.Tensor, mask: torch.Tensor, *, cache: bool = True) -> torch.Tensor:
    """Logits of every step, ``batch x steps x vocabulary``: equal tokens alone could be luck."""
    made = model.generate(
        input_ids=tokens,
        attention_mask=mask,
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        do_sample=False,
        use_cache=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert made.sequences.shape[1] == tokens.shape[1] + ANSWER
    return torch.stack(made.logits, dim=1)


def test_every_causal_model_type_is_a_tiny_model_or_has_a_reason_why_not() -> None:
    assert set(zoo.TYPES) | set(zoo.UNBUILDABLE) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(zoo.TYPES) & set(zoo.UNBUILDABLE)
    assert set(zoo.WRAPPERS) < set(zoo.UNBUILDABLE)
    for table in (zoo.OVERRIDES, zoo.NOT_CAUSAL, zoo.CACHE_DIFFERS, zoo.PADDING_DIFFERS):
        assert set(table) <= set(zoo.TYPES)


def test_an_unbuildable_type_says_why() -> None:
    with pytest.raises(ValueError, match="reversible layers"):
        zoo.config("reformer")


@every_type
def test_a_reloaded_tiny_model_computes_the_same_logits(model_type: str, tmp_path: Path) -> None:
    model = zoo.save(model_type, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    tokens = zoo.ids(24, batch=2)
    before = logits(model, tokens)
    assert (before - logits(loaded.eval(), tokens)).abs().max() / before.std() <= RELOADED


@every_type
def test_a_tiny_model_saved_in_bfloat16_reloads_exactly(model_type: str, tmp_path: Path) -> None:
    model = zoo.save(model_type, tmp_path, dtype=torch.bfloat16)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    if model_type in zoo.NO_BFLOAT16:
        return  # the keys were compared; the class computes nothing in this type
    tokens = zoo.ids(24, batch=2)
    assert torch.equal(logits(model, tokens), logits(loaded.eval(), tokens))


@every_type
def test_the_logits_are_of_order_one_and_causal(model_type: str) -> None:
    model, tokens = zoo.build(model_type), zoo.ids(24, batch=2)
    before = logits(model, tokens)
    assert 0.3 < before.std() < 3
    tokens[:, -1] = zoo.FIRST + (tokens[:, -1] - zoo.FIRST + 1) % (zoo.VOCABULARY - zoo.FIRST)
    change = (logits(model, tokens) - before)[:, :-1].abs().max()
    assert (change > 1e-5) == (model_type in zoo.NOT_CAUSAL)


@every_type
def test_every_parameter_reaches_the_logits(model_type: str) -> None:
    model, tokens = zoo.build(model_type), zoo.ids(24, batch=2)
    before = logits(model, tokens)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in zoo.NO_EFFECT):
            continue
        kept = parameter.detach().clone()
        size = max(float(kept.std()) if kept.numel() > 1 else 0.0, zoo.NOISE)
        with torch.no_grad():
            parameter.add_(size * torch.randn(kept.shape, generator=generator))
            change = (logits(model, tokens) - before).abs().max() / before.std()
            parameter.copy_(kept)
        assert change > 1e-5, name


@every_type
def test_the_same_seed_gives_the_same_weights(model_type: str) -> None:
    state = zoo.build(model_type, seed=3).state_dict()
    torch.randn(1)  # moves the global generator, which must not matter
    again, other = zoo.build(model_type, seed=3).state_dict(), zoo.build(model_type, seed=4).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert not all(torch.equal(value, other[name]) for name, value in state.items())


@every_type
def test_greedy_tokens_do_not_depend_on_the_cache(model_type: str) -> None:
    model, tokens = zoo.build(model_type), zoo.ids(PROMPT)
    mask = torch.ones_like(tokens)
    gap = (greedy(model, tokens, mask) - greedy(model, tokens, mask, cache=False)).abs().max()
    assert (gap < SAME) == (model_type not in zoo.CACHE_DIFFERS), gap


@every_type
def test_greedy_tokens_do_not_depend_on_left_padding(model_type: str) -> None:
    model, tokens = zoo.build(model_type), zoo.ids(PROMPT, batch=2)
    mask = torch.ones_like(tokens)
    alone = greedy(model, tokens[1:, PADDING:], mask[1:, PADDING:])
    tokens[1, :PADDING], mask[1, :PADDING] = zoo.PAD, 0
    gap = (greedy(model, tokens, mask)[1:] - alone).abs().max()
    assert (gap < SAME) == (model_type not in zoo.PADDING_DIFFERS), gap


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_can_be_chosen(model_type: str, tied: bool) -> None:
    model = zoo.build(model_type, tie_word_embeddings=tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_a_hybrid_shows_all_its_kinds_of_layer_at_any_depth() -> None:
    for layers in (4, 6):
        config = zoo.config("gemma2", layers=layers)
        assert set(config.layer_types) == {"sliding_attention", "full_attention"}
        assert len(config.layer_types) == config.num_hidden_layers == layers
