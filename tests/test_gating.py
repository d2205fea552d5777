"""From labelled prompts to gates: planted probes are found, measured honestly, and baked by a recipe."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from steer_bake import card, gating, pipeline
from steer_bake.activations import tokens
from steer_bake.architectures import layout
from steer_bake.checkpoint import Checkpoint
from steer_bake.cli import main
from steer_bake.errors import RecipeError
from steer_bake.gating import calibration, fit, passed_through, samples
from steer_bake.job import Job
from steer_bake.models import load_model, load_tokenizer
from steer_bake.probes import Samples, auroc, youden
from steer_bake.prompts import Prompt, encode
from steer_bake.recipe import parse
from steer_bake.registry import names
from steer_bake.sites import Site

from . import jobs
from .test_bake import add, baked
from .test_validate import report_of

WIDTH, PROMPTS, TOKENS = 24, 80, 5
SITE = Site("mlp_in", 1)


def planted(seed: int, shift: float, *, noise: float = 1.0, flipped: float = 0.0) -> Samples:
    """Two clouds that differ by ``shift`` along the first axis, among directions that are a hundred times as wide."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.arange(PROMPTS).repeat_interleave(TOKENS)
    kind = prompt % 2 == 0
    values = noise * torch.randn(len(prompt), WIDTH, generator=generator)
    values[:, WIDTH // 2 :] *= 100
    values[:, 0] += shift * kind
    labels = kind ^ (torch.rand(PROMPTS, generator=generator) < flipped)[prompt]
    return Samples(values + 7.0, labels, prompt, torch.arange(len(prompt)) % TOKENS == TOKENS - 1)


# --- probes


@pytest.mark.parametrize("probe", names("probes"))
def test_a_planted_direction_is_found_among_wide_noise(probe: str) -> None:
    found = fit(planted(0, 4.0, flipped=0.05), planted(1, 4.0), SITE, probe=probe)
    vector = found.gate.probe / found.gate.probe.norm()
    assert vector[0] > 0.9
    fresh = planted(2, 4.0)
    opened = found.gate.opening(fresh.values, "relu")
    assert float(opened[fresh.positive].mean()) > 0.85
    assert float(opened[~fresh.positive].mean()) < 0.15


@pytest.mark.parametrize("probe", names("probes"))
def test_where_there_is_nothing_to_find_the_interval_holds_one_half(probe: str) -> None:
    measures = fit(planted(0, 0.0), planted(1, 0.0), SITE, probe=probe).measures
    low, high = measures["auroc_interval"]
    assert low < 0.5 < high
    assert measures["auroc"] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("probe", names("probes"))
def test_log_odds_are_calibrated_whatever_the_probe(probe: str) -> None:
    found = fit(planted(0, 2.0), planted(1, 2.0), SITE, probe=probe)
    fresh = planted(5, 2.0)
    bias = found.measures["threshold"] - found.gate.threshold
    sure = (fresh.values @ found.gate.probe + bias).sigmoid()
    for low, high in ((0.1, 0.4), (0.6, 0.9)):
        inside = (sure > low) & (sure < high)
        assert float(fresh.positive[inside].float().mean()) == pytest.approx(float(sure[inside].mean()), abs=0.2)
    assert found.measures["calibration_error"] < 0.1


def test_calibration_gives_back_the_log_odds_of_two_bells() -> None:
    scores = torch.cat([torch.randn(4000, generator=torch.Generator().manual_seed(0)) + shift for shift in (0.0, 2.0)])
    positive = torch.arange(8000) >= 4000
    slope, shift = calibration(3 * scores.double(), positive, torch.full((8000,), 1 / 8000, dtype=torch.float64))
    assert slope == pytest.approx(2 / 3, rel=0.05)  # log-odds of N(2, 1) against N(0, 1): 2 x - 2
    assert shift == pytest.approx(-2.0, abs=0.1)


def test_two_kinds_that_do_not_overlap_get_a_finite_scale() -> None:
    scores = torch.cat([torch.full((10,), -1.0), torch.full((10,), 1.0)]).double()
    slope, shift = calibration(scores, scores > 0, torch.full((20,), 0.05, dtype=torch.float64))
    assert 1 < slope < 20
    assert abs(shift) < 1e-3


def test_the_area_counts_ties_half_and_weighs() -> None:
    scores, positive = torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([False, False, True, True])
    assert auroc(scores, positive, torch.ones(4, dtype=torch.float64)) == pytest.approx(0.875)
    assert auroc(scores, positive, torch.tensor([3.0, 1.0, 1.0, 0.0]).double()) == pytest.approx(0.875)
    assert auroc(-scores, positive, torch.ones(4, dtype=torch.float64)) == pytest.approx(0.125)


def test_the_threshold_lies_in_the_middle_of_the_best_gap() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 5.0, 6.0, 3.0]).double()
    positive = torch.tensor([False, False, False, True, True, True])
    assert youden(scores, positive, torch.ones(6, dtype=torch.float64)) == 2.5
    overlapping = torch.tensor([False, False, True, True, True, False])  # one of each on the wrong side
    best = youden(scores, overlapping, torch.ones(6, dtype=torch.float64))
    rates = [float(((scores > best) & side).sum() / side.sum()) for side in (overlapping, ~overlapping)]
    assert rates[0] - rates[1] == pytest.approx(2 / 3)

    def parting(one: torch.Tensor, other: torch.Tensor) -> float:
        return youden(torch.cat([one, other]), torch.arange(8) < 4, torch.ones(8, dtype=torch.float64))

    high, low = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([-1.0, 0.0, 1.5, 0.5])
    assert 0.5 < parting(high, low) < 1.0 or 1.5 < parting(high, low) < 2.0
    assert 2.0 < parting(high + 5, low) < 6.0


