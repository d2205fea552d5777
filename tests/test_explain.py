"""``explain``: what a model can hold, from its config alone, is what a plan of the real checkpoint says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

from steer_bake.checkpoint import Checkpoint
from steer_bake.cli import main
from steer_bake.direction import Direction
from steer_bake.errors import CheckpointError, NotFoldable, RecipeError
from steer_bake.explain import NEVER_BAKED, Explanation, Row, explain, made_up
from steer_bake.interventions import intervene
from steer_bake.plan import make_plan
from steer_bake.sites import parse_sites
from steer_bake.skeleton import stored

from . import zoo


def row(found: Explanation, sites: str, operation: str) -> Row:
    return next(one for one in found.rows if (one.sites, one.operation) == (sites, operation))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mixtral", "qwen3_moe", "deepseek_v3", "bert"])
def test_the_class_says_what_a_saved_checkpoint_holds(model_type: str, tmp_path: Path) -> None:
    model = zoo.save(model_type, tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        real = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    assert stored(model.config) == real


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "mamba", "bert"])
def test_config_alone_says_the_same_as_the_headers(model_type: str, tmp_path: Path) -> None:
    zoo.save(model_type, tmp_path / "whole")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "config")
    whole, config = (explain(str(tmp_path / name)) for name in ("whole", "config"))
    assert (whole.read, config.read) == ("headers", "config")
    assert config.as_json() | {"model": whole.model, "read": whole.read} == whole.as_json()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mamba"])
@pytest.mark.parametrize("prefer", ["smallest", "bit_exact", "widest_loading", "keep_class"])
def test_what_is_preferred_is_what_a_plan_takes(model_type: str, prefer: str, tmp_path: Path) -> None:
    zoo.save(model_type, tmp_path)
    base = Checkpoint.open(tmp_path)
    vector = Direction(torch.nn.functional.normalize(torch.ones(zoo.WIDTH), dim=0), None)
    for one in explain(str(tmp_path)).rows:
        try:
            asked = [
                made_up("gate", site, zoo.WIDTH) if one.operation == "gate" else intervene(one.operation, vector, site)
                for site in parse_sites(one.sites, zoo.LAYERS)
            ]
            plan = make_plan(base, asked, prefer)
        except (NotFoldable, RecipeError):
            assert not any(prefer in option.preferred_by for option in one.options)
            continue
        [option] = [option for option in one.options if prefer in option.preferred_by]
        assert option.representation == " + ".join(dict.fromkeys(d.representation for d in plan.decisions))
        assert option.config_changes == plan.config_changes
        assert option.layers == plan.layers_after(zoo.LAYERS) - zoo.LAYERS
        assert option.parameters == sum(
            torch.Size(edit.shape).numel() - (torch.Size(edit.old_shape).numel() if edit.source == edit.tensor else 0)
            for edit in plan.edits
            if edit.tensor not in base.tensors or edit.source is None or edit.appended is not None
        )


def test_a_bare_type_is_explained_with_all_sites_and_operations() -> None:
    found = explain("gpt2")
    assert (found.model_type, found.read, found.described, found.layers) == ("gpt2", "config", True, 12)
    assert {one.sites for one in found.rows} == {
        *(
            "resid_post.6",
            "resid_post",
            "resid_mid.6",
            "attn_out.6",
            "mlp_out.6",
            "mlp_in.6",
            "resid_pre.0",
            "writers",
            "writes",
        )
    }
    assert row(found, "resid_post.6", "add").options[0].parameters == 0  # it has the bias
    assert {one.operation for one in found.rows if one.sites == "writes"} == {"ablate", "clamp"}
    assert {one.operation for one in found.rows if one.sites == "mlp_in.6"} == {"gate"}
    assert "in the middle of the model" in row(found, "resid_post.6", "ablate").refused[""]


def test_a_post_norm_family_takes_a_layer_and_llama_cpp_cannot_load_it() -> None:
    option = row(explain("gemma2", ["resid_post.3"]), "resid_post.3", "add").options[0]
    assert (option.representation, option.layers) == ("carrier", 1)
    assert "layers" in option.needs
    assert dict(option.loads) == {"transformers": True, "vllm": True, "llama.cpp": False, "mlx": False}


def test_what_a_flag_unlocks_is_asked_of_every_loader() -> None:
    options = {
        one.representation: one for one in row(explain("llama", ["resid_post.3"]), "resid_post.3", "add").options
    }
    assert options["bias"].needs == ("mlp_input_bias", "mlp_output_bias")
    assert options["squares"].needs == ("layers",)
    assert "bias" in row(explain("mixtral", ["mlp_out.3"]), "mlp_out.3", "add").refused


def test_the_houses_that_claim_a_model_are_listed_with_what_they_give() -> None:
    found = explain("gemma", ["resid_post.3"])
    granite, llama = found.houses
    assert (granite.model_type, llama.model_type) == ("granite", "llama")
    assert granite.option is not None
    assert llama.option is not None
    biases = 28 * (24576 + 24576 + 3072)  # of gate, up and down, in every layer
    assert granite.option.parameters == biases
    assert llama.option.parameters == biases + 256000 * 3072  # and a head of its own
    assert llama.option.loads == {"transformers": True, "vllm": True, "llama.cpp": True, "mlx": True}
    assert found.as_json()["houses"][1]["proven"] == "before a bake"
    assert explain("llama", ["resid_post.3"]).houses == ()


def test_a_rope_that_the_class_usually_has_not_is_asked_of_every_loader() -> None:
    [llama] = explain("glm", ["resid_post.3"]).houses
    assert llama.option is not None
    assert "proportional_rope" in llama.option.needs
    assert {"attention_output_bias", "mlp_output_bias"} <= {*llama.option.needs}
    assert llama.option.loads == {"transformers": True, "vllm": None, "llama.cpp": None, "mlx": None}
    assert not llama.same_bits


def test_what_a_house_would_give_is_what_a_bake_in_it_adds(tmp_path: Path) -> None:
    for model_type, overrides in (("qwen2", {}), ("phi3", {"sliding_window": None}), ("gemma", {})):
        zoo.save(model_type, tmp_path / model_type, **overrides)
        base = Checkpoint.open(tmp_path / model_type)
        vector = Direction(torch.nn.functional.normalize(torch.ones(zoo.WIDTH), dim=0), None)
        asked = [intervene("add", vector, site) for site in parse_sites("resid_post.2", zoo.LAYERS)]
        for claim in explain(str(tmp_path / model_type), ["resid_post.2"]).houses:
            plan = make_plan(base, asked, f"rehouse:{claim.model_type}")
            assert claim.option is not None
            assert claim.option.parameters == sum(decision.parameters for decision in plan.decisions[:1]) + sum(
                torch.Size(edit.shape).numel() for edit in plan.edits if edit.source is None and ".mlp." in edit.tensor
            )
            assert claim.option.config_changes == plan.config_changes


def test_a_house_that_cannot_take_the_config_says_why() -> None:
    [llama] = explain("seed_oss", ["resid_post.3"]).houses
    assert llama.option is None
    assert "is not a multiple of the number of attention heads" in llama.refused
    text = CliRunner().invoke(main, ["explain", "seed_oss", "--site", "resid_post.3"]).stdout
    assert "refused: as llama: " in text


def test_the_table_of_houses_says_that_they_are_not_proven_yet() -> None:
    text = CliRunner().invoke(main, ["explain", "phi3", "--site", "resid_post.3"]).stdout
    assert "as another class (prefer: rehouse:CLASS), add resid_post.3; proven before a bake" in text
    [line] = [line for line in text.splitlines() if line.strip().startswith("llama")]
    assert line.split() == ["llama", "bias", "b", "623k", "<", "0.1", "%", "yes", "yes", "yes", "yes"]


def test_a_gate_is_held_by_neurons_by_neurons_of_another_class_or_not_at_all() -> None:
    [option] = row(explain("gpt2", ["mlp_in.3"]), "mlp_in.3", "gate").options
    assert (option.representation, option.config_changes, option.layers) == ("neurons", {"n_inner": 3136}, 0)
    assert option.parameters == 12 * 64 * (768 + 768 + 1)  # rows, columns and biases of all layers
    [wider] = row(explain("llama", ["mlp_in.3"]), "mlp_in.3", "gate").options
    assert wider.needs == ("mlp_input_bias", "mlp_output_bias")
    found = explain("qwen2", ["resid_post.3", "mlp_in.3"])
    assert "has none and no config flag creates it" in row(found, "mlp_in.3", "gate").refused[""]
    assert {(one.model_type, one.operation) for one in found.houses} >= {("llama", "add"), ("llama", "gate")}
    [claim] = [one for one in found.houses if (one.model_type, one.operation) == ("llama", "gate")]
    assert claim.option is not None
    assert claim.option.config_changes["intermediate_size"] == 22016 + 64
    refused = explain("gemma2", ["mlp_in.3"])
    assert refused.houses == ()
    assert "norm stands between" in row(refused, "mlp_in.3", "gate").refused[""]


def test_the_table_asks_houses_about_gates_apart() -> None:
    text = CliRunner().invoke(main, ["explain", "qwen2", "--site", "resid_post.3", "--site", "mlp_in.3"]).stdout
    for about in ("add resid_post.3", "gate mlp_in.3"):
        assert f"as another class (prefer: rehouse:CLASS), {about}; proven before a bake" in text


def test_experts_have_their_names_on_disk() -> None:
    assert row(explain("mixtral", ["mlp_out.3"]), "mlp_out.3", "ablate").options[0].representation == "rank_one"


def test_a_type_that_nobody_describes_is_never_baked() -> None:
    found = explain("rwkv")
    assert (found.described, found.rows, found.note) == (False, (), NEVER_BAKED)
    assert found.layout == {
        "stack": "rwkv.blocks", "attention": ["attention"], "mlp": ["feed_forward"], "parallel": False,
    }  # fmt: skip


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no model 'llamma'"):
        explain("llamma")
    with pytest.raises(RecipeError, match="layers 0 to 11"):
        explain("gpt2", ["resid_post.12"])


def test_a_damaged_checkpoint_is_not_explained_by_its_config(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        explain(str(tmp_path))


def test_the_json_has_a_stable_shape() -> None:
    done = CliRunner().invoke(main, ["explain", "gpt2", "--site", "resid_pre.0", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert list(found) == [
        *("model", "model_type", "read", "described", "parameters", "layers", "width", "layout", "note", "rows"),
        "houses",
    ]
    assert list(found["rows"][0]) == ["sites", "operation", "options", "refused"]
    assert list(found["rows"][0]["options"][0]) == [
        *("representation", "default", "preferred_by", "parameters", "share", "layers", "bit_exact", "demands"),
        *("config_changes", "needs", "loads", "note"),
    ]
    assert sum(option["default"] for option in found["rows"][0]["options"]) == 1


def test_the_table_has_defaults_costs_runtimes_and_refusals() -> None:
    done = CliRunner().invoke(main, ["explain", "gemma2", "--site", "resid_post.3", "--site", "resid_pre.0"])
    assert done.exit_code == 0, done.output
    assert "gemma2, 26 layers, width 2304, from its config alone" in done.stdout
    assert "llama.cpp" in done.stdout
    assert "refused: ablate resid_post.3, clamp resid_post.3: a projection" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.strip().startswith("add resid_post.3")]
    assert line.split() == ["add", "resid_post.3", "carrier", "*bw", "78M", "3.0", "%", "1", "yes", "yes", "no", "no"]


def test_help_has_examples() -> None:
    text = CliRunner().invoke(main, ["explain", "--help"]).output
    assert "steer-bake explain gemma2" in text
