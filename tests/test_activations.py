"""Claims of steer_bake.activations: the fast reader gives what one plain forward per prompt gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from steer_bake import activations, architectures
from steer_bake.activations import collect
from steer_bake.errors import ExtractionError, RecipeError
from steer_bake.prompts import Encoded, Prompt, encode
from steer_bake.sites import LAYER_POINTS, Site

from . import tiny

SITES = [Site(point, layer) for point in LAYER_POINTS for layer in range(tiny.LAYERS)]
CLOSE = 1e-5


def layout(model: Any) -> architectures.Layout:
    return architectures.layout(model.config)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module", params=["llama", "tied_llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return load(request.getfixturevalue(request.param))


def prompts(position: str | int = "last") -> tuple[list[Encoded], list[str]]:
    """Two labels with system prompts of their own, questions of many lengths."""
    systems = {"gloomy": "You are gloomy.", "cheerful": "You are very cheerful and answer in full sentences."}
    asked = ["Why?", "What is rain made of?", "Tell me about the sea.", "How?", "Say something about cats and dogs."]
    made = [
        Prompt((("system", system), ("user", f"{question} {'please ' * n}")), label=label)
        for n, question in enumerate(asked)
        for label, system in systems.items()
    ]
    return encode(tiny.tokenizer(), made, position), [str(prompt.label) for prompt in made]


def naive(model: Any, one: Encoded, site: Site) -> torch.Tensor:
    """The stream at ``site`` over the read span [tokens, d], from a whole forward of this prompt alone."""
    writes: dict[str, torch.Tensor] = {}
    layer = model.model.layers[site.layer]
    handles = [
        layer.self_attn.register_forward_hook(lambda m, a, out: writes.update(attn_out=out[0])),
        layer.mlp.register_forward_hook(lambda m, a, out: writes.update(mlp_out=out)),
        layer.register_forward_hook(lambda m, a, out: writes.update(resid_post=out)),
    ]
    with torch.no_grad():
        hidden = model(torch.tensor([one.ids]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    writes["resid_pre"] = hidden[site.layer]
    writes["resid_mid"] = hidden[site.layer] + writes["attn_out"]
    return writes[site.point][0, one.start : one.stop].float()


def same(left: torch.Tensor, right: torch.Tensor, tolerance: float = CLOSE) -> bool:
    return float((left - right).norm() / right.norm()) <= tolerance


@pytest.mark.parametrize("position", ["last", -5, 3, "mean", "instruction"])
def test_collect_equals_one_plain_forward_per_prompt(model: Any, position: str | int) -> None:
    encoded, labels = prompts(position)
    found = collect(model, layout(model), encoded, labels, SITES, rows=True, tokens_per_batch=150)
    for site in SITES:
        streams = [naive(model, one, site) for one in encoded]
        for label in ("gloomy", "cheerful"):
            mine = [stream for stream, of in zip(streams, labels, strict=True) if of == label]
            statistics = found[site][label]
            rows = torch.stack([stream.mean(0) for stream in mine])
            assert statistics.count == 5
            assert statistics.rows is not None
            assert same(statistics.rows, rows)
            assert same(statistics.mean, rows.mean(0))
            norm = sum(float(stream.norm(dim=-1).mean()) for stream in mine) / 5
            assert statistics.norm == pytest.approx(norm, rel=CLOSE)


@pytest.mark.parametrize("position", ["last", "mean", 2])
def test_result_does_not_depend_on_batches_order_or_sharing(
    model: Any, position: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, labels = prompts(position)
    plain = collect(model, layout(model), encoded, labels, SITES)
    for tokens in (1, 100, 10_000):
        other = collect(model, layout(model), encoded, labels, SITES, tokens_per_batch=tokens)
        assert all(same(other[site][label].mean, plain[site][label].mean) for site in SITES for label in plain[site])
    shuffled = random.Random(0).sample(range(len(encoded)), len(encoded))
    other = collect(model, layout(model), [encoded[i] for i in shuffled], [labels[i] for i in shuffled], SITES)
    assert all(same(other[site][label].mean, plain[site][label].mean) for site in SITES for label in plain[site])
    monkeypatch.setattr(activations, "keeps_keys_and_values", lambda model: False)
    other = collect(model, layout(model), encoded, labels, SITES)
    assert all(same(other[site][label].mean, plain[site][label].mean) for site in SITES for label in plain[site])


def test_rows_are_in_prompt_order_and_only_there_when_asked_for(model: Any) -> None:
    encoded, labels = prompts()
    site = Site("resid_post", 1)
    found = collect(model, layout(model), encoded, labels, [site], rows=True)[site]
    for label in found:
        mine = [one for one, of in zip(encoded, labels, strict=True) if of == label]
        for row, one in zip(found[label].rows, mine, strict=True):  # type: ignore[arg-type]
            assert same(row, naive(model, one, site)[0])
    assert collect(model, layout(model), encoded, labels, [site])[site]["gloomy"].rows is None


class Forwards:
    """Counts the tokens a module is given."""

    def __init__(self, module: torch.nn.Module):
        self.calls, self.tokens = 0, 0
        self.handle = module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.calls, self.tokens = self.calls + 1, self.tokens + hidden.shape[0] * hidden.shape[1]


def test_forward_stops_after_the_deepest_site(model: Any) -> None:
    encoded, labels = prompts()
    layers, head = [Forwards(layer) for layer in model.model.layers], Forwards(model.lm_head)
    mlp = Forwards(model.model.layers[2].mlp)
    collect(model, layout(model), encoded, labels, [Site("resid_mid", 2), Site("resid_post", 0)])
    for counter in (*layers, head, mlp):
        counter.handle.remove()
    assert [counter.calls > 0 for counter in layers] == [True, True, True, False]
    assert mlp.calls == 0
    assert head.calls == 0


def test_head_is_never_run(model: Any) -> None:
    encoded, labels = prompts()
    head, norm = Forwards(model.lm_head), Forwards(model.model.norm)
    collect(model, layout(model), encoded, labels, [Site("resid_post", tiny.LAYERS - 1)])
    head.handle.remove()
    norm.handle.remove()
    assert head.calls == norm.calls == 0


def test_shared_beginning_is_computed_once_per_label(model: Any) -> None:
    """Two system prompts: each is computed once, and every prompt's own tokens once."""
    encoded, labels = prompts()
    encoded, labels = encoded * 4, labels * 4
    counter = Forwards(model.model.layers[0])
    collect(model, layout(model), encoded, labels, [Site("resid_post", 0)], tokens_per_batch=1)
    counter.handle.remove()
    shared = {}
    for label in ("gloomy", "cheerful"):
        mine = [one.ids for one, of in zip(encoded, labels, strict=True) if of == label]
        shared[label] = next(i for i in range(len(mine[0])) if len({ids[i] for ids in mine}) > 1)
    own = sum(len(one.ids) - shared[label] for one, label in zip(encoded, labels, strict=True))
    assert shared["gloomy"] > 30
    assert counter.tokens <= own + sum(shared.values())


