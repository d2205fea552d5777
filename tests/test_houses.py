"""Re-housing: the same function under another class, proven before any edit, and then steered where there is room."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from steer_bake import card, manifest, registry, reload_worker
from steer_bake.architectures import layout
from steer_bake.audit import audit
from steer_bake.checkpoint import Checkpoint, write_edited
from steer_bake.comparison import CONSTANTS_TOLERANCE, Check
from steer_bake.direction import Direction, unit
from steer_bake.errors import CheckpointError, NotFoldable, RecipeError
from steer_bake.houses import House, hosts, housed
from steer_bake.houses.granite_swa import granite_swa
from steer_bake.houses.llama import llama
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef, load_tokenizer
from steer_bake.plan import make_plan
from steer_bake.proof import prove, shrunk
from steer_bake.sites import Site
from steer_bake.steering import steer
from steer_bake.targets.checkpoint import checkpoint
from steer_bake.unbake import needs_base, unbake
from steer_bake.validate import validate

from . import tiny, zoo

FULL = {"layer_types": ["full_attention"] * zoo.LAYERS}
WINDOW = 8
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
#: (model type, overrides of the tiny config, the class that takes it in)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("qwen2", {}, "llama"),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, "llama"),
    "qwen2 with windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        "granite_swa",
    ),
    "mistral": ("mistral", {"sliding_window": None}, "llama"),
    "mistral with a window": ("mistral", {"sliding_window": WINDOW}, "granite_swa"),
    "mistral, tied, with a window": ("mistral", {"sliding_window": WINDOW, "tie_word_embeddings": True}, "granite_swa"),
    "ministral": ("ministral", {"sliding_window": WINDOW}, "granite_swa"),
    "ministral with full layers only": ("ministral", {**FULL, "sliding_window": WINDOW}, "llama"),
    "seed_oss": ("seed_oss", {}, "llama"),
    "qwen3": ("qwen3", {}, "hy_v3"),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}, "hy_v3"),
    "dots1": ("dots1", {**FULL, "norm_topk_prob": True}, "hy_v3"),
    "glm4_moe": ("glm4_moe", {"use_qk_norm": True}, "hy_v3"),
    "mixtral": ("mixtral", {"sliding_window": None}, "ernie4_5_moe"),
    "deepseek_v3": ("deepseek_v3", {}, "glm4_moe_lite"),
    "phi3": ("phi3", {"sliding_window": None}, "llama"),
    "phi3 tied": ("phi3", {"sliding_window": None, "tie_word_embeddings": True}, "llama"),
    "phi3 that turns half of each head": ("phi3", {"sliding_window": None, "rope_parameters": PARTIAL}, "llama"),
    "phi3 with a window": ("phi3", {"sliding_window": WINDOW}, "granite_swa"),
    "glm": ("glm", {}, "llama"),
    "glm without biases": ("glm", {"attention_bias": False, "tie_word_embeddings": True}, "llama"),
    "helium": ("helium", {}, "llama"),
    "helium with biases": ("helium", {"attention_bias": True, "mlp_bias": True}, "llama"),
    "ernie4_5": ("ernie4_5", {}, "llama"),
    "ernie4_5 with biases, untied": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}, "llama"),
    "gemma in llama": ("gemma", {}, "llama"),
    "gemma untied in llama": ("gemma", {"tie_word_embeddings": False}, "llama"),
    "gemma": ("gemma", {}, "granite"),
    "gemma untied": ("gemma", {"tie_word_embeddings": False}, "granite"),
}
every_case = pytest.mark.parametrize(("model_type", "overrides", "host"), CASES.values(), ids=CASES)
#: Has no bias behind its experts, in its own class and in the other.
ATTENTION_ONLY = ("deepseek_v3",)


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def load(folder: Path, dtype: str = "float32", *, eager: bool = True) -> PreTrainedModel:
    model, problems = reload_worker.load_strict(str(folder), dtype)
    assert not problems
    if eager:
        model.set_attn_implementation("eager")
    return model


def relabelled(folder: Path, out: Path, host: str) -> House:
    """The model in ``folder`` under another class in ``out``, and nothing else."""
    out.mkdir()
    base = Checkpoint.open(folder)
    claim = housed(base, registry.load("houses", host))
    write_edited(
        base,
        claim.edits((), {}),
        out,
        config_changes=claim.config_changes,
        rename=claim.rename({}),
        drop=claim.dropped,
    )
    return claim.house


def adding(site: str, length: float, seed: int = 3) -> Intervention:
    vector = unit(torch.randn(zoo.WIDTH, generator=torch.Generator().manual_seed(seed)))[0]
    return intervene("add", Direction(vector, None), Site.named(site), length, "unit")


def steered(length: float) -> Intervention:
    """A vector for the tiny Qwen2."""
    return intervene("add", Direction(unit(torch.ones(tiny.WIDTH))[0], None), Site("resid_post", 1), length, "unit")


def bake(folder: Path, out: Path, wanted: list[Intervention], prefer: str = "rehouse") -> Path:
    base = Checkpoint.open(folder)
    return checkpoint(make_plan(base, wanted, prefer), base, ModelRef("tiny", folder), out)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    """A tiny Qwen2 with a tokenizer."""
    words = tiny.tokenizer()
    config = Qwen2Config(
        **{"vocab_size": len(words), "hidden_size": tiny.WIDTH, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": words.pad_token_id},
    )
    tiny.randomise(Qwen2ForCausalLM(config), 0).save_pretrained(tmp_path / "qwen")
    words.save_pretrained(tmp_path / "qwen")
    return tmp_path / "qwen"


def test_every_house_is_tested() -> None:
    assert {host for _, _, host in CASES.values()} == set(registry.names("houses"))


@every_case
def test_the_relabelled_file_computes_the_same_logits(
    model_type: str, overrides: dict[str, Any], host: str, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path / "base", **overrides)
    house = relabelled(tmp_path / "base", tmp_path / "out", host)
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    assert (before.config.model_type, after.config.model_type) == (model_type, host)
    assert type(after).__name__ in after.config.architectures
    tokens = zoo.ids(40, batch=2)
    old, new = logits(before, tokens), logits(after, tokens)
    assert (old - new).abs().max() / old.std() <= (1e-6 if house.same_bits else 5e-6)


@every_case
def test_where_the_bits_are_said_to_be_the_same_in_bfloat16_they_are(
    model_type: str, overrides: dict[str, Any], host: str, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, **overrides)
    house = relabelled(tmp_path / "base", tmp_path / "out", host)
    tokens = zoo.ids(40, batch=2)
    old, new = (logits(load(tmp_path / name, "bfloat16"), tokens).float() for name in ("base", "out"))
    assert torch.equal(old, new) or not house.same_bits
    exact = logits(load(tmp_path / "base"), tokens)  # of the same weights; a router may choose another expert there
    rounding = max(0.1, 1.2 * float((old - exact).abs().max() / old.std()))
    assert (old - new).abs().max() / old.std() < rounding


@every_case
def test_a_rehoused_bake_equals_its_hooks_on_the_source(
    model_type: str, overrides: dict[str, Any], host: str, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path / "base", **overrides)
    model = load(tmp_path / "base", eager=False)
    tokens = zoo.ids(20, batch=2)
    rows = [tokens[0].tolist(), tokens[1, 5:].tolist()]  # the second is padded on the left
    plain = reload_worker.logits(model, rows, zoo.PAD)
    recipes = {"middle": [adding("resid_mid.1", 4.0)]}
    if model_type not in ATTENTION_ONLY:
        recipes["post"] = [adding("resid_post.1", 4.0)]
        recipes["all"] = [adding(f"resid_post.{layer}", 1.5, layer) for layer in range(zoo.LAYERS)]
    for name, wanted in recipes.items():
        bake(tmp_path / "base", tmp_path / name, wanted, f"rehouse:{host}")
        baked = load(tmp_path / name, eager=False)
        assert baked.config.model_type == host
        assert len(baked.model.layers) == zoo.LAYERS  # held by biases, not by more layers
        with steer(model, wanted):
            hooked = reload_worker.logits(model, rows, zoo.PAD)
            decoded = reload_worker.greedy(model, rows, zoo.PAD, 12)
        gap = (hooked - reload_worker.logits(baked, rows, zoo.PAD)).abs().max() / hooked.std()
        assert gap <= CONSTANTS_TOLERANCE
        assert (plain - hooked).abs().max() / hooked.std() > 0.1
        assert torch.equal(decoded, reload_worker.greedy(baked, rows, zoo.PAD, 12))


def test_ablation_and_a_shift_together_are_held_in_the_other_class(tmp_path: Path) -> None:
    model = zoo.save("qwen2", tmp_path / "base", tie_word_embeddings=True)
    vector = unit(torch.randn(zoo.WIDTH, generator=torch.Generator().manual_seed(5)))[0]
    wanted = [intervene("ablate", Direction(vector, None), Site.named("writes"), 1.0), adding("resid_post.2", 3.0)]
    baked = load(bake(tmp_path / "base", tmp_path / "out", wanted), eager=False)
    tokens = zoo.ids(20, batch=2)
    with steer(model, wanted):
        hooked = logits(model, tokens)
    assert (hooked - logits(baked, tokens)).abs().max() / hooked.std() <= 5e-5
    assert baked.config.model_type == "llama"


@pytest.mark.parametrize("case", ["qwen2", "mistral with a window", "gemma", "phi3", "gemma in llama"])
def test_the_certificate_of_a_rehoused_bfloat16_file_passes(case: str, tmp_path: Path) -> None:
    model_type, overrides, host = CASES[case]
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, **overrides)
    wanted = [adding("resid_post.1", 4.0)]
    out = bake(tmp_path / "base", tmp_path / "out", wanted, f"rehouse:{host}")
    rows = zoo.ids(24, batch=3).tolist()
    report = validate(out, tmp_path / "base", wanted, rows, pad_id=zoo.PAD, decode_tokens=6)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert Checkpoint.open(out).config["model_type"] == host


# --- what the plan and the files say


def test_the_plan_says_which_class_it_will_be_and_why(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path)
    plan = make_plan(Checkpoint.open(tmp_path), [adding("resid_post.1", 1.0)], "rehouse:llama")
    assert (plan.model_type, plan.rehoused_from) == ("llama", "qwen2")
    first, *rest = plan.as_json()["decisions"]
    assert first["representation"] == "rehousing"
    assert first["note"].startswith("qwen2 -> llama, proven to be the same function")
    assert first["parameters"] == zoo.LAYERS * zoo.WIDTH  # the bias of o_proj, zero
    assert [one["representation"] for one in rest] == ["bias"]
    assert plan.config_changes["model_type"] == "llama"
    assert plan.is_constant
    assert plan.as_json()["rehoused_from"] == "qwen2"
    assert plan.sha256 == make_plan(Checkpoint.open(tmp_path), plan.interventions, "rehouse:llama").sha256


def test_what_only_the_old_class_reads_does_not_linger_in_the_config(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path / "base", max_window_layers=2)
    base = Checkpoint.open(tmp_path / "base")
    old = replace(base, config={**base.config, "auto_map": {"AutoConfig": "x.Y"}, "made_up": 3, "_name_or_path": "me"})
    changes = housed(old, llama).config_changes
    for name in ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        assert changes[name] is None
    assert "made_up" not in changes  # neither class reads it
    assert changes["auto_map"] == {}
    assert "rope_parameters" not in changes  # both call it so
    assert "_name_or_path" not in changes
    assert changes["architectures"] == ["LlamaForCausalLM"]


def test_a_default_of_the_old_class_is_written_out_where_the_new_one_has_another(tmp_path: Path) -> None:
    zoo.save("seed_oss", tmp_path)
    base = Checkpoint.open(tmp_path)
    config = {name: value for name, value in base.config.items() if name not in ("rms_norm_eps", "head_dim")}
    changes = housed(replace(base, config={**config, "num_hidden_layers": zoo.LAYERS}), llama).config_changes
    assert changes.get("head_dim") == 128
    assert "rms_norm_eps" not in changes  # it happens to be the same one


def test_files_are_linked_where_only_the_class_changes(tmp_path: Path) -> None:
    zoo.save("mistral", tmp_path / "base", sliding_window=None)
    bake(tmp_path / "base", tmp_path / "out", [adding("resid_post.1", 1.0)])
    shard = tmp_path / "out" / "model-00001-of-00002.safetensors"
    assert shard.samefile(tmp_path / "base" / "model.safetensors")


def test_a_fused_projection_comes_apart_in_its_own_file_and_the_plan_says_so(tmp_path: Path) -> None:
    zoo.save("phi3", tmp_path / "base", sliding_window=None, dtype=torch.bfloat16)
    base = Checkpoint.open(tmp_path / "base")
    plan = make_plan(base, [adding("resid_post.1", 1.0)], "rehouse:llama")
    assert plan.is_constant  # the values of the matrices are the base's
    assert len(plan.dropped) == 2 * zoo.LAYERS == plan.as_json()["dropped"]
    assert plan.as_json()["decisions"][0]["parameters"] == 0
    edits = {edit["tensor"]: edit for edit in plan.as_json()["edits"]}
    key = edits["model.layers.0.self_attn.k_proj.weight"]
    assert key["change"] == "rows of model.layers.0.self_attn.qkv_proj.weight"
    assert key["rows"] == [64, 96]
    out = Checkpoint.open(bake(tmp_path / "base", tmp_path / "out", list(plan.interventions), "rehouse:llama"))
    assert not [name for name in out.tensors if "qkv_proj" in name or "gate_up" in name]
    fused = base.read("model.layers.0.self_attn.qkv_proj.weight")
    assert torch.equal(out.read("model.layers.0.self_attn.k_proj.weight"), fused[64:96])
    assert {info.file for name, info in out.tensors.items() if name.endswith("k_proj.weight")} == {out.files[0]}


def test_a_plan_knows_the_order_of_the_rows(tmp_path: Path) -> None:
    zoo.save("helium", tmp_path)
    base = Checkpoint.open(tmp_path)
    plan = make_plan(base, [adding("resid_post.1", 1.0)], "rehouse:llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    [edit] = [edit for edit in plan.edits if edit.tensor == name]
    assert edit.rows is not None
    other = replace(edit, rows=replace(edit.rows, order=tuple(reversed(edit.rows.order))))
    edits = tuple(other if one is edit else one for one in plan.edits)
    assert replace(plan, edits=edits).sha256 != plan.sha256


@pytest.mark.tampered
@pytest.mark.parametrize("case", ["phi3", "helium", "gemma in llama"])
def test_the_audit_sees_a_bit_in_what_was_moved(case: str, tmp_path: Path) -> None:
    model_type, overrides, host = CASES[case]
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, **overrides)
    base = Checkpoint.open(tmp_path / "base")
    out = bake(tmp_path / "base", tmp_path / "out", [adding("resid_post.1", 1.0)], f"rehouse:{host}")
    assert audit(out, base).passed
    name = "model.embed_tokens.weight" if model_type == "gemma" else "model.layers.2.self_attn.q_proj.weight"
    info = Checkpoint.open(out).tensors[name]
    data = bytearray((out / info.file).read_bytes())
    data[info.start + info.nbytes // 2] ^= 1
    (out / info.file).unlink()  # which may be the base's
    (out / info.file).write_bytes(data)
    assert name in str([check.detail for check in audit(out, base).checks if not check.passed])


@pytest.mark.parametrize("case", ["qwen2", "phi3", "mixtral"])
def test_a_rehousing_is_undone(case: str, tmp_path: Path) -> None:
    model_type, overrides, host = CASES[case]
    zoo.save(model_type, tmp_path / "base", **overrides)
    out = bake(tmp_path / "base", tmp_path / "out", [adding("resid_post.1", 1.0)], f"rehouse:{host}")
    if needs_base(out):
        with pytest.raises(CheckpointError, match="which only the base has unedited"):
            unbake(out, tmp_path / "refused")
    assert needs_base(out) is (case != "qwen2")
    unbake(out, tmp_path / "again", Checkpoint.open(tmp_path / "base") if needs_base(out) else None)
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files


@pytest.mark.parametrize("model_type", ["glm", "phi3"])
def test_older_files_that_say_the_rope_at_the_top_are_read_as_they_are_meant(model_type: str, tmp_path: Path) -> None:
    model = zoo.save(model_type, tmp_path / "base", **CASES["phi3 that turns half of each head"][1])
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    assert rope["partial_rotary_factor"] == 0.5
    older = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None}
    file.write_text(json.dumps({**config, **older}))
    relabelled(tmp_path / "base", tmp_path / "out", "llama")
    after = load(tmp_path / "out")
    assert after.config.rope_parameters["rope_type"] == "proportional"
    tokens = zoo.ids(40)
    old = logits(model, tokens)
    assert (old - logits(after, tokens)).abs().max() / old.std() <= 5e-6
    assert {name: json.loads((tmp_path / "out" / "config.json").read_text())[name] for name in older} == dict.fromkeys(
        older
    )


def test_a_longrope_keeps_the_context_that_it_begins_at(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
    zoo.save(
        "phi3",
        tmp_path / "base",
        sliding_window=None,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors},
    )
    prove(housed(Checkpoint.open(tmp_path / "base"), llama))
    relabelled(tmp_path / "base", tmp_path / "out", "llama")
    for tokens in (zoo.ids(40), zoo.ids(180)):
        old, new = (logits(load(tmp_path / name), tokens) for name in ("base", "out"))
        assert (old - new).abs().max() / old.std() <= 1e-6


def test_a_head_that_is_stored_beside_its_tied_table_does_not_count(tmp_path: Path) -> None:
    model = zoo.save("gemma", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    table = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": torch.full_like(table, 7.0)}, file, metadata={"format": "pt"})
    relabelled(tmp_path / "base", tmp_path / "out", "llama")
    after, tokens = load(tmp_path / "out"), zoo.ids(40)
    assert torch.equal(after.lm_head.weight, table)
    assert (logits(model, tokens) - logits(after, tokens)).abs().max() / logits(model, tokens).std() <= 5e-6


def test_gemma_keeps_its_tie_in_granite_unless_llama_is_asked_for(tmp_path: Path) -> None:
    zoo.save("gemma", tmp_path)
    base, wanted = Checkpoint.open(tmp_path), [adding("resid_post.1", 1.0)]
    assert make_plan(base, wanted, "rehouse").model_type == "granite"
    plan = make_plan(base, wanted, "rehouse:llama")
    assert plan.config_changes["tie_word_embeddings"] is False
    assert plan.decisions[0].parameters == zoo.VOCABULARY * zoo.WIDTH
    assert not plan.is_constant


@pytest.mark.slow
@pytest.mark.skipif(
    "STEER_BAKE_TEST_QWEN2" not in os.environ, reason="STEER_BAKE_TEST_QWEN2: a folder of a Qwen2 model"
)
def test_a_real_qwen2_computes_the_same_bits_as_a_llama(tmp_path: Path) -> None:
    folder = Path(os.environ["STEER_BAKE_TEST_QWEN2"])
    relabelled(folder, tmp_path / "out", "llama")
    for name in Checkpoint.open(folder).files:
        assert any(path.samefile(folder / name) for path in (tmp_path / "out").glob("*.safetensors"))
    text = "def area(radius):\n    return 3.14159 * radius ** 2\n\nThe harbour was quiet, and the boats came in late."
    tokens = torch.tensor([load_tokenizer(folder)(text)["input_ids"]])
    old, new = (logits(load(one, "bfloat16"), tokens) for one in (folder, tmp_path / "out"))
    assert type(load(tmp_path / "out", "bfloat16")).__name__ == "LlamaForCausalLM"
    assert torch.equal(old, new)


# --- when it is chosen


def test_a_class_with_room_of_any_kind_is_kept_unless_another_one_is_asked_for(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path)
    base = Checkpoint.open(tmp_path)
    for prefer in ("smallest", "bit_exact", "widest_loading", "keep_class"):
        assert make_plan(base, [adding("resid_post.1", 1.0)], prefer).rehoused_from == ""
    assert make_plan(base, [adding("resid_post.1", 1.0)], "rehouse").rehoused_from == "qwen2"


def test_where_nothing_else_is_exact_another_class_is_found_but_not_under_keep_class(tmp_path: Path) -> None:
    # too few neurons for squares, and no bias at all: the class itself has no room
    zoo.save("mistral", tmp_path, sliding_window=WINDOW, intermediate_size=zoo.WIDTH)
    base, wanted = Checkpoint.open(tmp_path), [adding("resid_post.1", 1.0)]
    assert make_plan(base, wanted).model_type == "granite_swa"
    with pytest.raises(NotFoldable, match="mistral"):
        make_plan(base, wanted, "keep_class")


def test_what_has_no_home_in_any_class_is_refused_as_before(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path)
    base = Checkpoint.open(tmp_path)
    vector = unit(torch.ones(zoo.WIDTH))[0]
    wanted = [intervene("ablate", Direction(vector, None), Site.named("resid_post.1"), 1.0)]
    for prefer in ("smallest", "rehouse"):
        with pytest.raises(NotFoldable, match="projection of the stream in the middle"):
            make_plan(base, wanted, prefer)


def test_an_unknown_or_unfit_host_is_refused_by_name(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    base = Checkpoint.open(tmp_path)
    with pytest.raises(RecipeError, match="did you mean 'llama'"):
        make_plan(base, [adding("resid_post.1", 1.0)], "rehouse:lama")
    with pytest.raises(NotFoldable, match="hy_v3 class is no house for a llama model"):
        make_plan(base, [adding("resid_post.1", 1.0)], "rehouse:hy_v3")
    with pytest.raises(RecipeError, match="did you mean 'rehouse'"):
        make_plan(base, [adding("resid_post.1", 1.0)], "rehous")


# --- the proof refuses what is not the same


def refused(model_type: str, folder: Path, rule: Callable[[PretrainedConfig], House | None], **overrides: Any) -> str:
    zoo.save(model_type, folder, **overrides)
    with pytest.raises(NotFoldable) as found:
        prove(housed(Checkpoint.open(folder), rule))
    return str(found.value)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 3}),
        ("ministral", {"sliding_window": WINDOW}),
    ],
)
def test_a_window_is_not_lost(model_type: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    message = refused(model_type, tmp_path, llama, **overrides)
    assert "not the same under the llama class: their logits differ by" in message


def test_a_query_scale_that_sets_in_far_out_is_not_lost(tmp_path: Path) -> None:
    assert "their logits differ" in refused("ministral3", tmp_path, llama)  # from position 16384 on


@pytest.mark.parametrize(("model_type", "lost"), [("glm4_moe", "rope"), ("glm4_moe", "order"), ("glm", "order")])
def test_partial_rotary_is_not_lost(model_type: str, lost: str, tmp_path: Path) -> None:
    """Neither the kind of rope nor the order of a head's components can be left out."""
    host = registry.load("houses", CASES[model_type][2])

    def rule(config: PretrainedConfig) -> House:
        house = host(config)
        values = {name: value for name, value in house.values.items() if name != "rope_parameters"}
        parts = {name: part for name, part in house.parts.items() if not name.startswith("self_attn.")}
        return replace(house, values=values) if lost == "rope" else replace(house, parts=parts)

    assert "not the same under" in refused(model_type, tmp_path, rule, **CASES[model_type][1])


