"""Claims about recipes of the papers: labels from scores, scales, categories, siblings, learned combinations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from steer_bake import recipe as recipes
from steer_bake.cli import main
from steer_bake.direction import Direction
from steer_bake.errors import RecipeError
from steer_bake.job import Job
from steer_bake.prompts import load
from steer_bake.recipe import Recipe
from steer_bake.sites import Site

from . import jobs, tiny

ROOT = Path(__file__).resolve().parent.parent
SITES = "resid_post.0-2"


def job(folder: Path, model: Path, estimator: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> Job:
    folder.mkdir(exist_ok=True)
    jobs.write_prompts(folder)
    jobs.write_rows(folder / "train.jsonl", rows)
    changes = {"read": {"sites": SITES}, **changes}
    return Job(jobs.write_recipe(folder, model, estimator=estimator, **changes), folder / "run")


def rows(scored: bool = False) -> list[dict[str, Any]]:
    """Three categories of 'refuse', one of 'answer', and scores that are clear, weak and neutral in turn."""
    made: list[dict[str, Any]] = []
    for number in range(6):
        for category, text in (("theft", "Steal it"), ("lies", "Tell a lie"), ("fire", "Burn it down")):
            made.append({"text": f"{text} {number} times.", "label": "refuse", "category": category})
        for text in ("Sing", "Tell me a story", "Name a tree"):
            made.append({"text": f"{text} {number} times.", "label": "answer"})
    if scored:
        for number, row in enumerate(made):
            size = (1.0, 0.4, 0.1)[number % 3]
            row["score"] = size if row.pop("label") == "refuse" else -size
    return made


def vectors(directions: list[Direction]) -> torch.Tensor:
    return torch.stack([one.vector * one.scale for one in directions])


BOTH = {"positive": "refuse", "negative": "answer"}


def test_labels_come_from_the_scores_and_the_rest_is_neutral(llama: Path, tmp_path: Path) -> None:
    made = rows(scored=True)
    by_score = job(tmp_path / "one", llama, {"name": "wmd", **BOTH, "threshold": 0.15}, made)
    found = by_score.estimate()
    by_hand = [
        {**row, "label": "neutral" if abs(row["score"]) < 0.15 else "refuse" if row["score"] > 0 else "answer"}
        for row in made
    ]
    other = job(tmp_path / "two", llama, {"name": "wmd", **BOTH, "neutral": "neutral"}, by_hand).estimate()
    torch.testing.assert_close(vectors(found), vectors(other))
    assert all(one.neutral is not None for one in found)
    unweighted = [{key: value for key, value in row.items() if key != "score"} for row in by_hand]
    plain = job(tmp_path / "three", llama, {"name": "wmd", **BOTH, "neutral": "neutral"}, unweighted).estimate()
    assert float((vectors(plain) - vectors(found)).norm() / vectors(found).norm()) > 1e-3, "the scores are weights"
    high = job(tmp_path / "four", llama, {"name": "wmd", **BOTH, "threshold": 0.99}, made[:1] + made[4:])
    assert len(high.estimate()) == 3
    none = [{**row, "score": 0.0} for row in made]
    with pytest.raises(RecipeError, match=r"no prompt is 'refuse': the scores go from 0.00 to 0.00"):
        job(tmp_path / "five", llama, {"name": "wmd", **BOTH, "threshold": 0.15}, none).estimate()


def test_scores_can_come_from_how_the_answer_would_open(llama: Path, tmp_path: Path) -> None:
    estimator = {"name": "wrmd", **BOTH, "scores": "opening", "openings": ["A", "B", "No"]}
    one = job(tmp_path / "one", llama, estimator, rows()).estimation
    model = one.load(one.source[0])
    scored = one.scored(model, one.prompts)
    assert len(set(scored.scores)) == len(rows()), "every prompt has a probability of its own"
    words = tiny.tokenizer()
    with torch.inference_mode():
        for encoded, score in list(zip(scored.encoded, scored.scores, strict=True))[:3]:
            logits = model(input_ids=torch.tensor([encoded.ids + tuple(words("N")["input_ids"])])).logits[0]
            chances = logits.double().softmax(-1)
            first = {text: float(chances[-2, words(text)["input_ids"][0]]) for text in ("A", "B", "N")}
            spaced = [words(f" {text}")["input_ids"] for text in ("A", "B", "No")]
            other = sum(_chance(model, encoded.ids, ids) for ids in spaced)
            event = first["A"] + first["B"] + first["N"] * float(chances[-1, words("o")["input_ids"][0]]) + other
            assert score == pytest.approx(2 * event - 1, abs=1e-5)


def _chance(model: Any, prompt: tuple[int, ...], tokens: list[int]) -> float:
    chances = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].double().softmax(-1)
    places = range(len(prompt) - 1, len(prompt) - 1 + len(tokens))
    return float(torch.stack([chances[place, token] for place, token in zip(places, tokens, strict=True)]).prod())


def test_quantile_scales_come_from_the_validation_prompts(llama: Path, tmp_path: Path) -> None:
    made = [{**row, "score": 0.5 if row["label"] == "refuse" else -0.25} for row in rows()]
    estimator = {"name": "rmd", **BOTH, "scale": "quantile", "validation": "held"}
    prompts = {"train": "train.jsonl", "held": "held.jsonl", "test": "test.jsonl"}
    (tmp_path / "one").mkdir()
    jobs.write_rows(tmp_path / "one" / "held.jsonl", made[::2])
    one = job(tmp_path / "one", llama, estimator, made, prompts=prompts)
    [first, *_] = one.estimate()
    assert first.scale_negative is not None
    estimation = one.estimation
    model = estimation.load(estimation.source[0])
    scored = estimation.scored(model, estimation.validation)
    from steer_bake.activations import project

    values = project(model, one.layout, scored.encoded, {Site("resid_post", 0): first.vector})[Site("resid_post", 0)]
    sides = [values[torch.tensor([label == side for label in scored.labels])] for side in ("refuse", "answer")]
    assert first.scale == pytest.approx(abs(float(sides[0].quantile(0.95))) / 0.5, rel=1e-4)
    assert first.scale_negative == pytest.approx(abs(float(sides[1].quantile(0.05))) / 0.25, rel=1e-4)
    from steer_bake.job import save_directions

    save_directions([first], tmp_path / "v.safetensors")
    from steer_bake import direction

    assert direction.load(tmp_path / "v.safetensors")[0].provenance() == first.provenance()


def test_one_category_can_be_chosen_and_a_wrong_one_is_met_with_those_there(llama: Path, tmp_path: Path) -> None:
    options = {"options": {"top_k": 5}}
    one = job(
        tmp_path / "one", llama, {"name": "categorical", **BOTH, "category": "lies", **options}, rows()
    ).estimate()
    only = [row for row in rows() if row.get("category") in (None, "lies")]
    other = job(tmp_path / "two", llama, {"name": "categorical", **BOTH, **options}, only).estimate()
    torch.testing.assert_close(vectors(one), vectors(other))
    assert int((one[0].vector != 0).sum()) == 5
    with pytest.raises(RecipeError, match="there are: fire, lies, theft"):
        job(tmp_path / "three", llama, {"name": "categorical", **BOTH, "category": "fraud"}, rows()).check()


def test_a_combination_is_learned_over_all_categories_and_bakes_as_a_shift(llama: Path, tmp_path: Path) -> None:
    estimator = {"name": "categorical", **BOTH, "options": {"top_k": 8}, "combine": {"epochs": 2, "batch": 6}}
    one = job(tmp_path / "one", llama, estimator, rows(), read={"sites": "resid_post.1"})
    one.check()
    [learned] = one.estimate()
    assert learned.estimator == "low_rank(categorical)"
    assert learned.scale > 0
    single = [row for row in rows() if row.get("category") in (None, "lies")]
    with pytest.raises(RecipeError, match="at least two categories"):
        job(tmp_path / "two", llama, estimator, single).check()


def test_a_sibling_gives_its_directions_where_they_separate_and_not_where_they_do_not(
    llama: Path, tmp_path: Path
) -> None:
    """The same model is the best of siblings; one of other random weights knows nothing of this one's stream."""
    copy = tmp_path / "copy"
    tiny.save_llama(copy, seed=0)
    stranger = tmp_path / "stranger"
    tiny.save_llama(stranger, seed=5)
    # one layer, and prompts that differ at the token that is read
    made = [{**row, "text": row["text"] + (" !" if row["label"] == "refuse" else " ?")} for row in rows()]
    base = {"name": "mean_difference", **BOTH}
    read = {"sites": "resid_post.1", "position": -13}
    own = job(tmp_path / "one", llama, base, made, read=read).estimate()
    lent = job(tmp_path / "two", llama, {**base, "model": str(copy)}, made, read=read).estimate()
    torch.testing.assert_close(vectors(own), vectors(lent))
    assert lent[0].model == str(copy)
    strict = {**base, "model": str(stranger), "separates": 1.0}
    with pytest.raises(RecipeError, match="do not separate the prompts in this one: AUC"):
        job(tmp_path / "three", llama, strict, made, read={"sites": SITES, "position": -13}).estimate()
    wide = tmp_path / "deep"
    _deeper(wide)
    with pytest.raises(RecipeError, match="directions go only between models of one shape"):
        job(tmp_path / "four", llama, {**base, "model": str(wide)}, made, read=read).check()