def test_groups_partition_the_prompts_and_really_share() -> None:
    draw = random.Random(1)
    for _ in range(200):
        beginnings = [tuple(draw.choices(range(4), k=draw.randint(1, 60))) for _ in range(3)]
        encoded = []
        for _ in range(draw.randint(1, 40)):
            ids = draw.choice(beginnings) + tuple(draw.choices(range(4), k=draw.randint(0, 5)))
            encoded.append(Encoded(ids, len(ids) - 1, len(ids)))
        groups = activations._groups(encoded)
        assert sorted(index for group in groups for index in group.members) == list(range(len(encoded)))
        for group in groups:
            members = [encoded[index].ids for index in group.members]
            assert len({ids[: group.length] for ids in members}) == 1
            assert all(len(ids) > group.length for ids in members)
        cost = sum(group.length + sum(len(encoded[i].ids) - group.length for i in group.members) for group in groups)
        assert cost <= sum(len(one.ids) for one in encoded)


def test_deeply_nested_beginnings_are_no_recursion_error() -> None:
    encoded = [Encoded((1,) * n + (2, 3), 0, 1) for n in range(1500)]
    assert sum(len(group.members) for group in activations._groups(encoded)) == 1500


def test_nan_is_named_by_its_first_site_and_its_prompt_and_leaves_no_hook(llama: Path) -> None:
    model = load(llama)
    encoded, labels = prompts()
    (token,) = tiny.tokenizer()("T")["input_ids"]  # in "Tell me about the sea" and in no other prompt
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    sites = [Site("resid_post", 3), Site("resid_pre", 0), Site("attn_out", 1)]
    with pytest.raises(ExtractionError, match=r"NaN or infinity at attn_out\.1 for the prompt 'Tell me about the sea"):
        collect(model, layout(model), encoded, labels, sites)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_and_mode_restored_when_the_forward_fails(llama: Path) -> None:
    model = load(llama).train()
    model.lm_head.eval()

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    encoded, labels = prompts()
    with pytest.raises(KeyboardInterrupt):
        collect(model, layout(model), encoded, labels, SITES, progress=fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training


def test_statistics_hold_no_more_for_more_prompts(model: Any) -> None:
    labels = ["gloomy", "cheerful"] * 5
    for times in (1, 20):
        sums = activations._Sums(labels * times, SITES, tiny.WIDTH, False, (), None)
        reads = {site: activations._Read(torch.ones(2, tiny.WIDTH), torch.ones(2)) for site in SITES}
        for start in range(0, len(labels) * times, 2):
            sums.add([start, start + 1], reads)
        held = sum(tensor.numel() for sum_ in sums._sums.values() for tensor in sum_.tensors())
        assert held == len(SITES) * 2 * (tiny.WIDTH + 1)


def test_progress_counts_up_to_all_prompts(model: Any) -> None:
    encoded, labels = prompts()
    seen: list[tuple[int, int]] = []
    collect(
        model,
        layout(model),
        encoded,
        labels,
        SITES[:1],
        tokens_per_batch=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, len(encoded)) for n in range(1, len(encoded) + 1)]


