"""Every type of tiny model: what a plan takes is exact on disk, everything else is refused; and the table says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steer_bake import architectures, registry, reload_worker
from steer_bake.checkpoint import Checkpoint
from steer_bake.direction import Direction, unit
from steer_bake.errors import NotFoldable
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef, resolve
from steer_bake.plan import make_plan
from steer_bake.representations import Base
from steer_bake.sites import Site
from steer_bake.steering import steer
from steer_bake.targets.checkpoint import checkpoint
from steer_bake.validate import validate

from . import conformance, zoo
from .conformance_report import CELLS, DOCUMENT, as_json, document, holds, kind, stored
from .plain_worker import PlainWorker


def _first_types() -> Iterator[tuple[str, bool]]:
    """The first type of every variant of a layout, and whether it is the file's first."""
    for variants in registry.load_all("architectures").values():
        first = True
        for variant in variants:
            for name in [one for one in variant.model_types if one in zoo.ALL][:1]:
                yield name, first
                first = False


AGAIN = "run scripts/conformance again and look at what changed in docs/architectures.md"


@pytest.fixture(scope="module")
def worker() -> Iterator[PlainWorker]:
    with PlainWorker() as found:
        yield found


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=() if first else pytest.mark.slow) for name, first in _first_types()]
)
def test_every_cell_is_exact_or_refused_as_the_table_says(model_type: str, worker: PlainWorker) -> None:
    found = as_json(conformance.run(model_type, worker))
    wrong = {(name, cell): one for name, cells in found.items() for cell, one in cells.items() if "failed" in one}
    assert not wrong
    told = stored()[model_type]
    for name, cells in found.items():
        assert {cell: kind(one) for cell, one in cells.items()} == {c: kind(one) for c, one in told[name].items()}, (
            AGAIN
        )


def test_the_table_is_what_is_stored_and_names_every_type() -> None:
    assert DOCUMENT.read_text() == document(stored()), AGAIN
    assert set(stored()) == set(zoo.ALL) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), AGAIN
    assert not any(
        kind(one) == "FAILED" for cells in stored().values() for row in cells.values() for one in row.values()
    )


@pytest.mark.parametrize(("cell", "types"), [("add resid_post.middle", 145), ("ablate writes", 111)])
def test_most_types_hold_the_two_common_interventions_exactly(cell: str, types: int) -> None:
    assert cell in CELLS
    assert sum(holds(cells, cell) for cells in stored().values()) >= types


@pytest.mark.tampered
def test_a_mistake_in_one_column_or_an_omission_in_both_is_a_failure(
    tmp_path: Path, worker: PlainWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.save("llama", tmp_path / "base")
    right = architectures.claimed()["llama"]
    table = right.embedding.weights[0]
    planted = {
        "std from the hooks": ("add resid_pre.0", replace(right, embedding=replace(
            right.embedding, weights=(replace(table, scale=lambda _config: 1.01),)
        ))),
        "the stream is off": ("ablate writes", replace(right, mlp=(), attention=right.attention)),
    }  # fmt: skip
    for words, (cell, wrong) in planted.items():
        with monkeypatch.context() as patch:
            patch.setattr(architectures, "claimed", lambda wrong=wrong: {"llama": wrong})
            outcome = conformance.Bench(tmp_path / "base", worker).outcome(cell, tmp_path)
        assert words in outcome.failed


# --- in bfloat16


def add(width: int, layer: int, amount: float) -> list[Intervention]:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(5))
    return [intervene("add", Direction(unit(vector)[0], None), Site("resid_post", layer), amount, "unit")]


def bfloat16_gap(folder: Path, steering: list[Intervention], tmp_path: Path, worker: PlainWorker) -> float:
    """Max logit gap / std from hooks on the bfloat16 base to the reloaded bfloat16 file."""
    base = Checkpoint.open(folder)
    plan = make_plan(base, steering, prefer="bit_exact")
    out = checkpoint(plan, base, ModelRef("base", folder), tmp_path / "out")
    save_file({"along": torch.zeros(1)}, tmp_path / "along.safetensors")
    job = {"batches": [conformance.ROWS, conformance.PADDED], "decode": conformance.PADDED, "decode_tokens": 8}
    job |= {"pad_id": 0, "probes": [], "along": str(tmp_path / "along.safetensors")}
    assert worker.measure(out, tmp_path / "file", job, "bfloat16") == []
    model, problems = reload_worker.load_strict(str(folder), "bfloat16")
    assert problems == []
    plain = reload_worker.logits(model, conformance.ROWS, 0)
    with steer(model, steering):
        hooked = [reload_worker.logits(model, rows, 0) for rows in job["batches"]]
        decoded = reload_worker.greedy(model, job["decode"], 0, 8)
    assert (hooked[0] - plain).abs().max() / plain.std() > conformance.LEAST_EFFECT
    assert torch.equal(decoded, load_file(tmp_path / "file" / "float32.safetensors")["greedy"])
    files = [load_file(tmp_path / "file" / f"float32.{index}.safetensors")["logits"] for index in range(2)]
    return max(float((one - other).abs().max() / one.std()) for one, other in zip(hooked, files, strict=True))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "olmo2"])
def test_a_carrier_is_the_hook_bit_for_bit_in_bfloat16(model_type: str, tmp_path: Path, worker: PlainWorker) -> None:
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16)
    steering = add(zoo.WIDTH, 1, 4.0)
    plan = make_plan(Checkpoint.open(tmp_path / "base"), steering, prefer="bit_exact")
    assert [decision.representation for decision in plan.decisions] == ["carrier"]
    assert bfloat16_gap(tmp_path / "base", steering, tmp_path, worker) == 0.0