def test_a_prompt_weighs_the_same_however_many_tokens_it_has() -> None:
    one = Samples(
        torch.zeros(5, 2),
        torch.tensor([True, True, True, True, False]),
        torch.tensor([0, 0, 0, 1, 2]),
        torch.ones(5, dtype=torch.bool),
    )
    assert one.weights.tolist() == pytest.approx([1 / 12, 1 / 12, 1 / 12, 1 / 4, 1 / 2])


def test_both_rules_are_measured_and_prompts_of_one_kind_are_refused() -> None:
    train, validation = planted(0, 3.0), planted(1, 3.0)
    measures = fit(train, validation, SITE, probe="lda", unrelated={"noise": planted(2, 0.0).values}).measures
    for rule in ("per_token", "once_per_prompt"):
        assert measures[rule]["true_positives"] - measures[rule]["false_positives"] == measures[rule]["youden"] > 0.6
    assert measures["share_of_tokens"]["positive"] > 0.8 > 0.2 > measures["share_of_tokens"]["negative"]
    assert 0 < measures["false_fires"]["noise"] < 0.3
    only = Samples(validation.values, torch.ones_like(validation.positive), validation.prompt, validation.last)
    with pytest.raises(RecipeError, match="one kind"):
        fit(train, only, SITE, probe="lda")


def test_a_gate_file_gives_back_gates_and_measures(tmp_path: Path) -> None:
    found = fit(planted(0, 3.0), planted(1, 3.0), SITE, probe="lda", name="mood")
    gating.save([found], tmp_path / "gates.safetensors")
    [again] = gating.load(tmp_path / "gates.safetensors")
    assert again.gate.described() == found.gate.described()
    assert json.dumps(dict(again.measures), sort_keys=True) == json.dumps(dict(found.measures), sort_keys=True)
    assert gating.chosen([again], SITE, "mood") is again.gate
    for site, name in ((Site("mlp_in", 2), "mood"), (SITE, "other")):
        with pytest.raises(RecipeError, match=r"mood at mlp_in\.1"):
            gating.chosen([again], site, name)
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="no gate file"):
        gating.load(tmp_path / "other.safetensors")


# --- what is read


def test_tokens_are_those_behind_the_instruction_and_of_the_models_own_answer(llama: Path) -> None:
    model, words = load_model(llama, dtype="float32"), load_tokenizer(llama)
    prompts = [Prompt(messages=(("user", text),)) for text in ("Hi.", "What is the time of day?", "Go")]
    found = passed_through(model, words, prompts, [True, False, True], generated=3)
    for prompt, one in zip(prompts, found, strict=True):
        ids, start = one.encoded.ids, one.encoded.start
        assert words.decode(ids[:start]).endswith(prompt.messages[0][1])
        assert words.decode(ids[start : one.last + 1]) == "<|im_end|>\n<|im_start|>assistant\n"
        expected = model.generate(torch.tensor([ids[: one.last + 1]]), max_new_tokens=3, do_sample=False)[0].tolist()
        assert list(ids) == expected[: len(ids)]
        assert one.encoded.stop == len(ids)
    short = passed_through(model, words, prompts, [True, False, True], position="last", generated=0)
    assert [(one.encoded.start, one.encoded.stop) for one in short] == [(one.last, one.last + 1) for one in found]
    with pytest.raises(RecipeError, match="position"):
        passed_through(model, words, prompts, [True] * 3, position="first")