def test_llama_has_no_norms_for_hy_v3(tmp_path: Path) -> None:
    def rule(config: PretrainedConfig) -> House:
        values = {"mlp_layer_types": ["dense"] * config.num_hidden_layers, "head_dim": config.head_dim}
        return House("hy_v3", values, fill={"q_norm.weight": 1.0, "k_norm.weight": 1.0})

    assert "their logits differ" in refused("llama", tmp_path, rule)


def test_soft_caps_and_norms_behind_the_writers_are_not_lost(tmp_path: Path) -> None:
    def rule(config: PretrainedConfig) -> House:
        return House("granite", {"head_dim": config.head_dim})

    assert "has no place in the granite class: it has model.layers.0" in refused("gemma2", tmp_path, rule)


def test_a_capped_head_is_not_lost(tmp_path: Path) -> None:
    def rule(config: PretrainedConfig) -> House:
        return House("vaultgemma", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0})

    message = refused("vaultgemma", tmp_path, rule, final_logit_softcapping=1.0)
    assert "their logits differ" in message


@pytest.mark.parametrize(
    "wrong",
    [
        {"rms_norm_eps": 2e-6},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ],
    ids=str,
)
def test_the_proof_sees_small_differences(wrong: dict[str, Any], tmp_path: Path) -> None:
    def rule(config: PretrainedConfig) -> House:
        return House("llama", {"attention_bias": True, **wrong})

    assert "their logits differ" in refused("qwen2", tmp_path, rule)


ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        **{"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]},
        **{"factor": 4.0, "original_max_position_embeddings": 64},
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("model_type", "host"), [("qwen2", "llama"), ("mistral", "granite_swa"), ("qwen3", "hy_v3")])
def test_scaled_rope_stays_what_it_is(rope: str, model_type: str, host: str, tmp_path: Path) -> None:
    parameters = {"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]}
    zoo.save(model_type, tmp_path / "base", rope_parameters=parameters)
    prove(housed(Checkpoint.open(tmp_path / "base"), registry.load("houses", host)))
    relabelled(tmp_path / "base", tmp_path / "out", host)
    tokens = zoo.ids(180)  # beyond the original context
    old, new = (logits(load(tmp_path / name), tokens) for name in ("base", "out"))
    assert (old - new).abs().max() / old.std() <= 1e-6


def test_the_proof_changes_sizes_only(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path, use_sliding_window=True, sliding_window=4096, max_window_layers=2, layers=6)
    config = {**Checkpoint.open(tmp_path).config, "num_attention_heads": 14, "num_key_value_heads": 2}
    source = layout({**config, "hidden_size": 14 * 64, "vocab_size": 151936, "pad_token_id": 151643})
    small = shrunk(source)
    assert small.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (14, 2, 64)
    assert small.rope_parameters == source.parsed.rope_parameters
    assert small.rms_norm_eps == source.parsed.rms_norm_eps
    assert small.vocab_size < 200
    assert small.sliding_window < 24


def test_a_proof_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.save("qwen2", tmp_path, seed=11)
    base = Checkpoint.open(tmp_path)
    first = make_plan(base, [adding("resid_post.1", 1.0)], "rehouse")
    monkeypatch.setattr("steer_bake.proof._difference", lambda *_: pytest.fail("proven twice"))
    again = make_plan(base, [adding("resid_post.2", 1.0)], "rehouse")
    assert first.rehoused_from == again.rehoused_from == "qwen2"


def test_sinks_of_an_inserted_layer_weigh_nothing_either(tmp_path: Path) -> None:
    zoo.save("mistral", tmp_path, sliding_window=WINDOW)
    claim = housed(Checkpoint.open(tmp_path), granite_swa)
    plan = make_plan(claim.base, [adding("resid_pre.0", 1.0)], "bit_exact")
    assert plan.moved
    edits = {edit.tensor: edit for edit in claim.edits(plan.edits, plan.rename)}
    sinks = [name for name in edits if name.endswith(".sinks")]
    assert len(sinks) == zoo.LAYERS + 1
    assert all(torch.equal(edits[name].affine.shift, torch.full((4,), -1e4)) for name in sinks)


@pytest.mark.parametrize(
    ("model_type", "window", "host"), [("mistral", WINDOW, "granite_swa"), ("phi3", None, "llama")]
)
@pytest.mark.parametrize("site", ["resid_post.2", "resid_mid.2"])
def test_a_layer_inserted_into_the_other_class_adds_its_vector_too(
    model_type: str, window: int | None, host: str, site: str, tmp_path: Path
) -> None:
    overrides = {"sliding_window": window, "intermediate_size": zoo.WIDTH, "tie_word_embeddings": True}
    model = zoo.save(model_type, tmp_path / "base", **overrides)
    wanted = [adding("resid_pre.0", 0.5), adding(site, 3.0, 5)]
    plan = make_plan(Checkpoint.open(tmp_path / "base"), wanted, "bit_exact")
    assert plan.model_type == host
    assert plan.moved
    baked = load(bake(tmp_path / "base", tmp_path / "out", wanted, "bit_exact"))
    tokens = zoo.ids(20, batch=2)
    with steer(model, wanted):
        hooked = logits(model, tokens)
    assert (hooked - logits(baked, tokens)).abs().max() / hooked.std() <= CONSTANTS_TOLERANCE


@pytest.mark.parametrize("case", ["helium", "gemma in llama"])
def test_a_split_layer_takes_its_tensors_along_in_their_new_order(case: str, tmp_path: Path) -> None:
    model_type, overrides, host = CASES[case]
    model = zoo.save(model_type, tmp_path / "base", **overrides)
    base, wanted = Checkpoint.open(tmp_path / "base"), [adding("resid_mid.1", 3.0, 5)]
    claim = housed(base, registry.load("houses", host))
    plan = make_plan(claim.base, wanted, "bit_exact")
    assert plan.moved
    (tmp_path / "out").mkdir()
    write_edited(
        base,
        claim.edits(plan.edits, plan.rename),
        tmp_path / "out",
        config_changes={**claim.config_changes, **plan.config_changes},
        rename=claim.rename(plan.rename),
        drop=claim.dropped,
    )
    tokens = zoo.ids(20, batch=2)
    with steer(model, wanted):
        hooked = logits(model, tokens)
    assert (hooked - logits(load(tmp_path / "out"), tokens)).abs().max() / hooked.std() <= CONSTANTS_TOLERANCE


def test_a_class_that_does_not_run_is_refused(tmp_path: Path) -> None:
    # this class asks for a window even where no layer slides
    message = refused("ministral", tmp_path, llama, **FULL, sliding_window=None)
    assert "one of the two does not run" in message


def test_the_rules_that_claim_a_model_are_found_in_the_folder(tmp_path: Path) -> None:
    zoo.save("mistral", tmp_path)
    assert [rule.__name__ for rule in hosts(Checkpoint.open(tmp_path))] == ["granite_swa", "llama"]


@pytest.mark.tampered  # the base gets the tokenizer's own files
def test_the_certificate_compares_the_tokenizers_of_a_rehoused_folder(qwen: Path, tmp_path: Path) -> None:
    def tokenizer_check(name: str) -> Check:
        out = bake(qwen, tmp_path / name, wanted, "rehouse:llama")
        report = validate(out, qwen, wanted, [[5, 6, 7, 8, 9], [10, 11, 12]], pad_id=0, decode_tokens=4)
        return next(check for check in report.checks if check.name == "tokenizer")

    wanted = [steered(3.0)]
    # A qwen2 folder is read by Qwen2Tokenizer whatever its files say, a llama folder is not.
    found = tokenizer_check("generic")
    assert not found.passed
    assert "use the base's tokenizer" in found.detail
    load_tokenizer(qwen).save_pretrained(qwen)
    assert tokenizer_check("its own").passed


def test_the_card_says_that_the_class_is_another_one(qwen: Path, tmp_path: Path) -> None:
    out = bake(qwen, tmp_path / "out", [steered(3.0)], "rehouse:llama")
    report = {
        **{"passed": True, "prompts": 1, "tokens": 3, "checks": []},
        "interventions": [{"name": "add", "site": "resid_post.1", "amount": 3.0, "dose": 0.5}],
        "plan_sha256": manifest.read(out).content["plan_sha256"],
    }
    text = card.render(out, report, None, None)
    assert "the base is a `qwen2` model, this folder a `llama` model" in text