def test_bfloat16_model_is_summed_in_float32(llama: Path) -> None:
    model = load(llama, torch.bfloat16)
    encoded, labels = prompts()
    site = Site("resid_post", 2)
    found = collect(model, layout(model), encoded, labels, [site], rows=True)[site]["gloomy"]
    assert found.mean.dtype == torch.float32
    assert found.rows is not None
    assert found.rows.dtype == torch.float32
    assert same(found.mean, found.rows.mean(0), 1e-6)
    exact = collect(load(llama), layout(model), encoded, labels, [site])[site]["gloomy"]
    assert same(found.mean, exact.mean, 2e-2)


def long_prompts() -> Sequence[Encoded]:
    draw = random.Random(2)
    start = tuple(draw.choices(range(200), k=40))
    ids = [start + tuple(draw.choices(range(200), k=draw.randint(1, 30))) for _ in range(12)]
    return [Encoded(one, draw.choice([0, 30, len(one) - 1]), len(one)) for one in ids]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shared_beginning_is_right_for_sliding_windows_and_every_attention(attention: str) -> None:
    common = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    made = [
        MistralForCausalLM(MistralConfig(**common, sliding_window=8, attn_implementation=attention)),
        LlamaForCausalLM(LlamaConfig(**common, attn_implementation=attention)),
    ]
    encoded = long_prompts()
    for model in made:
        tiny.randomise(model, 3).eval()
        assert activations._groups(encoded)[0].length >= 40
        found = collect(model, layout(model), encoded, ["x"] * len(encoded), [Site("resid_post", 3)], rows=True)
        rows = found[Site("resid_post", 3)]["x"].rows
        assert rows is not None
        for row, one in zip(rows, encoded, strict=True):
            caught: list[torch.Tensor] = []
            handle = model.model.layers[3].register_forward_hook(lambda m, a, out, caught=caught: caught.append(out))
            with torch.no_grad():
                model(torch.tensor([one.ids]))
            handle.remove()
            assert same(row, caught[0][0, one.start : one.stop].mean(0))


def test_many_sites_at_once_are_refused_with_a_sentence(model: Any) -> None:
    encoded, labels = prompts()
    with pytest.raises(RecipeError, match="'writes' is many"):
        collect(model, layout(model), encoded, labels, [Site("writes")])
    with pytest.raises(RecipeError, match="no prompts"):
        collect(model, layout(model), [], [], SITES)