def test_a_text_without_a_template_is_read_whole_and_nothing_answers_it(llama: Path) -> None:
    model, words = load_model(llama, dtype="float32"), load_tokenizer(llama)
    text = "It rained for three days."
    prompts = [Prompt(messages=(("user", text),)), Prompt(text=text)]
    for position in ("answer", "last"):
        asked, plain = passed_through(model, words, prompts, [True, False], position=position, generated=2)
        assert plain.encoded.ids == tuple(words(text)["input_ids"])
        assert (plain.encoded.start, plain.encoded.stop) == (1, len(plain.encoded.ids))
        assert len(asked.encoded.ids) > asked.last + 1 > len(plain.encoded.ids)
        rows = samples(model, layout(model.config), [asked, plain], [SITE])[SITE]
        assert rows.last[~rows.positive].any().item() is False
        assert int(rows.last.sum()) == 1


def test_rows_are_what_the_mlp_reads_at_each_token_in_any_batch(llama: Path) -> None:
    model, words = load_model(llama, dtype="float32"), load_tokenizer(llama)
    bound = layout(model.config)
    prompts = [Prompt(messages=(("user", text),)) for text in ("Hi.", "What is the time of day?", "Go")]
    found = passed_through(model, words, prompts, [True, False, True], generated=2)
    rows = samples(model, bound, found, [SITE, Site("resid_post", 2)])
    for batch in (1, 10**6):
        again = tokens(model, bound, [one.encoded for one in found], [SITE], tokens_per_batch=batch)[SITE]
        assert torch.allclose(rows[SITE].values, again, atol=1e-5)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *call: seen.append(call[2][0]))
    with torch.no_grad():
        for one in found:
            model(torch.tensor([one.encoded.ids]))
    handle.remove()
    expected = torch.cat([x[one.encoded.start : one.encoded.stop] for x, one in zip(seen, found, strict=True)])
    assert torch.allclose(rows[SITE].values, expected, atol=1e-5)
    assert rows[SITE].last.nonzero().flatten().tolist() == [
        place
        for place, (number, token) in enumerate(
            (number, token) for number, one in enumerate(found) for token in range(one.encoded.start, one.encoded.stop)
        )
        if token == found[number].last
    ]


# --- recipes


QUIET = ["why is it so", "tell me now.", "i want it", "go away now", "do it again", "stop that", "who did it", "no no"]
LOUD = [text.upper() for text in QUIET]


def write_recipe(folder: Path, model: Path, **gate: Any) -> Path:
    rows = [{"text": text, "label": "loud"} for text in LOUD] + [{"text": text, "label": "quiet"} for text in QUIET]
    jobs.write_prompts(folder)
    jobs.write_rows(folder / "volume.jsonl", rows)
    wanted = {"positive": "loud", "negative": ["quiet"], "prompts": "volume", "validation": "volume", "generated": 2}
    return jobs.write_recipe(
        folder,
        model,
        prompts={"train": "train.jsonl", "volume": "volume.jsonl", "test": "volume.jsonl"},
        intervention={"name": "add", "sites": "resid_post.1-2", "coefficient": 2.0, "gate": {**wanted, **gate}},
    )


def test_a_recipe_with_a_gate_runs_from_prompts_to_card(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, probe="lda", otherwise=-1.0, name="volume")
    done = pipeline.run(recipe, tmp_path / "run", safety=False)
    assert done.report["passed"]
    assert [one["gate"]["site"] for one in done.report["gates"]] == ["mlp_in.1", "mlp_in.2"]
    assert all(0 < one["closed"] < one["tokens"] for one in done.report["gates"])
    assert {(one["prompt_set"], one["site"]) for one in done.evaluation["gates"]} == {
        ("test", "mlp_in.1"),
        ("test", "mlp_in.2"),
    }
    text = (done.model / "README.md").read_text()
    assert "This steering is conditional" in text
    assert "A constant intervention acts on every token" not in text
    again = pipeline.run(recipe, tmp_path / "run", safety=False)
    assert not any(again.ran.values())
    fitted = gating.load(tmp_path / "run" / "gates.safetensors")
    assert [one.gate.name for one in fitted] == ["volume", "volume"]


