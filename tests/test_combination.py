"""Claims of refusal.py and combination.py: the event is a probability, learning does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer_bake import architectures
from steer_bake.affine import Affine
from steer_bake.checkpoint import Checkpoint
from steer_bake.combination import Combination, Learning, basis, learn, whitened
from steer_bake.errors import NotFoldable, RecipeError
from steer_bake.interventions import Intervention
from steer_bake.models import load_model
from steer_bake.plan import make_plan
from steer_bake.prompts import Encoded, Prompt, encode
from steer_bake.refusal import OPENINGS, Event, next_token_logits
from steer_bake.sites import Site
from steer_bake.steering import steer

from . import tiny

SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return load_model(llama, dtype="float32")


def encoded(*texts: str) -> list[Encoded]:
    return encode(tiny.tokenizer(), [Prompt((("user", text),)) for text in texts])


HARMFUL = encoded("Hurt him.", "Steal it now.", "Burn all of it down.", "Lie to them.")
BENIGN = encoded("Hello!", "What is a tree?", "Name two rivers in Asia.", "Sing.", "Bye.")


# --- the event


def test_an_opening_that_begins_with_another_adds_nothing() -> None:
    assert Event.of([(1, 2, 3), (1, 2), (4,), (4, 5), (6, 1)]).openings == ((1, 2), (4,), (6, 1))
    with pytest.raises(RecipeError, match="at least one opening"):
        Event.of([])


def test_probability_of_the_event_is_that_of_whole_forwards(model: Any) -> None:
    event = Event.of([(5,), (7, 8, 9), (7, 8, 3), (7, 1), (20, 21)])
    found = event.log_probability(model, HARMFUL)
    for one, value in zip(HARMFUL, found, strict=True):
        total = 0.0
        for opening in event.openings:
            logits = model(input_ids=torch.tensor([one.ids + opening])).logits[0].log_softmax(-1)
            total += float(sum(logits[len(one.ids) - 1 + n, token] for n, token in enumerate(opening)).exp())
        assert float(value.exp()) == pytest.approx(total, rel=1e-4)
        assert float(event.confidence(model, [one])) == pytest.approx(2 * total - 1, abs=1e-5)


def test_an_event_and_its_complement_sum_to_one(model: Any) -> None:
    """Every token as an opening is certain; the confidence is then 1, and without half of them what the rest says."""
    size = model.config.vocab_size
    whole = Event.of([(token,) for token in range(size)])
    assert float(whole.log_probability(model, HARMFUL).abs().max()) < 1e-5
    halves = [Event.of([(token,) for token in range(start, size, 2)]) for start in (0, 1)]
    sums = halves[0].confidence(model, HARMFUL) + halves[1].confidence(model, HARMFUL)
    torch.testing.assert_close(sums, torch.zeros(4, dtype=torch.float64), atol=1e-5, rtol=0)


def test_padding_and_batches_do_not_change_the_event(model: Any) -> None:
    event = Event.phrases(tiny.tokenizer(), OPENINGS)
    together = event.log_probability(model, BENIGN)
    apart = torch.cat([event.log_probability(model, [one]) for one in BENIGN])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    logits = next_token_logits(model, BENIGN)
    plain = [model(input_ids=torch.tensor([one.ids])).logits[0, -1] for one in BENIGN]
    torch.testing.assert_close(logits, torch.stack(plain), rtol=1e-4, atol=1e-4)


def test_phrases_begin_with_a_space_only_where_the_template_leaves_room_for_one() -> None:
    tokenizer = tiny.tokenizer()
    texts = {}
    for end in ("assistant\n", "assistant:"):
        tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}" + end + "{% endif %}"
        openings = Event.phrases(tokenizer, ["Sorry", "No"]).openings
        texts[end] = {tokenizer.decode(list(one)) for one in openings}
    assert texts == {"assistant\n": {"Sorry", "No"}, "assistant:": {"Sorry", " Sorry", "No", " No"}}


def test_judged_answers_define_the_event_by_what_only_refusals_begin_with() -> None:
    answers = [(1, 2, 3), (1, 2, 4), (5, 6), (1, 9)]
    assert Event.judged(answers, [True, True, False, False]).openings == ((1, 2),)
    assert Event.judged(answers, [True, False, False, False]).openings == ((1, 2, 3),)
    with pytest.raises(RecipeError, match="begins in 1 tokens as no answer does"):
        Event.judged(answers, [True, True, False, False], longest=1)


def test_what_all_prompts_begin_with_is_run_once_and_changes_nothing(model: Any) -> None:
    """With a system prompt the first forward is over its tokens alone; values and gradients are those of one by one."""
    system = "You answer in one short sentence, and you say so when you do not know. " * 3
    asked = ("Hurt him.", "What is a tree?")
    prompts = encode(tiny.tokenizer(), [Prompt((("system", system), ("user", text))) for text in asked])
    event = Event.of([(5,), (7, 8, 9), (20, 21)])
    seen: list[tuple[int, int]] = []
    shift = torch.zeros(tiny.WIDTH, requires_grad=True)
    none = torch.zeros(tiny.WIDTH, 0)
    found = []
    for groups in ([prompts], [[one] for one in prompts]):
        seen.clear()
        handle = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
        try:
            with steer(model, [Intervention(SITE, Affine(none, none, shift), "shift")]):
                value = torch.cat([event.log_probability(model, group) for group in groups])
        finally:
            handle.remove()
        found.append((value.detach(), torch.autograd.grad(value.sum(), shift)[0], list(seen)))
    (together, slope, shapes), (apart, other, _) = found
    (rows, shared), (both, rest) = shapes
    assert (rows, both) == (1, 4)
    assert rest < shared
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, other, rtol=1e-3, atol=1e-4)


# --- whitening


def test_whitening_makes_the_covariance_the_identity_and_stays_close_to_the_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (
        torch.randn(4000, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    )
    gain = whitened(torch.eye(6), rows, ridge=1e-9)
    torch.testing.assert_close(gain, gain.T)
    white = (rows - rows.mean(0)) @ gain.T
    torch.testing.assert_close(white.T @ white / len(rows), torch.eye(6).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("relative", [False, True])
def test_whitening_by_the_small_system_equals_the_dense_one(relative: bool) -> None:
    rows = torch.randn(20, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / 20
    amount = 0.01 * (float(covariance.trace()) / 48 if relative else 1)
    sizes, axes = torch.linalg.eigh(covariance + amount * torch.eye(48).double())
    dense = axes @ torch.diag(sizes.rsqrt()) @ axes.T
    torch.testing.assert_close(whitened(torch.eye(48), rows, 0.01, relative), dense, atol=1e-8, rtol=1e-6)


def test_the_basis_is_orthonormal_and_leaves_what_benign_prompts_do_with_few_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, directions = torch.randn(60, 256, generator=generator), torch.randn(256, 5, generator=generator)
    found = basis(directions, rows)
    torch.testing.assert_close(found.T @ found, torch.eye(5).double(), atol=1e-10, rtol=0)
    span = torch.linalg.svd(rows.double() - rows.double().mean(0), full_matrices=False).Vh[:59]
    inside = (span @ found).square().sum() / 5
    before = (span @ torch.linalg.qr(directions.double()).Q).square().sum() / 5
    assert float(inside) < 1e-3 < 0.1 < float(before)
    with pytest.raises(RecipeError, match="linearly dependent"):
        basis(directions[:, [0, 1, 0]], rows)


# --- learning


def learned(model: Any, **changes: Any) -> Combination:
    start = torch.linalg.qr(torch.randn(tiny.WIDTH, 3, generator=torch.Generator().manual_seed(1))).Q
    event = Event.of([(5,), (7, 8), (9,)])
    return learn(
        model, SITE, start, HARMFUL, BENIGN, event, Learning(**{"epochs": 12, "rate": 0.05, "batch": 4, **changes})
    )


def test_learning_raises_refusals_of_harmful_prompts_and_kl_holds_benign_ones_back(model: Any) -> None:
    event = Event.of([(5,), (7, 8), (9,)])
    before = float(event.log_probability(model, HARMFUL).mean().detach())
    moved = {}
    for weight in (0.0, 10.0):
        found = learned(model, kl_weight=weight, length=2.0)
        with steer(model, [found.intervention()]), torch.no_grad():
            after = float(event.log_probability(model, HARMFUL).mean())
            steered = next_token_logits(model, BENIGN).log_softmax(-1)
        with torch.no_grad():
            plain = next_token_logits(model, BENIGN).log_softmax(-1)
        moved[weight] = after - before, float((plain.exp() * (plain - steered)).sum(-1).mean())
        assert found.curve[-1].refusal < found.curve[0].refusal
    assert moved[0.0][0] > moved[10.0][0] > 0.01, "refusals go up, more so unrestrained"
    assert moved[10.0][1] < moved[0.0][1] / 2, "and benign answers move less where KL counts"


def test_the_constant_lies_in_the_learned_span_and_is_the_same_again(model: Any) -> None:
    one, other = (learned(model) for _ in range(2))
    torch.testing.assert_close(one.vector, other.vector)
    assert not one.affine.is_linear
    assert len(one.curve) == 12 * 2, "each epoch goes once through the longer list in batches of 4"


def test_the_model_is_frozen_and_left_as_it_was(model: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    required = [parameter.requires_grad for parameter in model.parameters()]
    learned(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_planner_bakes_the_constant_and_refuses_the_linear_form_in_mid_stream(model: Any, llama: Path) -> None:
    base = Checkpoint.open(llama)
    constant = learned(model)
    assert make_plan(base, [constant.intervention()]).edits
    linear = learned(model, form="linear")
    assert linear.affine.is_linear
    assert not linear.affine.has_shift
    with pytest.raises(NotFoldable, match="a projection of the stream in the middle"):
        make_plan(base, [linear.intervention()])
    start = torch.linalg.qr(torch.randn(tiny.WIDTH, 2, generator=torch.Generator().manual_seed(1))).Q
    at_writer = learn(
        model, Site("mlp_out", 1), start, HARMFUL, BENIGN, Event.of([(5,)]), Learning(epochs=2, form="linear")
    )
    assert make_plan(base, [at_writer.intervention()]).edits
    assert architectures.layout(base.config).layers == tiny.LAYERS


def test_training_that_diverges_is_a_sentence(model: Any) -> None:
    with pytest.raises(RecipeError, match="use a smaller rate"):
        learned(model, rate=1e20)
    with pytest.raises(RecipeError, match="harmful and benign prompts"):
        learn(model, SITE, torch.eye(tiny.WIDTH)[:, :2], [], BENIGN, Event.of([(5,)]))
