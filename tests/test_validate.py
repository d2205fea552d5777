"""The certificate passes on what we bake and fails, saying where, on what somebody broke."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steer_bake import comparison
from steer_bake.checkpoint import Checkpoint
from steer_bake.checks import Check
from steer_bake.comparison import Distance, middle
from steer_bake.errors import ValidationFailed
from steer_bake.interventions import Intervention
from steer_bake.reload_worker import load_strict, logits, nudged
from steer_bake.steering import steer
from steer_bake.validate import Report, validate

from . import tiny
from .test_bake import COMBINED, CONSTANT, PAD, ablate, add, baked

ROWS = [list(torch.randint(0, 256, (8 + 3 * n,), generator=torch.Generator().manual_seed(n))) for n in range(10)]
ROWS = [[int(token) for token in row] for row in ROWS]
OPTIONS = {"pad_id": PAD, "decode_prompts": 3, "decode_tokens": 8}


def report_of(folder: Path, base: Path, interventions: list[Intervention]) -> Report:
    return validate(folder, base, interventions, ROWS, **OPTIONS)  # type: ignore[arg-type]


@pytest.mark.usefixtures("a_fresh_process")
@pytest.mark.parametrize("kind", ["constant", "combined"])
def test_what_was_baked_passes_every_leg(good: dict[str, Path], llama: Path, tied_llama: Path, kind: str) -> None:
    base, interventions = (llama, CONSTANT) if kind == "constant" else (tied_llama, COMBINED)
    report = report_of(good[kind], base, interventions)
    assert report.passed, [check for check in report.checks if not check.passed]
    report.require()
    names = {check.name for check in report.checks}
    leg = "constants" if kind == "constant" else "rank_one"
    assert {f"function, {leg} (float32)", "function, storage dtype", "tensors", "config", "effect"} <= names
    assert ("stream (reloaded, float32)" in names) == (kind == "combined")
    assert report.effect.kl > 1e-3
    assert all(one["dose"] > 0 for one in report.interventions if str(one["site"]).startswith("resid"))
    json.dumps(report.as_json())


def test_a_float32_checkpoint_has_no_storage_leg(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", dtype=torch.float32)
    report = report_of(baked(base, tmp_path / "out", [ablate("writes")]), base, [ablate("writes")])
    assert report.passed
    assert set(report.legs) == {"rank_one"}


# --- mutations: (which folder, what is broken, words the report must say)


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], holding: str) -> None:
    """Rewrite the file that holds a tensor, header and all; a hard link is broken first."""
    opened = Checkpoint.open(folder)
    path = folder / opened.tensors[holding].file
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {
        **{name: file for name, file in content["weight_map"].items() if file != path.name},
        **dict.fromkeys(tensors, path.name),
    }
    index.write_text(json.dumps(content))


BIAS, OTHER = "model.layers.1.mlp.down_proj.bias", "model.layers.2.mlp.down_proj.bias"
SIBLING = "model.layers.3.mlp.gate_proj.bias"
QUERY = "model.layers.0.self_attn.q_proj.weight"
UNTOUCHED = "model.norm.weight"
MATRIX, TABLE = "model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"


def bias_removed(folder: Path, _base: Path) -> None:
    _change(folder, lambda tensors: tensors.__delitem__(BIAS), BIAS)


def bias_of_the_wrong_layer(folder: Path, _base: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BIAS], tensors[OTHER] = tensors[OTHER], tensors[BIAS]

    _change(folder, swap, BIAS)


def sign_flipped(folder: Path, _base: Path) -> None:
    _change(folder, lambda tensors: tensors.update({BIAS: -tensors[BIAS]}), BIAS)


def coefficient_off_by_one_percent(folder: Path, _base: Path) -> None:
    _change(folder, lambda tensors: tensors.update({BIAS: (1.01 * tensors[BIAS].float()).bfloat16()}), BIAS)


def sibling_zero_bias_missing(folder: Path, _base: Path) -> None:
    _change(folder, lambda tensors: tensors.__delitem__(SIBLING), SIBLING)


def config_flag_missing(folder: Path, _base: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    del content["mlp_bias"]
    (folder / "config.json").write_text(json.dumps(content))


def matrix_left_unedited(folder: Path, base: Path) -> None:
    before = Checkpoint.open(base).read(MATRIX)
    _change(folder, lambda tensors: tensors.update({MATRIX: before}), MATRIX)


def embedding_left_unedited(folder: Path, base: Path) -> None:
    before = Checkpoint.open(base).read(TABLE)
    _change(folder, lambda tensors: tensors.update({TABLE: before}), TABLE)


def ablation_one_percent_short(folder: Path, base: Path) -> None:
    before = Checkpoint.open(base).read(MATRIX).float()
    _change(folder, lambda tensors: tensors.update({MATRIX: tensors[MATRIX].lerp(before.bfloat16(), 0.01)}), MATRIX)


def weight_is_nan(folder: Path, _base: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UNTOUCHED][0] = float("nan")

    _change(folder, plant, UNTOUCHED)


def _change_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def token_poisoned(folder: Path, _base: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[TABLE][255] += 5  # a token that no prompt of ours holds

    _change(folder, plant, TABLE)


def context_shortened(folder: Path, _base: Path) -> None:
    _change_config(folder, max_position_embeddings=64)


def end_token_changed(folder: Path, _base: Path) -> None:
    _change_config(folder, eos_token_id=7)


def remote_code_added(folder: Path, _base: Path) -> None:
    _change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Model"})


def another_matrix_scaled(folder: Path, _base: Path) -> None:
    _change(folder, lambda tensors: tensors.update({QUERY: (1.02 * tensors[QUERY].float()).bfloat16()}), QUERY)


def noise_across_the_change(folder: Path, base: Path) -> None:
    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MATRIX][3, 4] += 0.01

    _change(folder, plant, MATRIX)


def foreign_tensor_added(folder: Path, _base: Path) -> None:
    _change(folder, lambda tensors: tensors.update({"model.extra": torch.ones(2)}), MATRIX)


def shard_truncated(folder: Path, _base: Path) -> None:
    path = folder / Checkpoint.open(folder).tensors[BIAS].file
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-40])


MUTATIONS: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "bias removed": ("constant", bias_removed, BIAS),
    "bias of the wrong layer": ("constant", bias_of_the_wrong_layer, BIAS),
    "sign flipped": ("constant", sign_flipped, f"{BIAS} is not as planned (it carries -1 "),
    "coefficient off by 1 %": ("constant", coefficient_off_by_one_percent, BIAS),
    "one sibling zero bias missing": ("constant", sibling_zero_bias_missing, SIBLING),
    "config flag missing": ("constant", config_flag_missing, "mlp_bias"),
    "one ablated matrix left unedited": ("combined", matrix_left_unedited, f"{MATRIX}: it carries 0"),
    "embedding left unedited": ("combined", embedding_left_unedited, f"{TABLE}: it carries 0"),
    "ablation 1 % short": ("combined", ablation_one_percent_short, f"{MATRIX}: it carries 0.9"),
    "NaN in a weight that the plan leaves alone": ("constant", weight_is_nan, "max gap nan"),
    "row of an unseen token poisoned": ("constant", token_poisoned, f"{TABLE} is not the base's"),
    "context shortened": ("constant", context_shortened, "max_position_embeddings=64"),
    "end token changed": ("constant", end_token_changed, "eos_token_id=7"),
    "remote code added": ("constant", remote_code_added, "auto_map"),
    "a matrix outside the plan scaled": ("combined", another_matrix_scaled, f"{QUERY} is not the base's"),
    "noise across the planned change": (
        "combined",
        noise_across_the_change,
        f"{MATRIX} carries the planned change and",
    ),
    "foreign tensor added": ("combined", foreign_tensor_added, "model.extra is in neither"),
    "shard truncated": ("constant", shard_truncated, "model-00002-of-00002.safetensors"),
}


@pytest.mark.tampered
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_certificate_fails_and_says_where(
    good: dict[str, Path], llama: Path, tied_llama: Path, tmp_path: Path, mutation: str
) -> None:
    kind, break_it, words = MUTATIONS[mutation]
    base, interventions = (llama, CONSTANT) if kind == "constant" else (tied_llama, COMBINED)
    folder = shutil.copytree(good[kind], tmp_path / "broken")
    break_it(folder, base)
    report = report_of(folder, base, interventions)
    assert not report.passed
    failed = " ".join(check.detail for check in report.checks if not check.passed)
    assert words in failed
    with pytest.raises(ValidationFailed, match="not its base plus the plan"):
        report.require()
    if mutation in ("bias of the wrong layer", "sign flipped", "coefficient off by 1 %"):
        # It loads without a complaint; the function itself must be found wrong too, not only the tensor.
        assert not {check.name: check for check in report.checks}["function, constants (float32)"].passed


@pytest.mark.tampered
def test_the_published_file_in_its_own_dtype_is_compared_too(
    good: dict[str, Path], tied_llama: Path, tmp_path: Path
) -> None:
    """Of edited matrices the float32 leg reads a copy made for it: what only the file carries shows in this leg."""

    def blur(tensors: dict[str, torch.Tensor]) -> None:
        noise = torch.randn(tensors[MATRIX].shape, generator=torch.Generator().manual_seed(0))
        tensors[MATRIX] = (tensors[MATRIX].float() * (1 + 0.05 * noise)).to(tensors[MATRIX].dtype)

    folder = shutil.copytree(good["combined"], tmp_path / "blurred")
    _change(folder, blur, MATRIX)
    checks = {check.name: check.passed for check in report_of(folder, tied_llama, COMBINED).checks}
    assert checks["function, rank_one (float32)"]
    assert not checks["function, storage dtype"]


def test_draws_differ_by_rounding_and_leave_the_model_as_it_was(llama: Path) -> None:
    model, _ = load_strict(str(llama), "bfloat16")
    plain = logits(model, ROWS, PAD)
    found = []
    for draw in (0, 1, 2, 1):
        with nudged(model, draw):
            found.append(logits(model, ROWS, PAD))
    assert torch.equal(found[0], plain)
    assert torch.equal(found[1], found[3])
    assert torch.equal(logits(model, ROWS, PAD), plain)
    for one, other in ((1, 0), (2, 0), (1, 2)):
        assert 0 < (found[one] - found[other]).abs().max() / plain.std() < 0.2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_draw_moves_numbers_either_way_by_no_more_than_a_unit_in_the_last_place(llama: Path, dtype: str) -> None:
    model, _ = load_strict(str(llama), dtype)
    table, tokens = model.get_input_embeddings(), torch.arange(256)
    before = table(tokens)
    with nudged(model, 1):
        moved = table(tokens).double() / before.double() - 1
    assert (moved > 0).float().mean() > 0.05  # longer and shorter: neither is rounded away
    assert (moved < 0).float().mean() > 0.05
    assert moved.abs().max() <= torch.finfo(before.dtype).eps


def test_of_several_draws_the_median_counts() -> None:
    draws = [Distance(kl=kl, greatest=greatest) for kl, greatest in ((3.0, 0.2), (1.0, 0.1), (2.0, 0.3))]
    assert middle(draws) is draws[2]
    assert middle(draws, lambda one: one.greatest) is draws[0]
    draws[1].kl = float("nan")  # counts as the largest
    assert middle(draws) is draws[0]


def test_a_first_draw_a_little_past_the_limit_is_drawn_again_and_the_median_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, wanted = tiny.save_llama(tmp_path / "base", dtype=torch.float32), COMBINED
    folder, rows = baked(base, tmp_path / "out", wanted), ROWS[:8]  # one batch

    def check() -> Check:
        report = validate(folder, base, wanted, rows, pad_id=PAD, decode_prompts=1, decode_tokens=2)
        return {one.name: one for one in report.checks}["function, rank_one (float32)"]

    once = check()
    assert once.value is not None
    assert "draws" not in once.detail
    limit = once.value / 1.5
    monkeypatch.setattr(comparison, "RANK_ONE_TOLERANCE", limit)
    found, gaps = check(), []
    old, new = (load_strict(str(one), "float32")[0] for one in (base, folder))
    for draw in range(3):
        with steer(old, wanted), nudged(old, draw):
            hooked = logits(old, rows, PAD)
        with nudged(new, draw):
            gaps.append(float((hooked - logits(new, rows, PAD)).abs().max() / hooked.std()))
    # The same arithmetic here; what differs is how the standard deviation is summed.
    assert found.value == pytest.approx(sorted(gaps)[1], rel=1e-3)
    assert once.value == pytest.approx(gaps[0], rel=1e-3)
    assert "median of 3 draws" in found.detail
    assert found.passed == (found.value <= limit)


@pytest.mark.tampered
def test_an_error_a_little_past_the_limit_is_in_every_draw(tmp_path: Path) -> None:
    base = tiny.save_llama(tmp_path / "base", dtype=torch.float32)
    wanted = [add("resid_post.1")]
    folder = baked(base, tmp_path / "out", wanted)

    def off_by(amount: float) -> Check:
        _change(folder, lambda tensors: tensors[BIAS][0].add_(amount), BIAS)
        checks = {check.name: check for check in report_of(folder, base, wanted).checks}
        return checks["function, constants (float32)"]

    much = off_by(1e-3)
    assert much.value is not None
    assert much.value > comparison.ONE_DRAW * comparison.CONSTANTS_TOLERANCE
    assert "draws" not in much.detail  # no draw of rounding noise is so far off
    little = off_by(1e-3 * (1.5 * comparison.CONSTANTS_TOLERANCE / much.value - 1))
    assert "median of 3 draws" in little.detail
    assert not little.passed


@pytest.mark.parametrize("batches", [("nan", "finite"), ("finite", "nan")])
def test_nan_in_any_batch_is_never_a_small_gap(batches: tuple[str, str]) -> None:
    distance, finite = Distance(), torch.randn(3, 7)
    for kind in batches:
        distance.update(finite, finite if kind == "finite" else torch.full((3, 7), float("nan")))
    assert not distance.gap().max_over_std <= 1.0


def test_pickled_weights_are_not_read(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_strict(str(folder), "float32")


def test_a_recipe_that_changes_nothing_fails(llama: Path, tmp_path: Path) -> None:
    nothing = [add("resid_post.1", 0.0)]
    report = report_of(baked(llama, tmp_path / "out", nothing), llama, nothing)
    assert [check.name for check in report.checks if not check.passed] == ["effect"]
    assert "changes nothing" in report.checks[-1].detail