def test_a_gate_can_be_loaded_instead_of_fitted(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama, probe="lda", name="volume")
    result = CliRunner().invoke(main, ["probe", str(recipe), "-o", str(tmp_path / "mine.safetensors")])
    assert result.exit_code == 0, result.output
    assert "volume mlp_in.1" in result.output
    loading = jobs.write_recipe(
        tmp_path,
        llama,
        intervention={"name": "add", "sites": "mlp_out.2", "coefficient": 2.0, "gate": {"load": "mine.safetensors"}},
    )
    job = Job(loading, tmp_path / "run")
    [one] = job.plan_sketch().gates
    assert one.gate is not None
    vector = jobs.write_directions(tmp_path / "v.safetensors", "resid_post.1")
    options = ["--vector", str(vector), "--sites", "resid_post.1", "--gate", str(tmp_path / "mine.safetensors")]
    result = CliRunner().invoke(main, ["bake", str(llama), *options, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert Checkpoint.open(tmp_path / "out").config["intermediate_size"] == 64
    assert torch.equal(one.gate.probe, gating.load(tmp_path / "mine.safetensors")[1].gate.probe)
    assert not job.needs_probes


def test_without_a_validation_set_every_fifth_prompt_is_kept_aside(llama: Path, tmp_path: Path) -> None:
    job = Job(write_recipe(tmp_path, llama, validation=None), tmp_path / "run")
    [(_, gate)] = job.fitting.wanted
    train, kept = job.fitting.split(gate)
    assert [prompt.beginning for prompt in kept] == [LOUD[4], QUIET[4]]
    assert {prompt.beginning for prompt in train} == {*LOUD, *QUIET} - {LOUD[4], QUIET[4]}


def test_a_gate_is_fitted_on_several_sets_texts_among_them(llama: Path, tmp_path: Path) -> None:
    """What the gate makes of tokens that no template frames is learned from texts, and from nothing else."""
    texts = [{"text": text, "label": "text"} for text in (*LOUD[::2], *QUIET[::2])]
    recipe = write_recipe(tmp_path, llama, probe="lda", negative=["quiet", "text"], prompts=["volume", "texts"])
    jobs.write_rows(tmp_path / "texts.jsonl", texts)
    content = yaml.safe_load(recipe.read_text())
    content["prompts"]["texts"] = {"path": "texts.jsonl", "chat": False}
    content["intervention"]["gate"]["validation"] = ["volume", "texts"]
    recipe.write_text(yaml.safe_dump(content))
    job = Job(recipe, tmp_path / "run")
    job.check()
    [(_, gate)] = job.fitting.wanted
    for side in job.fitting.split(gate):
        assert Counter(prompt.label for prompt in side) == {"loud": 8, "quiet": 8, "text": 8}
        assert all((prompt.text is not None) == (prompt.label == "text") for prompt in side)
    bound, words, model = layout(job.base.config), load_tokenizer(llama), load_model(llama, dtype="float32")
    read = encode(words, [Prompt(text=row["text"]) for row in texts], "mean")
    shares = {}
    for name, gates in (
        ("with", job.fit_gates()),
        ("without", Job(write_recipe(tmp_path, llama, probe="lda"), tmp_path / "other").fit_gates()),
    ):
        values = tokens(model, bound, read, [one.gate.site for one in gates])
        shares[name] = [float((one.gate.opening(values[one.gate.site], "silu") > 0.5).float().mean()) for one in gates]
    assert all(one < other for one, other in zip(shares["with"], shares["without"], strict=True))
    assert max(shares["with"]) < 0.2


def test_the_dry_run_of_a_gated_recipe_reads_no_weights(llama: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, llama)
    for command in (["run", "--dry-run", "--no-safety"], ["plan"], ["probe", "--dry-run"]):
        result = CliRunner().invoke(main, [command[0], str(recipe), *command[1:]])
        assert result.exit_code == 0, result.output
        assert "neurons" in result.output or "mlp_in.1, mlp_in.2" in result.output


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ("{positive: loud}", "negative"),
        ("{positive: loud, negative: [loud, quiet]}", "both positive and negative"),
        ("{positive: loud, negative: quiet, prompts: trane}", "did you mean 'train'"),
        ("{positive: loud, negative: quiet, widht: 3}", "did you mean 'width'"),
    ],
)
def test_what_is_wrong_with_a_gate_is_said(gate: str, said: str) -> None:
    text = f"""
model: tiny
prompts: {{train: train.jsonl}}
direction: {{load: v.safetensors}}
intervention: {{name: add, sites: resid_post.1, gate: {gate}}}
"""
    with pytest.raises(RecipeError, match=said):
        parse(text)


def test_a_gate_at_a_site_that_no_mlp_writes_is_refused_before_anything_is_read(llama: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, llama)
    text = (tmp_path / "recipe.yaml").read_text().replace("resid_post.1-2", "resid_pre.2")
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match="MLP writes"):
        Job(tmp_path / "recipe.yaml", tmp_path / "run").check()


def test_the_card_without_gates_does_not_speak_of_them(llama: Path, tmp_path: Path) -> None:
    out = baked(llama, tmp_path / "out", [add("resid_post.1")])
    report = report_of(out, llama, [add("resid_post.1")]).as_json()
    text = card.render(out, report, None)
    assert "conditional" not in text
    assert "A constant intervention acts on every token" in text