def test_a_bias_is_not_always_the_hook_bit_for_bit_in_bfloat16(tmp_path: Path, worker: PlainWorker) -> None:
    zoo.save("gpt2", tmp_path / "base", dtype=torch.bfloat16)  # of a Conv1D with a bias; the hook adds to the stream
    base, steering = Checkpoint.open(tmp_path / "base"), add(zoo.WIDTH, 1, 4.0)
    assert make_plan(base, steering).decisions[0].representation == "bias"
    assert make_plan(base, steering, prefer="bit_exact").decisions[0].representation == "carrier"
    assert bfloat16_gap(tmp_path / "base", steering, tmp_path, worker) == 0.0


@pytest.mark.slow
def test_a_carrier_is_the_hook_bit_for_bit_in_a_real_model(tmp_path: Path, worker: PlainWorker) -> None:
    folder = resolve("smollm2-135m").folder
    assert bfloat16_gap(folder, add(576, 15, 40.0), tmp_path, worker) == 0.0


# --- squares


def test_what_squares_lack_is_the_share_of_epsilon(tmp_path: Path, worker: PlainWorker) -> None:
    outcomes = {}
    for eps in (1e-4, 1e-6, 1e-12):
        folder = tmp_path / str(eps)
        zoo.save("phi3", folder / "base", rms_norm_eps=eps)
        bench = conformance.Bench(folder / "base", worker)
        outcomes[eps] = bench.outcome("add resid_post.middle", folder)
        assert outcomes[eps].how == ("squares",)
        assert not outcomes[eps].failed
        [decision] = make_plan(bench.base, bench.interventions("add resid_post.middle")).decisions
        assert f"eps = {eps}" in decision.note
    assert outcomes[1e-4].why == "epsilon"  # off by more than rounding, and all of it is what the hook with ms has too
    assert outcomes[1e-4].gap > 20 * outcomes[1e-6].gap > 0
    assert outcomes[1e-4].share == pytest.approx(100 * (outcomes[1e-6].share or 0), rel=0.01)
    assert outcomes[1e-12].gap < 5e-6


@pytest.mark.parametrize(("eps", "passes"), [(1e-4, False), (1e-12, True)])
def test_the_certificate_says_what_squares_lack_and_fails_where_that_is_much(
    eps: float, passes: bool, tmp_path: Path
) -> None:
    zoo.save("phi3", tmp_path / "base", rms_norm_eps=eps)
    base, wanted = Checkpoint.open(tmp_path / "base"), add(zoo.WIDTH, 1, 4.0)
    out = checkpoint(make_plan(base, wanted), base, ModelRef("base", base.folder), tmp_path / "out")
    report = validate(out, base.folder, wanted, zoo.ids(12, batch=3).tolist(), pad_id=zoo.PAD, decode_tokens=4)
    check = next(check for check in report.checks if check.name == "squares (layer 1)")
    assert check.value is not None
    assert 0.1 * eps < check.value < 1e3 * eps
    assert (check.passed, report.passed) == (passes, passes), report.checks


# --- what must not be believed


def test_a_flag_that_the_class_ignores_is_not_relied_upon(tmp_path: Path) -> None:
    zoo.save("deepseek_v32", tmp_path)
    opened = Checkpoint.open(tmp_path)
    base = Base(opened, architectures.layout({**opened.config, "mlp_bias": False}))
    assert hasattr(base.layout.text, "mlp_bias")
    assert "mlp_bias" in base.layout.architecture.mlp[0].unlock
    assert not base.unlocked({"mlp_bias": True})
    for prefer in ("smallest", "bit_exact", "widest_loading", "keep_class"):
        plan = make_plan(opened, add(zoo.WIDTH, 1, 1.0), prefer=prefer)
        assert plan.decisions[0].representation != "bias"
        assert not any(edit.tensor.endswith("mlp.down_proj.bias") for edit in plan.edits)


def test_a_model_whose_layers_depend_on_their_number_takes_no_additional_one(tmp_path: Path) -> None:
    zoo.save("diffllama", tmp_path)
    with pytest.raises(NotFoldable, match="depends on the layer's number"):
        make_plan(Checkpoint.open(tmp_path), add(zoo.WIDTH, 1, 1.0))


def test_a_layer_of_a_kind_that_cannot_stand_there_is_not_inserted(tmp_path: Path) -> None:
    zoo.save("lfm2_moe", tmp_path)
    opened = Checkpoint.open(tmp_path)
    plan = make_plan(opened, add(zoo.WIDTH, 1, 1.0))
    kept = {number for halves in plan.moved for number in halves}
    [new] = {*range(plan.layers_after(zoo.LAYERS))} - kept
    # the dense layers come first; another one of them would make a sparse one dense
    assert any(f".layers.{new}." in edit.tensor and "experts" in edit.tensor for edit in plan.edits)
    assert plan.config_changes["layer_types"][:2] == opened.config["layer_types"][:2]


def test_a_head_inside_a_multimodal_model_is_found(tmp_path: Path) -> None:
    zoo.save("fuyu", tmp_path, tie_word_embeddings=False)
    opened = Checkpoint.open(tmp_path)
    vector = Direction(unit(torch.ones(zoo.WIDTH))[0], None)
    plan = make_plan(opened, [intervene("ablate", vector, Site("resid_pre", 0))])
    assert "language_model.lm_head.weight" in opened.tensors
    assert not any("lm_head" in edit.tensor for edit in plan.edits)
