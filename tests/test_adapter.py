"""An adapter, loaded by PEFT, computes what the hooks compute; merged, what our bake computes, or the plan says no."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from steer_bake import adapter, card, comparison, manifest, pipeline
from steer_bake.audit import audit
from steer_bake.checkpoint import Checkpoint
from steer_bake.cli import main
from steer_bake.direction import Direction, unit
from steer_bake.errors import CheckpointError, NotFoldable, RecipeError
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef, load_model
from steer_bake.plan import make_plan
from steer_bake.reload_worker import greedy, load_adapted, logits
from steer_bake.steering import steer
from steer_bake.targets.checkpoint import checkpoint
from steer_bake.targets.lora import lora
from steer_bake.unbake import unbake
from steer_bake.validate import validate

from . import jobs, tiny, zoo
from .test_bake import PAD, ablate, add, at, clamp, gap

ROWS = [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22], [90, 80, 70, 60, 50]]
TOLERANCE = 2e-5  # of std(logits), float32

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

#: Whatever a model may hold; each is either held exactly or refused in a sentence.
CASES: dict[str, Callable[[int], list[Intervention]]] = {
    "ablate writes": lambda d: [wide("ablate", d, "writes")],
    "ablate writers": lambda d: [wide("ablate", d, "writers")],
    "half an ablation of writers": lambda d: [wide("ablate", d, "writers", 0.5)],
    "two ablations, not orthogonal": lambda d: [wide("ablate", d, "writers"), wide("ablate", d, "writers", seed=7)],
    "ablate attn_out": lambda d: [wide("ablate", d, "attn_out.1")],
    "ablate mlp_out": lambda d: [wide("ablate", d, "mlp_out.1")],
    "clamp writes": lambda d: [wide("clamp", d, "writes", 2.0)],
    "clamp attn_out": lambda d: [wide("clamp", d, "attn_out.1", 2.0)],
    "add resid_pre.0": lambda d: [wide("add", d, "resid_pre.0", 3.0)],
    "add resid_mid": lambda d: [wide("add", d, "resid_mid.1", 3.0)],
    "add resid_post": lambda d: [wide("add", d, "resid_post.1", 3.0)],
    "add resid_post twice, ablate writers": lambda d: [
        wide("ablate", d, "writers"),
        wide("add", d, "resid_post.1", 3.0, 1),
        wide("add", d, "resid_post.2", 2.0, 2),
    ],
}
#: Models, and the words of the refusal of every case that PEFT cannot hold there.
EMBEDDING, BARE, PLAIN = "beside an adapted embedding", "beside adapted experts", "no writer of .* is a plain linear"
MODELS: dict[str, dict[str, str]] = {
    "llama": {},
    "tied llama": {},
    "biased llama": {"ablate writes": EMBEDDING, "clamp writes": EMBEDDING},
    "gpt2": {"ablate writes": EMBEDDING, "clamp writes": EMBEDDING},
    "gemma": {},
    "falcon": {"add resid_mid": "has no middle"},
    "mixtral": {
        "add resid_post": PLAIN,
        "add resid_post twice, ablate writers": PLAIN,
    },
    "qwen3_moe": {
        "add resid_post": PLAIN,
        "add resid_post twice, ablate writers": PLAIN,
    },
    "deepseek_v3": {
        "add resid_post": PLAIN,
        "add resid_post twice, ablate writers": PLAIN,
    },
    "granitemoe": {"add resid_post": PLAIN, "add resid_post twice, ablate writers": PLAIN},
    "gpt_oss": {
        "ablate writes": EMBEDDING,
        "ablate writers": BARE,
        "half an ablation of writers": BARE,
        "two ablations, not orthogonal": BARE,
        "clamp writes": EMBEDDING,
        "add resid_post": PLAIN,
        "add resid_post twice, ablate writers": PLAIN,
    },
}


def wide(name: str, width: int, site: str, amount: float = 1.0, seed: int = 0) -> Intervention:
    vector = unit(torch.randn(width, generator=torch.Generator().manual_seed(seed)))[0]
    return intervene(name, Direction(vector, None), at(site), amount, "unit")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A float32 folder of a kind of model."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            if kind.endswith("llama"):
                tiny.save_llama(
                    made[kind], tied=kind.startswith("tied"), biased=kind.startswith("biased"), dtype=torch.float32
                )
            else:
                zoo.save(kind, made[kind])
        return made[kind]

    return make


def adapted(base: Path, out: Path, interventions: list[Intervention], **options: Any) -> Path:
    opened = Checkpoint.open(base)
    plan = make_plan(opened, interventions, target="lora")
    return lora(plan, opened, ModelRef(str(base), base), out, **options)


def on(base: Path, folder: Path) -> PreTrainedModel:
    model, problems = load_adapted(str(base), str(folder), "PeftModel", "float32")
    assert problems == []
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", MODELS)
def test_adapter_equals_hooks_or_is_refused(bases: Callable[[str], Path], tmp_path: Path, kind: str, case: str) -> None:
    base = bases(kind)
    model = load_model(base, dtype="float32")
    width = Checkpoint.open(base).config["hidden_size" if kind != "gpt2" else "n_embd"]
    steering = CASES[case](width)
    if case in MODELS[kind]:
        with pytest.raises(NotFoldable, match=MODELS[kind][case]):
            make_plan(Checkpoint.open(base), steering, target="lora")
        return
    folder = adapted(base, tmp_path / "out", steering)
    loaded = on(base, folder)
    rows = [[token % zoo.VOCABULARY for token in row] for row in ROWS]
    plain = logits(model, rows, 0)
    with steer(model, steering):
        hooked, decoded = logits(model, rows, 0), greedy(model, rows, 0, 8)
    assert gap(hooked, logits(loaded, rows, 0)) <= TOLERANCE
    assert torch.equal(decoded, greedy(loaded, rows, 0, 8))
    assert gap(hooked, plain) > 0.05  # an adapter that does nothing would pass the lines above


# --- the certificate, in a fresh process


@pytest.mark.parametrize(
    ("kind", "steering"),
    {
        "clamp writes, tied": ("tied", [clamp("writes")]),
        "vector and projection, without biases": ("untied", [ablate("writers"), add("resid_post.1")]),
    }.values(),
    ids=["tied", "bias"],
)
def test_the_certificate_loads_it_in_three_ways(
    llama: Path, tied_llama: Path, tmp_path: Path, kind: str, steering: list[Intervention]
) -> None:
    base = tied_llama if kind == "tied" else llama
    folder = adapted(base, tmp_path / "out", steering)
    report = validate(folder, base, steering, ROWS, pad_id=PAD, decode_prompts=3, decode_tokens=8)
    report.require()
    names = {check.name for check in report.checks}
    assert {"adapter config", "tensors", "function, adapter (float32)", "function, storage dtype", "effect"} <= names
    for loader in ("AutoModelForCausalLM", "AutoPeftModelForCausalLM"):
        assert report.legs[loader].max_over_std <= TOLERANCE
    text = card.render(folder, report.as_json(), None)
    assert ("Do not merge" in text) == (kind == "tied")
    assert ("vLLM refuses" in text) == (kind == "untied")
    assert ("stream (reloaded, float32)" in names) == (kind == "tied")


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_the_certificate_of_other_families(bases: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    steering = [wide("ablate", zoo.WIDTH, "writers")]
    folder = adapted(bases(kind), tmp_path / "out", steering)
    rows = [[token % zoo.VOCABULARY for token in row] for row in ROWS]
    report = validate(folder, bases(kind), steering, rows, pad_id=0, decode_prompts=3, decode_tokens=8)
    report.require()
    assert set(report.legs) == {"adapter", "AutoModelForCausalLM", "AutoPeftModelForCausalLM"}


def test_where_the_first_draw_is_past_the_limit_every_way_to_load_it_is_drawn_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering = [ablate("writers")]
    folder = adapted(llama, tmp_path / "out", steering)
    report = validate(folder, llama, steering, ROWS, pad_id=PAD, decode_prompts=1, decode_tokens=2)
    monkeypatch.setattr(comparison, "ADAPTER_TOLERANCE", report.legs["adapter"].max_over_std / 2)
    done: list[tuple[int, int]] = []
    again = validate(
        folder, llama, steering, ROWS,
        pad_id=PAD, decode_prompts=1, decode_tokens=2, progress=lambda *passes: done.append(passes),
    )  # fmt: skip
    drawn = [check.name for check in again.checks if "median of 3 draws" in check.detail]
    assert drawn == [
        f"function, {name} (float32)" for name in ("adapter", "AutoModelForCausalLM", "AutoPeftModelForCausalLM")
    ]
    assert again.legs["AutoModelForCausalLM"] == again.legs["AutoPeftModelForCausalLM"]
    assert done == sorted(done)
    # The hooks' passes are counted one by one: were there more or fewer than announced, the last step would be another.
    assert done[-1] == (done[-1][1], done[-2][1])
    assert done[-1][0] == done[-2][0] + 1


def test_the_disk_has_room_for_the_logits_of_every_way_to_load_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapted(llama, tmp_path / "out", [add("resid_post.1")])
    logits_of_all = 4 * sum(map(len, ROWS)) * Checkpoint.open(llama).config["vocab_size"]
    for times, is_enough in ((6.9, False), (7.1, True)):  # three in float32, the hooks', three draws in bfloat16
        free = SimpleNamespace(free=int(times * logits_of_all))
        monkeypatch.setattr("shutil.disk_usage", lambda _path, free=free: free)
        with nullcontext() if is_enough else pytest.raises(CheckpointError, match="point TMPDIR to a disk with room"):
            validate(
                folder, llama, [add("resid_post.1")], ROWS, pad_id=PAD, decode_prompts=1, decode_tokens=2
            ).require()


def test_a_tokenizer_larger_than_the_embedding_does_not_resize_it(tmp_path: Path) -> None:
    """Where a tokenizer lies beside the adapter, AutoPeftModel makes the embedding as long as it: none lies there."""
    base = tiny.save_llama(tmp_path / "base", dtype=torch.float32)
    words = tiny.tokenizer()
    words.add_tokens([f"<{number}>" for number in range(9)])
    words.save_pretrained(base)
    rows = Checkpoint.open(base).config["vocab_size"]
    assert len(words) > rows
    folder = adapted(base, tmp_path / "out", [ablate("writes")])
    assert not list(folder.glob("tokenizer*"))
    assert AutoPeftModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == rows
    copy = jobs.copy(folder, tmp_path / "copy")
    for path in base.glob("tokenizer*"):
        shutil.copy(path, copy)
    (copy / "steering.json").unlink()
    with pytest.raises(RuntimeError, match="size mismatch"):
        AutoPeftModelForCausalLM.from_pretrained(copy)


# --- merging


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gemma"])
def test_merged_it_is_our_bake_where_the_base_is_untied_or_its_embedding_left_alone(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = bases(kind)
    opened = Checkpoint.open(base)
    untied = kind in ("llama", "mixtral")
    steering = [wide("ablate", opened.config.get("hidden_size", zoo.WIDTH), "writes" if untied else "writers")]
    merged = on(base, adapted(base, tmp_path / "out", steering)).merge_and_unload()
    ours = checkpoint(make_plan(opened, steering), opened, ModelRef(str(base), base), tmp_path / "baked")
    baked = load_model(ours, dtype="float32")
    rows = [[token % zoo.VOCABULARY for token in row] for row in ROWS]
    assert gap(logits(baked, rows, 0), logits(merged, rows, 0)) <= TOLERANCE
    for name, tensor in baked.state_dict().items():
        assert torch.allclose(tensor, merged.state_dict()[name], atol=1e-5), name


def test_merging_into_a_tied_base_edits_the_head_too_and_plan_and_card_say_so(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base, steering = bases("tied llama"), [ablate("writes")]
    model = load_model(base, dtype="float32")
    with steer(model, steering):
        hooked = logits(model, ROWS, PAD)
    loaded = on(base, adapted(base, tmp_path / "out", steering))
    assert gap(hooked, logits(loaded, ROWS, PAD)) <= TOLERANCE
    assert gap(hooked, logits(loaded.merge_and_unload(), ROWS, PAD)) > 1e-2
    plan = make_plan(Checkpoint.open(base), steering, target="lora")
    assert any("do not merge" in decision.note for decision in plan.decisions)
    portable = make_plan(Checkpoint.open(base), [ablate("writers")], target="lora")
    assert not any(decision.note for decision in portable.decisions)


def test_a_new_bias_cannot_be_merged_and_the_plan_says_so(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    loaded = on(base, adapted(base, tmp_path / "out", [add("resid_post.1")]))
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        loaded.merge_and_unload()
    [decision] = make_plan(Checkpoint.open(base), [add("resid_post.1")], target="lora").decisions
    assert decision.representation == "lora_bias"
    assert "no merge" in decision.note
    assert "vLLM" in decision.note
    [native] = make_plan(
        Checkpoint.open(bases("gpt2")), [wide("add", zoo.WIDTH, "resid_post.1")], target="lora"
    ).decisions
    assert native.note == ""


# --- strengths


def test_the_strength_can_be_set_at_load_time(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("llama")
    folder = adapted(base, tmp_path / "out", [ablate("writers"), add("resid_post.1")])
    config = PeftConfig.from_pretrained(folder)
    config.lora_alpha = config.lora_alpha * 0.5
    half = PeftModel.from_pretrained(load_model(base, dtype="float32"), folder, config=config)
    model = load_model(base, dtype="float32")
    with steer(model, [ablate("writers", 0.5), add("resid_post.1", 1.5)]):
        wanted = logits(model, ROWS, PAD)
    assert gap(wanted, logits(half.eval(), ROWS, PAD)) <= TOLERANCE
    whole = on(base, folder)
    with rescale_adapter_scale(whole, 0.5):
        assert gap(wanted, logits(whole, ROWS, PAD)) <= TOLERANCE


@pytest.mark.parametrize("combination", ["linear", "cat"])
def test_weighted_adapters_of_one_base_add_up(bases: Callable[[str], Path], tmp_path: Path, combination: str) -> None:
    base = bases("llama")
    loaded: Any = on(base, adapted(base, tmp_path / "one", [ablate("writers", seed=1)]))
    loaded.load_adapter(str(adapted(base, tmp_path / "two", [ablate("writers", seed=2)])), "second")
    loaded.add_weighted_adapter(["default"], [0.25], "quarter", combination_type=combination)
    loaded.set_adapter("quarter")
    model = load_model(base, dtype="float32")
    with steer(model, [ablate("writers", 0.25, seed=1)]):
        assert gap(logits(model, ROWS, PAD), logits(loaded, ROWS, PAD)) <= TOLERANCE
    loaded.set_adapter("second")
    with steer(model, [ablate("writers", seed=2)]):
        assert gap(logits(model, ROWS, PAD), logits(loaded, ROWS, PAD)) <= TOLERANCE
    with loaded.disable_adapter():
        assert torch.equal(logits(load_model(base, dtype="float32"), ROWS, PAD), logits(loaded, ROWS, PAD))


# --- traps


def test_a_regular_expression_would_adapt_every_layer_of_a_sparse_model(
    bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases("mixtral")
    expression = LoraConfig(target_modules=r".*layers\.1\.self_attn\.o_proj", r=1, task_type="CAUSAL_LM")
    reduced = get_peft_model(load_model(base, dtype="float32"), expression)
    assert len({name for name, _ in reduced.named_modules() if name.endswith("o_proj.lora_A")}) == zoo.LAYERS
    folder = adapted(base, tmp_path / "out", [wide("ablate", zoo.WIDTH, "attn_out.1")])
    ours = on(base, folder)
    hit = {name for name, _ in ours.named_modules() if name.endswith("lora_A")}
    assert hit == {"base_model.model.model.layers.1.self_attn.o_proj.lora_A"}


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_experts_of_one_layer_are_reached_by_their_full_name(
    bases: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    base = bases(kind)
    folder = adapted(base, tmp_path / "out", [wide("ablate", zoo.WIDTH, "mlp_out.2")])
    config = json.loads((folder / adapter.CONFIG).read_text())
    named = [*config["target_modules"], *config["target_parameters"]]
    assert named
    assert all(name.startswith("model.layers.2.mlp.") for name in named)


def test_only_full_names_are_written(llama: Path, tmp_path: Path) -> None:
    folder = adapted(llama, tmp_path / "out", [ablate("writes")])
    config = json.loads((folder / adapter.CONFIG).read_text())
    known = {name.removesuffix(".weight") for name in Checkpoint.open(llama).tensors}
    assert set(config["target_modules"]) <= known
    assert len(config["target_modules"]) == 1 + 2 * tiny.LAYERS


def test_the_same_bytes_at_any_number_of_threads(llama: Path, tmp_path: Path) -> None:
    found = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append((adapted(llama, tmp_path / str(threads), [ablate("writes")]) / adapter.WEIGHTS).read_bytes())
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]


def test_rehousing_is_no_preference_of_an_adapter(llama: Path) -> None:
    with pytest.raises(RecipeError, match="only a checkpoint can be of another class"):
        make_plan(Checkpoint.open(llama), [ablate("writers")], "rehouse", "lora")


# --- the audit


def other_value(folder: Path) -> None:
    tensors = load_file(folder / adapter.WEIGHTS)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name][0, 0] *= 1.001
    save_file(tensors, folder / adapter.WEIGHTS, metadata={"format": "pt"})


def one_more_tensor(folder: Path) -> None:
    tensors = load_file(folder / adapter.WEIGHTS)
    [name] = [name for name in tensors if name.endswith("layers.0.self_attn.o_proj.lora_A.weight")]
    tensors[name.replace("o_proj", "q_proj")] = tensors[name].clone()
    save_file(tensors, folder / adapter.WEIGHTS, metadata={"format": "pt"})


def other_scale(folder: Path) -> None:
    _config(folder, lora_alpha=4)


def one_more_target(folder: Path) -> None:
    content = json.loads((folder / adapter.CONFIG).read_text())
    _config(folder, target_modules=[*content["target_modules"], "lm_head"])


def another_base(folder: Path) -> None:
    _config(folder, base_model_name_or_path="org/other", revision="0" * 40)


def a_base_without_commit(folder: Path) -> None:
    _config(folder, base_model_name_or_path="org/other")


def a_checkpoint_beside_it(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / adapter.CONFIG).read_text())
    (folder / adapter.CONFIG).write_text(json.dumps(content | changes))


@pytest.mark.tampered
@pytest.mark.parametrize(
    ("tamper", "check"),
    [
        (other_value, "tensors"),
        (one_more_tensor, "tensors"),
        (other_scale, "adapter config"),
        (one_more_target, "adapter config"),
        (another_base, "adapter config"),
        (a_base_without_commit, "adapter config"),
        (a_checkpoint_beside_it, "other files"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_the_audit_names_what_was_changed(
    llama: Path, tmp_path: Path, tamper: Callable[[Path], None], check: str
) -> None:
    folder = adapted(llama, tmp_path / "out", [ablate("writers")])
    base = Checkpoint.open(llama)
    assert audit(folder, base).passed
    tamper(folder)
    failed = {one.name for one in audit(folder, base).checks if not one.passed}
    assert check in failed


@pytest.mark.tampered
def test_the_certificate_fails_on_what_was_changed(llama: Path, tmp_path: Path) -> None:
    folder = adapted(llama, tmp_path / "out", [ablate("writers")])
    other_value(folder)
    report = validate(folder, llama, [ablate("writers")], ROWS, pad_id=PAD, decode_prompts=2, decode_tokens=4)
    assert "tensors" in {check.name for check in report.checks if not check.passed}
    one_more_tensor(folder)
    report = validate(folder, llama, [ablate("writers")], ROWS, pad_id=PAD, decode_prompts=2, decode_tokens=4)
    assert "strict load (float32)" in {check.name for check in report.checks if not check.passed}


# --- the command line and recipes


def test_bake_validate_audit_and_undo_on_the_command_line(llama: Path, tmp_path: Path) -> None:
    jobs.write_directions(tmp_path / "v.safetensors")
    jobs.write_prompts(tmp_path)
    out = tmp_path / "adapter"
    given = ["--vector", str(tmp_path / "v.safetensors"), "--target", "lora"]
    run = CliRunner()
    told = run.invoke(main, ["plan", str(llama), *given, "--sites", "resid_post.1", "--coefficient", "8"])
    assert told.exit_code == 0, told.output
    assert "lora_bias" in told.output
    assert "vLLM" in told.output
    done = run.invoke(main, ["bake", str(llama), *given, "--sites", "writers", "--name", "ablate", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "AutoPeftModelForCausalLM" in done.output
    shown = run.invoke(main, ["validate", str(out), "--prompts", str(tmp_path / "proof.jsonl"), "--decode-tokens", "4"])
    assert shown.exit_code == 0, shown.output
    assert "AutoModelForCausalLM" in shown.output
    assert run.invoke(main, ["audit", str(out), "--hash"]).exit_code == 0
    undone = run.invoke(main, ["unbake", str(out), "-o", str(tmp_path / "base")])
    assert undone.exit_code == 1
    assert "nothing to undo" in undone.output


def test_a_recipe_can_ask_for_an_adapter(llama: Path, tmp_path: Path) -> None:
    steering = {"name": "ablate", "sites": "writers", "from": "resid_post.1"}
    path = jobs.write_recipe(
        tmp_path, llama, intervention=steering, read={"sites": "resid_post.1"}, target={"name": "lora"}
    )
    done = pipeline.run(path, tmp_path / "run")
    assert done.report["passed"]
    assert done.evaluation["behaviour"]
    text = (done.model / "README.md").read_text()
    assert "base_model_relation" not in text  # the base is a folder: there is no hub id to name
    assert "library_name: peft" in text
    assert "AutoPeftModelForCausalLM" in text
    again = pipeline.run(path, tmp_path / "run")
    assert not any(again.ran.values())


def test_an_adapter_is_not_undone(llama: Path, tmp_path: Path) -> None:
    folder = adapted(llama, tmp_path / "out", [ablate("writers")])
    with pytest.raises(CheckpointError, match="nothing to undo"):
        unbake(folder, tmp_path / "base", Checkpoint.open(llama))
    assert manifest.read(folder).target == "lora"
