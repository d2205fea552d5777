"""The model card says what was measured, in Markdown and metadata that the hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from steer_bake import card, direction, manifest, pipeline
from steer_bake.errors import CheckpointError, RecipeError
from steer_bake.evaluate import compare
from steer_bake.interventions import intervene
from steer_bake.sites import Site

from . import jobs

REPORT: dict[str, Any] = {
    "passed": True, "prompts": 4, "tokens": 80,
    "interventions": [{"name": "add", "site": "resid_post.1", "amount": 4.0, "dose": 0.512}],
    "checks": [
        {"name": "config", "passed": True, "value": None, "limit": None, "detail": "as planned"},
        {"name": "storage", "passed": True, "value": 1e-5, "limit": 2e-5, "detail": "KL(hooks || file) 1e-5"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def baked(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    vector = direction.load(jobs.write_directions(folder / "v.safetensors"))[0]
    return pipeline.bake(llama, [intervene("add", vector, Site("resid_post", 1), 2.0)], folder / "model")


def evaluation(*, fallen: int = 0, judge: str = "phrases", **changes: Any) -> dict[str, Any]:
    """As a run writes it, with ``fallen`` of 20 harmful requests no longer refused."""
    harmful = compare("safety/harmful", "refusal", ["refusal"] * 20, ["refusal"] * (20 - fallen) + ["answer"] * fallen)
    harmless = compare("safety/harmless", "refusal", ["answer"] * 20, ["answer"] * 19 + ["refusal"])
    own = compare("test", "answer", ["answer"] * 3 + ["incoherent"], ["answer"] * 4)
    return {
        "behaviour": [own.as_json()], "safety": [harmful.as_json(), harmless.as_json()],
        "safety_measured": True, "examples": [], "judge": judge, "repetition_penalty": 1.0,
    } | changes  # fmt: skip


def render(
    folder: Path, report: dict[str, Any], measured: dict[str, Any] | None = None, template: Path | None = None
) -> str:
    """The card with figures that were made for what the folder holds."""
    plan = {"plan_sha256": manifest.read(folder).content["plan_sha256"]}
    return card.render(folder, plan | report, None if measured is None else plan | measured, template)


def test_figures_of_another_plan_are_refused(baked: Path) -> None:
    other = {"plan_sha256": "0" * 64}
    with pytest.raises(RecipeError, match="another plan"):
        render(baked, REPORT | other, evaluation())
    with pytest.raises(RecipeError, match="another plan"):
        render(baked, REPORT, evaluation() | other)


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells; escaped pipes are no separators."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_the_metadata_is_what_the_hub_reads(baked: Path) -> None:
    data = ModelCard(render(baked, REPORT, evaluation())).data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-generation"
    assert {"steer-bake", "activation-steering"} <= set(data["tags"])


def test_every_table_has_a_head_and_rows_of_its_width(baked: Path) -> None:
    found = tables(render(baked, REPORT, evaluation()))
    assert len(found) == 4
    for head, rule, *rows in found:
        assert set(rule) == {"---"}
        assert rows
        assert all(len(row) == len(head) for row in [rule, *rows])


def test_both_safety_numbers_have_intervals(baked: Path) -> None:
    text = render(baked, REPORT, evaluation())
    rows = {row[0]: row for table in tables(text) for row in table}
    for name in ("safety/harmful (20)", "safety/harmless (20)"):
        assert all(re.search(r"\[.+, .+\]", cell) for cell in rows[name][2:5])
    assert rows["safety/harmless (20)"][3].startswith("5.0 %")
    assert rows["test (4)"][5] == "1, 0", "incoherent answers are counted, base and baked"


def test_the_card_has_doses_certificate_recipe_and_loading_code(baked: Path) -> None:
    text = render(baked, REPORT, evaluation())
    cells = [cell for table in tables(text) for row in table for cell in row]
    assert "0.51" in cells
    assert "pass: KL(hooks \\|\\| file) 1e-5" in cells
    assert card.LOADING_CODE.format(path=str(baked)) in text


@pytest.mark.parametrize(("fallen", "warned", "tagged"), [(0, None, False), (1, "in this measurement", False),
                                                          (15, "It is not for all audiences", True)])  # fmt: skip
def test_a_fall_of_harmful_refusals_is_said(baked: Path, fallen: int, warned: str | None, tagged: bool) -> None:
    text = render(baked, REPORT, evaluation(fallen=fallen))
    assert ("refuses fewer" in text or "refused fewer" in text) == (warned is not None)
    assert warned is None or warned in text
    assert ("not-for-all-audiences" in ModelCard(text).data.to_dict()["tags"]) == tagged


def test_the_card_says_what_it_is_for_in_the_recipes_own_words(llama: Path, tmp_path: Path) -> None:
    path = jobs.write_recipe(tmp_path, llama)
    path.write_text("# It becomes *gloomy*.\n# So it was tried.\n" + path.read_text())
    text = (pipeline.run(path, tmp_path / "run", device="cpu").model / "README.md").read_text()
    assert "It becomes \\*gloomy\\*. So it was tried." in text
    assert "estimated by `mean_difference` between `gloomy` and `cheerful` prompts" in text
    assert "new tensors" in text


def test_unmeasured_refusals_are_said(baked: Path) -> None:
    declined = evaluation(safety=[], safety_measured=False)
    assert "Refusals were not measured" in render(baked, REPORT, declined)
    assert "Refusals were not measured" in render(baked, REPORT, None)
    assert "Refusals were not measured" not in render(baked, REPORT, evaluation())


def test_a_failed_check_is_not_hidden(baked: Path) -> None:
    failed = {"name": "effect", "passed": False, "value": 0.0, "limit": 1e-3, "detail": "changes nothing"}
    text = render(baked, REPORT | {"passed": False, "checks": [failed]}, evaluation())
    assert "**FAIL**: changes nothing" in text
    assert "Not every check passed" in text


def test_what_a_model_answers_cannot_break_the_card(baked: Path) -> None:
    wild = "a | b\n# Title\n<script>\x1b[31m **bold** `code` ``` " + "x" * 500
    examples = [{"prompt": "p|q", "base": wild, "baked": wild}]
    text = render(baked, REPORT, evaluation(examples=examples))
    plain = render(baked, REPORT, evaluation())
    assert len(tables(text)) == len(tables(plain))
    assert "<script>" not in text.replace(r"\<script\>", "")
    assert "\x1b" not in text
    assert text.count("\n# ") == plain.count("\n# ")


def test_a_template_of_ones_own_is_used_and_its_mistakes_are_told(baked: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.md"
    mine.write_text("{{ title }} by me")
    assert render(baked, REPORT, None, mine).endswith(", steered by me")
    mine.write_text("{{ tilte }}")
    with pytest.raises(RecipeError, match="tilte"):
        render(baked, REPORT, None, mine)
    with pytest.raises(RecipeError, match="does not work"):
        render(baked, REPORT, None, tmp_path / "none.md")


def test_files_that_are_something_else_are_refused(baked: Path, llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"report .* has no 'checks'"):
        render(baked, {}, None)
    with pytest.raises(RecipeError, match=r"evaluation .* has no"):
        render(baked, REPORT, {"x": 1})
    with pytest.raises(CheckpointError, match=r"holds no steering\.json"):
        render(llama, REPORT, None)
