"""What is found by trying a model's layers is what architectures/ says, and unclaimed models can be steered with it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from steer_bake import architectures
from steer_bake.activations import collect
from steer_bake.affine import Affine
from steer_bake.architectures import SLOTS, Layout, submodule
from steer_bake.architectures._probing import probed, small
from steer_bake.errors import UnknownArchitecture
from steer_bake.interventions import Intervention
from steer_bake.interventions.ablate import ablate
from steer_bake.prompts import Encoded
from steer_bake.sites import Site
from steer_bake.steering import steer

from . import zoo

DESCRIBED = (
    *("llama", "qwen2", "qwen3_moe", "mixtral", "gemma2", "olmo2", "granite", "cohere", "phi", "falcon", "bloom"),
    *("gpt2", "gpt_neox", "gptj", "opt", "mpt", "mamba", "falcon_h1", "bamba", "bert", "bart", "dbrx", "minicpm3"),
)
UNCLAIMED = ("rwkv", "xmod", "zaya", "minimax", "inkling_text")
OFTEN = 0.9


def there(layout: Layout, model: PreTrainedModel, slot: str) -> dict[str, float]:
    """The blocks that some layer has, and how much of their output the stream gets."""
    found = [one for layer in range(layout.layers) for one in layout.modules(model, slot, layer)]
    return {block.module: round(block.scale(layout.text), 4) for block, _ in found}


def test_trying_finds_what_is_described() -> None:
    wrong = []
    for model_type in DESCRIBED:
        model = zoo.build(model_type)
        tried, known = probed(model), architectures.layout(model.config)
        same = tried.architecture.stack == known.architecture.stack and tried.parallel == known.parallel
        if not same or any(there(tried, model, slot) != there(known, model, slot) for slot in SLOTS):
            wrong.append(model_type)
    assert len(wrong) <= (1 - OFTEN) * len(DESCRIBED), wrong


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "falcon_h1"])
def test_the_middle_of_a_layer_is_found(model_type: str) -> None:
    model = zoo.build(model_type)
    assert probed(model).architecture.middle == architectures.layout(model.config).architecture.middle


def test_a_layer_that_multiplies_the_stream_shows_no_writers() -> None:
    assert not any(there(probed(model), model, slot) for model in [zoo.build("doge")] for slot in SLOTS)


@pytest.mark.parametrize("model_type", UNCLAIMED)
def test_an_unclaimed_model_is_steered_at_the_end_of_a_layer(model_type: str) -> None:
    model, site = zoo.build(model_type), Site("resid_post", 1)
    with pytest.raises(UnknownArchitecture, match="never baked"):
        architectures.layout(model.config)
    shift = torch.linspace(-1, 1, zoo.WIDTH)
    ids, seen = zoo.ids(9), list[torch.Tensor]()
    layer = submodule(model, architectures.layout_of(model).layer(2))

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    with torch.no_grad():
        handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
        plain = model(input_ids=ids).logits
        with steer(model, [Intervention(site, Affine(torch.zeros(zoo.WIDTH, 0), torch.zeros(zoo.WIDTH, 0), shift))]):
            steered = model(input_ids=ids).logits
        handle.remove()
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert torch.allclose(seen[1] - seen[0], shift.expand_as(seen[0]), atol=1e-5)
    assert (steered - plain).abs().max() > 1e-3


def test_an_unclaimed_model_is_ablated_at_its_writes() -> None:
    model = zoo.build("inkling_text")
    direction = torch.nn.functional.normalize(torch.linspace(-1, 1, zoo.WIDTH), dim=0)
    layout, ends = architectures.layout_of(model), list[torch.Tensor]()
    with torch.no_grad(), steer(model, [Intervention(Site("writes"), ablate(direction, 1.0))]):
        handles = [
            submodule(model, layout.layer(layer)).register_forward_hook(
                lambda module, args, out: ends.append((out[0] if isinstance(out, tuple) else out) @ direction)
            )
            for layer in range(layout.layers)
        ]
        model(input_ids=zoo.ids(9))
        for handle in handles:
            handle.remove()
    assert len(ends) == zoo.LAYERS
    assert max(float(one.abs().max()) for one in ends) < 1e-4


def test_activations_of_an_unclaimed_model_are_read() -> None:
    model, site = zoo.build("rwkv"), Site("resid_post", 2)
    prompts = [Encoded(tuple(zoo.ids(7, seed=seed)[0].tolist()), 6, 7, "") for seed in range(4)]
    found = collect(model, architectures.layout_of(model), prompts, ["one", "two"] * 2, [site])
    assert found[site]["one"].count == 2
    assert not torch.allclose(found[site]["one"].mean, found[site]["two"].mean)


def test_trying_leaves_the_model_as_it_was() -> None:
    model = zoo.build("rwkv").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probed(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_a_stack_is_refused() -> None:
    with pytest.raises(UnknownArchitecture, match="no list of layers"):
        architectures.layout_of(zoo.build("xlm"))


def test_a_small_model_stands_in_for_a_large_one() -> None:
    config = zoo.CONFIG_MAPPING["olmo_hybrid"]()
    model = small(config)
    assert config.num_hidden_layers > model.config.num_hidden_layers == 4
    assert set(model.config.layer_types) == set(config.layer_types)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e7