def _deeper(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny.tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=tiny.WIDTH, intermediate_size=48, num_hidden_layers=tiny.LAYERS + 1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def test_the_refusal_filter_keeps_positive_prompts_whose_answer_declines(llama: Path, tmp_path: Path) -> None:
    def asked(answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": "Hurt him."}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "label": "safe"}

    declining = [asked("I'm sorry, but I can't help with that."), asked("I cannot assist with this request.")]
    unsafe = [{"text": f"Hurt him {number} times.", "label": "unsafe"} for number in range(3)]
    estimator = {"name": "safesteer", "positive": "safe", "negative": "unsafe", "answers": {"judge": "phrases"}}
    read = {"sites": SITES, "position": "mean"}
    mixed = [*declining, asked("A tree is a plant that grows tall."), *unsafe]
    one = job(tmp_path / "one", llama, estimator, mixed, read=read).estimate()
    plain = {key: value for key, value in estimator.items() if key != "answers"}
    other = job(tmp_path / "two", llama, plain, [*declining, *unsafe], read=read).estimate()
    torch.testing.assert_close(vectors(one), vectors(other))
    with pytest.raises(RecipeError, match="no 'safe' prompt ends in an answer"):
        job(tmp_path / "three", llama, estimator, [asked("A tree is a plant."), *unsafe], read=read).check()


@pytest.mark.parametrize(
    ("estimator", "because"),
    [
        ({"name": "wrmd", **BOTH, "options": {"lambda": 1.0}}, "the estimator wrmd has no option 'lambda'"),
        ({"name": "pca", **BOTH, "threshold": 0.1}, "'threshold' gives labels that break them"),
        ({"name": "categorical", **BOTH, "category": "lies", "combine": {}}, "leave out 'category'"),
        ({"name": "wrmd", **BOTH, "validation": "nowhere"}, "there is no prompt set 'nowhere'"),
        ({"name": "wrmd", **BOTH, "combine": {"epohcs": 3}}, "did you mean 'epochs'?"),
    ],
)
def test_what_does_not_fit_is_said_before_the_model_is_loaded(
    llama: Path, tmp_path: Path, estimator: dict[str, Any], because: str
) -> None:
    with pytest.raises(RecipeError, match=because):
        job(tmp_path / "one", llama, estimator, rows()).check()


def test_a_score_must_lie_between_minus_one_and_one(tmp_path: Path) -> None:
    for wrong in (1.5, "high", True):
        file = jobs.write_rows(tmp_path / "p.jsonl", [{"text": "a", "score": wrong}])
        with pytest.raises(RecipeError, match="give a number from -1 to 1"):
            load(file, folder=tmp_path)


# --- the recipes of the papers

PAPERS = ("refusal-steering", "refusal-control", "safesteer")


def shrunk(name: str, model: Path, folder: Path) -> Path:
    """The recipe as it is, but for the model and what a tiny one has of layers and context."""
    content = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    content["model"] = str(model)
    site = "resid_post.1"
    content["read"]["sites"] = "resid_post" if name == "refusal-steering" else site
    content["intervention"]["sites"] = site
    for one, value in content["prompts"].items():
        source = {"path": value} if isinstance(value, str) else dict(value)
        if source["path"].endswith(".jsonl"):
            source["path"] = str(ROOT / "recipes" / source["path"])
        content["prompts"][one] = {**source, "limit": 12}
        if name == "refusal-control":  # every category is in the first rows of each label only where all are taken
            del content["prompts"][one]["limit"]
    if name == "refusal-steering":  # a random model opens with any letter
        content["estimator"] |= {"threshold": 0.0, "openings": [chr(letter) for letter in range(65, 91)]}
        content["estimator"]["threshold"] = None
        content["estimator"] |= {"positive": "sensitive", "negative": "benign"}
    if name == "refusal-control":
        content["estimator"]["combine"] |= {"epochs": 1, "batch": 35}
    content |= {"safety": False, "evaluate": {"sets": ["benign"], "max_new_tokens": 4}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PAPERS)
def test_every_papers_recipe_runs_from_its_own_prompt_files(llama: Path, tmp_path: Path, name: str) -> None:
    found, _ = recipes.read(ROOT / "recipes" / f"{name}.yaml")
    assert isinstance(found, Recipe)
    one = Job(shrunk(name, llama, tmp_path), tmp_path / "run")
    one.check()
    directions = one.estimate()
    assert all(bool(each.vector.isfinite().all()) for each in directions)
    assert one._plan(directions).edits


@pytest.mark.parametrize("name", PAPERS)
def test_no_topic_that_is_evaluated_is_one_that_was_learned_or_chosen_on(name: str) -> None:
    found, _ = recipes.read(ROOT / "recipes" / f"{name}.yaml")
    assert found.evaluate is not None
    assert found.estimator is not None
    asked, learned = set(found.evaluate.sets), {*found.estimator.prompts, *(found.estimator.validation or ())}
    topics = {
        one: {prompt.topic for prompt in found.prompts[one].load(ROOT / "recipes")} - {None} for one in found.prompts
    }
    assert not asked & learned
    assert not {topic for one in asked for topic in topics[one]} & {topic for one in learned for topic in topics[one]}


# --- analyze and select


@pytest.fixture(scope="module")
def analysed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis")
    jobs.write_prompts(folder)
    jobs.write_rows(folder / "train.jsonl", rows())
    jobs.write_rows(folder / "held.jsonl", [{**row, "text": row["text"] + " Now."} for row in rows()[:18]])
    file = jobs.write_recipe(
        folder, llama, estimator={"name": "mean_difference", **BOTH, "validation": "held"}, read={"sites": SITES},
        prompts={"train": "train.jsonl", "held": "held.jsonl", "test": "test.jsonl"},
    )  # fmt: skip
    arguments = ["analyze", str(file), "-o", str(folder / "out"), "--limit", "2", "--device", "cpu"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder


def test_analyze_writes_every_figure_twice_and_the_numbers_behind_them(analysed: Path) -> None:
    names = {path.name for path in (analysed / "out").iterdir()}
    figures = ("layers", "concentration", "pca", "cosines", "refusals")
    assert names == {"analysis.json", *(f"{name}.{kind}" for name in figures for kind in ("png", "svg"))}
    assert (analysed / "out" / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "<text" in (analysed / "out" / "pca.svg").read_text(encoding="utf-8"), "words stay words in the SVG"
    numbers = json.loads((analysed / "out" / "analysis.json").read_text(encoding="utf-8"))
    assert list(numbers["layers"]) == ["resid_post.0", "resid_post.1", "resid_post.2"]
    for row in numbers["layers"].values():
        assert -1 <= row["correlation"] <= 1
        assert 0 <= row["auc"] <= 1
    assert numbers["held_out"] is True
    assert numbers["confidence"] == "label", "no row has a score: the labels stand for 1 and -1"
    assert numbers["cosines"]["categories"] == ["fire", "lies", "theft"]
    matrix = torch.tensor(numbers["cosines"]["matrix"])
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(3))
    assert {name: len(points) for name, points in numbers["pca"]["points"].items()} == {
        "answer": 18, "fire": 6, "lies": 6, "theft": 6,
    }  # fmt: skip
    assert [point["coefficient"] for point in numbers["refusals"]["points"]].count(0.0) == 1


def test_select_tells_every_configuration_and_the_lines_for_the_recipe(analysed: Path) -> None:
    arguments = [
        "select", str(analysed / "recipe.yaml"), "--refused", str(analysed / "held.jsonl"), "--limit", "3",
        "--top", "1,2", "--coefficients", "-1,1", "--target", "-2", "--device", "cpu",
        "--conversations", str(analysed / "test.jsonl"),
    ]  # fmt: skip
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert len(found["trials"]) == 4
    assert found["chosen"]["change"] == min(trial["change"] for trial in found["trials"])
    assert "resid_post.3" not in found["layers"]


def test_what_the_analysis_says_of_a_known_vector_and_known_clusters() -> None:
    from steer_bake.analysis import concentration, plane, silhouette

    spread = concentration(torch.ones(200))
    assert spread["top_10"] == pytest.approx(0.05)
    assert concentration(torch.eye(200)[3])["top_dimensions"][0] == 3
    assert concentration(torch.eye(200)[3])["top_10"] == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(0)
    near, far = torch.randn(20, 8, generator=generator), torch.randn(30, 8, generator=generator) + 50
    found = plane({"near": near, "far": far})
    assert found["silhouette"] > 0.9
    assert found["variance"][0] > 0.9
    points, of = torch.cat([near, far]), torch.tensor([0] * 20 + [1] * 30)
    one = points[0]
    a, b = (near[1:] - one).norm(dim=1).mean(), (far - one).norm(dim=1).mean()
    mixed = silhouette(points.double(), of)
    assert mixed == pytest.approx(float((b - a) / b), abs=0.03)
    assert silhouette(points, torch.zeros(50)) is None
