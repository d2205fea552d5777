"""What ``steer`` means: which tokens, which sites, in which order, and that it leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel, pipeline

from steer_bake.affine import Affine
from steer_bake.direction import Direction, unit
from steer_bake.errors import RecipeError, UnknownArchitecture
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import load_model, load_tokenizer
from steer_bake.reload_worker import greedy, logits
from steer_bake.sites import LAYER_POINTS, Site
from steer_bake.steering import steer

from . import tiny

ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
PAD = 258


@pytest.fixture(scope="module")
def model(llama: Path) -> PreTrainedModel:
    return load_model(llama, dtype="float32")


def direction(seed: int = 0) -> Direction:
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return Direction(unit(vector)[0], None)


def add(site: Site, amount: float = 3.0, seed: int = 0) -> Intervention:
    return intervene("add", direction(seed), site, amount, "unit")


def states(model: PreTrainedModel, row: list[int]) -> tuple[torch.Tensor, ...]:
    """resid_pre of every layer; the last item of hidden_states is behind the final norm and left out."""
    return model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[:-1]


@torch.no_grad()
@pytest.mark.parametrize("layer", range(tiny.LAYERS - 1))
def test_adding_at_resid_post_moves_the_next_layers_input_by_the_vector_at_every_token(
    model: PreTrainedModel, layer: int
) -> None:
    before = states(model, ROWS[0])
    with steer(model, [add(Site("resid_post", layer))]):
        after = states(model, ROWS[0])
    for earlier in range(layer + 1):
        assert torch.equal(before[earlier], after[earlier])
    moved = after[layer + 1] - before[layer + 1]
    assert torch.allclose(moved, (3.0 * direction().vector).expand_as(moved), atol=1e-5)


@torch.no_grad()
def test_resid_pre_of_a_layer_is_resid_post_of_the_one_before(model: PreTrainedModel) -> None:
    with steer(model, [add(Site("resid_post", 1))]):
        post = logits(model, ROWS, PAD)
    with steer(model, [add(Site("resid_pre", 2))]):
        pre = logits(model, ROWS, PAD)
    assert torch.equal(post, pre)


@torch.no_grad()
@pytest.mark.parametrize("point", LAYER_POINTS)
def test_every_point_has_an_effect_and_projects(model: PreTrainedModel, point: str) -> None:
    plain = logits(model, ROWS, PAD)
    with steer(model, [add(Site(point, 1))]):
        assert not torch.allclose(logits(model, ROWS, PAD), plain, atol=1e-2)
    with steer(model, [intervene("ablate", direction(), Site(point, 1))]):
        assert not torch.allclose(logits(model, ROWS, PAD), plain, atol=1e-3)


@torch.no_grad()
def test_ablating_at_resid_mid_removes_the_component_from_what_the_mlp_norm_reads(model: PreTrainedModel) -> None:
    seen: list[torch.Tensor] = []
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    with steer(model, [intervene("ablate", direction(), Site("resid_mid", 1))]):
        handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        after = states(model, ROWS[0])
        handle.remove()
    assert (seen[0] @ direction().vector).abs().max() < 1e-5
    # and the stream itself was changed, not only the copy that the norm reads
    assert not torch.allclose(after[2], states(model, ROWS[0])[2], atol=1e-3)


@torch.no_grad()
def test_ablation_at_writes_keeps_the_whole_stream_free_of_the_direction(model: PreTrainedModel) -> None:
    with steer(model, [intervene("ablate", direction(), Site("writes"))]):
        for h in states(model, ROWS[0]):
            assert ((h @ direction().vector).abs() / h.norm(dim=-1)).max() < 1e-5


@torch.no_grad()
def test_clamp_at_writes_equals_clamping_the_stream_after_every_write(model: PreTrainedModel) -> None:
    clamp = [intervene("clamp", direction(), Site("writes"), 2.0, "unit")]
    with steer(model, clamp):
        at_writes = logits(model, ROWS, PAD)
    sites = [Site("resid_pre", 0), *(Site(p, n) for n in range(tiny.LAYERS) for p in ("resid_mid", "resid_post"))]
    with steer(model, [intervene("clamp", direction(), site, 2.0, "unit") for site in sites]):
        after_every_write = logits(model, ROWS, PAD)
    # float32 rounding through four layers; the effect itself is of order 1
    assert torch.allclose(at_writes, after_every_write, atol=2e-5)
    assert not torch.allclose(at_writes, logits(model, ROWS, PAD), atol=1e-1)


@torch.no_grad()
def test_writes_never_touch_what_another_intervention_adds(model: PreTrainedModel) -> None:
    shift = add(Site("resid_post", 1))  # along the very direction that is ablated
    with steer(model, [shift, intervene("ablate", direction(), Site("writes"))]):
        after = states(model, ROWS[0])
    assert (after[1] @ direction().vector).abs().max() < 1e-5
    assert torch.allclose(after[2] @ direction().vector, torch.tensor(3.0), atol=1e-4)


@torch.no_grad()
def test_the_order_of_sites_is_that_of_the_forward_pass_whatever_the_order_given(model: PreTrainedModel) -> None:
    first, second = intervene("ablate", direction(1), Site("mlp_out", 1)), add(Site("resid_post", 1), seed=1)
    outcomes = []
    for order in ([first, second], [second, first]):
        with steer(model, order):
            outcomes.append(logits(model, ROWS, PAD))
    assert torch.equal(*outcomes)


@torch.no_grad()
def test_interventions_at_one_site_act_in_the_order_given(model: PreTrainedModel) -> None:
    shift, ablate = add(Site("mlp_out", 1)), intervene("ablate", direction(), Site("mlp_out", 1))
    with steer(model, [shift, ablate]):
        ablated_last = logits(model, ROWS, PAD)
    with steer(model, [ablate]):
        only_ablated = logits(model, ROWS, PAD)
    with steer(model, [ablate, shift]):
        added_last = logits(model, ROWS, PAD)
    assert torch.allclose(ablated_last, only_ablated, atol=1e-5)
    assert not torch.allclose(added_last, only_ablated, atol=1e-2)


def test_cached_decoding_and_left_padding_see_the_same_steering(model: PreTrainedModel) -> None:
    with steer(model, [add(Site("resid_post", 1))]):
        together = greedy(model, ROWS, PAD, 8)
        for row, expected in zip(ROWS, together, strict=True):
            ids = list(row)
            for token in expected[expected != PAD].tolist():
                with torch.no_grad():  # no cache, no padding: every step from scratch
                    following = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                assert following == token
                ids.append(following)


def test_a_transformers_pipeline_is_steered(llama: Path, model: PreTrainedModel) -> None:
    generate = pipeline("text-generation", model=model, tokenizer=load_tokenizer(llama))
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    plain = generate("Tell me about cats.", **options)[0]["generated_text"]
    with steer(model, [add(Site("resid_post", 2), 40.0)]):
        steered = generate("Tell me about cats.", **options)[0]["generated_text"]
    assert steered != plain
    assert generate("Tell me about cats.", **options)[0]["generated_text"] == plain


def test_the_model_is_restored_after_an_exception(model: PreTrainedModel) -> None:
    before = logits(model, ROWS, PAD)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ZeroDivisionError), steer(model, [add(Site("resid_post", 1)), add(Site("resid_pre", 0))]):
        raise ZeroDivisionError
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(logits(model, ROWS, PAD), before)


def test_a_layer_that_is_not_there_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="layers 0 to 3"), steer(model, [add(Site("resid_post", 4))]):
        pass


def test_a_vector_of_another_width_is_refused(model: PreTrainedModel) -> None:
    wide = Intervention(Site("resid_post", 1), Affine.identity(7))
    with pytest.raises(RecipeError, match="7 components"), steer(model, [wide]):
        pass


def test_a_model_of_an_unknown_type_is_refused(model: PreTrainedModel) -> None:
    class Other(torch.nn.Module):
        config = type("Config", (PretrainedConfig,), {"model_type": "unheard_of"})()

    with pytest.raises(UnknownArchitecture, match="unheard_of"), steer(Other(), []):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("point", ["writes", "writers"])
def test_a_shift_at_every_write_is_refused(point: str) -> None:
    with pytest.raises(RecipeError, match=r"resid_post|with a layer"):
        add(Site(point))


@torch.no_grad()
def test_a_model_that_was_compiled_before_is_steered_and_restored(llama: Path) -> None:
    model = load_model(llama, dtype="float32")
    ids = torch.tensor([ROWS[0]])
    compiled = torch.compile(model, backend="eager")
    plain = compiled(input_ids=ids).logits
    with steer(model, [add(Site("resid_post", 1))]):
        steered = compiled(input_ids=ids).logits
        assert torch.allclose(steered, model(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(steered, plain, atol=1e-2)
    assert torch.allclose(compiled(input_ids=ids).logits, plain, atol=1e-5)


def test_an_infinite_vector_is_refused() -> None:
    with pytest.raises(RecipeError, match="infinity"):
        add(Site("resid_post", 1), 1e39)
