"""Gates: a shift that is added where a probe fires, in the hooks and, as further neurons, in plain weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from steer_bake import manifest, reload_worker
from steer_bake.architectures import layout
from steer_bake.audit import audit
from steer_bake.checkpoint import Checkpoint
from steer_bake.comparison import CONSTANTS_TOLERANCE, NOISE_MARGIN, Distance, stream_probes
from steer_bake.direction import Direction, unit
from steer_bake.errors import NotFoldable, RecipeError
from steer_bake.gate import RAMPS, Gate
from steer_bake.interventions import Intervention, intervene
from steer_bake.models import ModelRef
from steer_bake.plan import make_plan
from steer_bake.sites import Site
from steer_bake.steering import steer, watch
from steer_bake.targets.checkpoint import checkpoint
from steer_bake.unbake import unbake
from steer_bake.validate import validate

from . import zoo

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

#: (model type, overrides of the tiny config, the class of the output)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "llama"),
    "llama with biases": ("llama", {"mlp_bias": True}, "llama"),
    "qwen2": ("qwen2", {}, "llama"),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}, "llama"),
    "qwen3": ("qwen3", {}, "hy_v3"),
    "mistral": ("mistral", {"sliding_window": None}, "llama"),
    "mistral with a window": ("mistral", {"sliding_window": 8}, "granite_swa"),
    "gemma": ("gemma", {}, "granite"),
    "granite": ("granite", {"residual_multiplier": 0.3}, "granite"),
    "gpt2": ("gpt2", {}, "gpt2"),
    "gpt_neox": ("gpt_neox", {}, "gpt_neox"),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}, "gpt_neox"),
    "opt": ("opt", {}, "opt"),
    "starcoder2": ("starcoder2", {}, "starcoder2"),
    "phi": ("phi", {}, "phi"),
    "gptj": ("gptj", {}, "gptj"),
    "falcon": ("falcon", {}, "falcon"),
    "deepseek_v2": ("deepseek_v2", {}, "deepseek_v2"),
    "dots1": ("dots1", {"layer_types": ["full_attention"] * zoo.LAYERS, "norm_topk_prob": True}, "hy_v3"),
    "phi3": ("phi3", {"sliding_window": None}, "llama"),
    "phi3 tied, with half of each head turned": (
        "phi3",
        {"sliding_window": None, "tie_word_embeddings": True, "rope_parameters": PARTIAL},
        "llama",
    ),
    "phi3 with a window": ("phi3", {"sliding_window": 8}, "granite_swa"),
    "glm": ("glm", {}, "llama"),
    "ernie4_5 with biases": ("ernie4_5", {"use_bias": True}, "ernie4_5"),
    "mixtral": ("mixtral", {"sliding_window": None}, "ernie4_5_moe"),
}
every_case = pytest.mark.parametrize(("model_type", "overrides", "host"), CASES.values(), ids=CASES)


def random(seed: int) -> torch.Tensor:
    return unit(torch.randn(zoo.WIDTH, generator=torch.Generator().manual_seed(seed)))[0]


def rows() -> list[list[int]]:
    """Two prompts, the second of which is padded on the left."""
    tokens = zoo.ids(24, batch=2)
    return [tokens[0].tolist(), tokens[1, 5:].tolist()]


def read(model: PreTrainedModel, layer: int) -> torch.Tensor:
    """What the MLP of a layer reads, [tokens, d], found without the code under test."""
    found: list[torch.Tensor] = []
    module = layout(model.config).reader(model, layer)
    handle = module.register_forward_pre_hook(lambda _module, args: found.append(args[0].reshape(-1, zoo.WIDTH)))
    with torch.no_grad():
        model(input_ids=torch.tensor([rows()[0]]))
    handle.remove()
    return found[0].float()


def gate(model: PreTrainedModel, layer: int, seed: int = 0, **numbers: Any) -> Gate:
    """Open for about half of the tokens, with many of them on the ramp."""
    logits = 4 * read(model, layer) @ random(seed)
    scale = float(logits.std())
    numbers = {"threshold": float(logits.median()), "width": scale} | numbers
    return Gate(Site("mlp_in", layer), 4 * random(seed), **numbers)


def gated(model: PreTrainedModel, layer: int, length: float = 4.0, seed: int = 0, **numbers: Any) -> Intervention:
    return adding(f"resid_post.{layer}", length, seed + 50, gate(model, layer, seed, **numbers))


def adding(site: str, length: float, seed: int, when: Gate | None = None) -> Intervention:
    return replace(intervene("add", Direction(random(seed), None), Site.named(site), length, "unit"), gate=when)


def several(model: PreTrainedModel) -> list[Intervention]:
    """Two gates in one layer, a two-sided one in another, and a vector that is always added."""
    return [
        gated(model, 1),
        gated(model, 1, 3.0, 1),
        adding("mlp_out.2", 3.0, 52, gate(model, 2, 2, otherwise=-2.0 * random(7))),
        adding("resid_post.0", 1.0, 60),
    ]


def bake(folder: Path, out: Path, wanted: list[Intervention], **options: Any) -> Path:
    base = Checkpoint.open(folder)
    return checkpoint(make_plan(base, wanted, **options), base, ModelRef("tiny", folder), out)


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    model, problems = reload_worker.load_strict(str(folder), dtype)
    assert problems == []
    return model


def openings(model: PreTrainedModel, wanted: list[Intervention]) -> list[torch.Tensor]:
    real = reload_worker.pad(rows(), zoo.PAD)[1].bool().flatten()
    with steer(model, wanted), watch(model, [one.gate for one in wanted if one.gate]) as seen:
        reload_worker.logits(model, rows(), zoo.PAD)
    return [found[0][real] for found in seen]


def gap(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference - other).abs().max() / reference.std())


# --- bake equals hooks


@every_case
def test_a_gated_bake_equals_its_gated_hooks(
    model_type: str, overrides: dict[str, Any], host: str, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path / "base", **overrides)
    model = load(tmp_path / "base")
    wanted = several(model)
    baked = load(bake(tmp_path / "base", tmp_path / "out", wanted))
    assert baked.config.model_type == host
    plain = reload_worker.logits(model, rows(), zoo.PAD)
    with steer(model, wanted):
        hooked = reload_worker.logits(model, rows(), zoo.PAD)
        decoded = reload_worker.greedy(model, rows(), zoo.PAD, 12)
    assert gap(hooked, reload_worker.logits(baked, rows(), zoo.PAD)) <= CONSTANTS_TOLERANCE
    assert torch.equal(decoded, reload_worker.greedy(baked, rows(), zoo.PAD, 12))
    assert gap(hooked, plain) > 0.1
    for found in openings(model, wanted):
        assert (found > 0.95).any(), "open for some tokens"
        assert (found < 0.05).any(), "closed for others"
        assert ((found > 0.2) & (found < 0.8)).any(), "and in between for some"
    ungated = [replace(one, gate=None) for one in wanted]
    with steer(model, ungated):
        assert gap(hooked, reload_worker.logits(model, rows(), zoo.PAD)) > 0.05


EXACT = (
    "llama", "qwen2", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "starcoder2", "gemma", "deepseek_v2", "mixtral"
)  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_a_gated_bfloat16_file_is_as_near_to_the_hooks_as_bfloat16_hooks_are(case: str, tmp_path: Path) -> None:
    model_type, overrides, _ = CASES[case]
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, **overrides)
    model = load(tmp_path / "base")
    wanted = several(model)
    baked = load(bake(tmp_path / "base", tmp_path / "out", wanted), "bfloat16")
    many = [row for seed in range(4) for row in zoo.ids(24, batch=6, seed=seed).tolist()]
    with steer(model, wanted):
        hooked = reload_worker.logits(model, many, zoo.PAD)
    rounded = load(tmp_path / "base", "bfloat16")
    with steer(rounded, wanted):
        floor = distance(hooked, reload_worker.logits(rounded, many, zoo.PAD))
    assert distance(hooked, reload_worker.logits(baked, many, zoo.PAD)) <= NOISE_MARGIN * floor


def distance(reference: torch.Tensor, other: torch.Tensor) -> float:
    found = Distance()
    found.update(reference, other)
    return found.gap().kl


@pytest.mark.parametrize("case", ["qwen2", "gpt2"])
def test_the_certificate_of_a_gated_bfloat16_file_passes(case: str, tmp_path: Path) -> None:
    model_type, overrides, _ = CASES[case]
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, **overrides)
    wanted = several(load(tmp_path / "base"))
    out = bake(tmp_path / "base", tmp_path / "out", wanted)
    many = zoo.ids(24, batch=6).tolist()
    report = validate(out, tmp_path / "base", manifest.read(out).interventions, many, pad_id=zoo.PAD, decode_tokens=6)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert [one["gate"]["site"] for one in report.gates] == ["mlp_in.1", "mlp_in.1", "mlp_in.2"]
    assert all(0 < one["open"] < one["tokens"] for one in report.gates)


def test_a_projection_behind_a_gate_takes_its_share_of_what_the_gate_adds(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "base")
    model = load(tmp_path / "base")
    ablated = intervene("ablate", Direction(random(52), None), Site("mlp_out", 1), 1.0)
    wanted = [adding("mlp_out.1", 4.0, 50, gate(model, 1)), ablated, intervene_everywhere(53)]
    baked = load(bake(tmp_path / "base", tmp_path / "out", wanted))
    with steer(model, wanted):
        hooked = reload_worker.logits(model, rows(), zoo.PAD)
    assert gap(hooked, reload_worker.logits(baked, rows(), zoo.PAD)) <= 5e-5
    other_way = [ablated, wanted[0], wanted[2]]
    with steer(model, other_way):
        assert gap(hooked, reload_worker.logits(model, rows(), zoo.PAD)) > 1e-3


def test_the_stream_is_held_to_an_ablation_unless_a_gate_adds_along_it(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    base = Checkpoint.open(tmp_path)
    ablated = intervene_everywhere(53)
    across = random(60) - (random(60) @ random(53)) * random(53)
    one = Gate(Site("mlp_in", 1), random(0), 0.0)
    for vector, held in ((across, True), (random(60), False)):
        added = intervene("add", Direction(unit(vector)[0], None), Site("resid_post", 1), 2.0, "unit")
        plan = make_plan(base, [ablated, replace(added, gate=one)])
        along, probes = stream_probes(plan, layout(base.config))
        assert bool(probes) == held == (along.shape[1] == 1)


def intervene_everywhere(seed: int) -> Intervention:
    return intervene("ablate", Direction(random(seed), None), Site("writes"), 1.0)


def test_a_gate_and_an_inserted_layer_go_together(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "base")
    model = load(tmp_path / "base")
    wanted = [gated(model, 2), adding("resid_post.1", 3.0, 60)]
    out = bake(tmp_path / "base", tmp_path / "out", wanted, prefer="bit_exact")
    baked = load(out)
    assert len(baked.model.layers) == zoo.LAYERS + 1
    with steer(model, wanted):
        hooked = reload_worker.logits(model, rows(), zoo.PAD)
    assert gap(hooked, reload_worker.logits(baked, rows(), zoo.PAD)) <= CONSTANTS_TOLERANCE


def test_a_gate_that_is_wide_open_is_the_constant(tmp_path: Path) -> None:
    zoo.save("opt", tmp_path)
    model = load(tmp_path)
    everywhere = gated(model, 1, threshold=-1e3, width=100.0)
    with steer(model, [everywhere]):
        hooked = reload_worker.logits(model, rows(), zoo.PAD)
    with steer(model, [replace(everywhere, gate=None)]):
        assert gap(hooked, reload_worker.logits(model, rows(), zoo.PAD)) <= CONSTANTS_TOLERANCE


# --- the ramp


@pytest.mark.parametrize("activation", RAMPS)
def test_a_ramp_is_half_open_at_its_threshold_and_saturates(activation: str) -> None:
    probe = torch.tensor([1.0, 0.0])
    one = Gate(Site("mlp_in", 0), probe, threshold=3.0, width=2.0)
    at = torch.tensor([-50.0, one.held_threshold, 50.0])
    found = one.opening(torch.stack([at, torch.zeros(3)], dim=1), activation)
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 1.0]), atol=2e-3)
    dense = torch.linspace(-20, 20, 4001)
    ramp = one.opening(torch.stack([dense, torch.zeros(4001)], dim=1), activation)
    assert float(ramp.min()) > -0.31 / one.sharpness
    assert float(ramp.max()) < 1 + 0.31 / one.sharpness
    if activation == "relu":
        assert float(ramp[dense <= 2].abs().max()) == 0.0
        assert torch.allclose(ramp[dense >= 4.01], torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.37, -5.1234, 17.77, -203.4])
def test_the_threshold_is_held_so_that_bfloat16_keeps_the_ramp(threshold: float) -> None:
    one = Gate(Site("mlp_in", 0), torch.ones(4), threshold, width=2.0)
    biases = one.neurons(torch.ones(4), "silu").biases
    assert torch.equal(biases.bfloat16().float(), biases)
    assert float(biases[0] - biases[1]) == one.sharpness
    assert math.isclose(one.held_threshold, threshold, rel_tol=2**-7, abs_tol=0.01)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"site": Site("resid_post", 1)}, "mlp_in"),
        ({"sharpness": 6.0}, "power of two"),
        ({"width": 0.0}, "width"),
        ({"threshold": math.nan}, "threshold"),
        ({"threshold": 1e6}, "wider"),
        ({"probe": torch.zeros(4)}, "zero"),
        ({"otherwise": torch.ones(5)}, "one length"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_makes_no_gate_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        replace(Gate(Site("mlp_in", 1), torch.ones(4), 0.0), **change)


def test_a_gate_opens_only_what_its_own_mlp_writes() -> None:
    one = Gate(Site("mlp_in", 1), torch.ones(zoo.WIDTH), 0.0)
    for site in ("resid_post.2", "attn_out.1", "resid_pre.1"):
        with pytest.raises(RecipeError, match="the same MLP writes"):
            adding(site, 1.0, 0, one)
    with pytest.raises(RecipeError, match="projects"):
        replace(intervene("ablate", Direction(random(0), None), Site("mlp_out", 1)), gate=one)
    with pytest.raises(RecipeError, match="read by gates"):
        adding("mlp_in.1", 1.0, 0)


# --- the plan and the files


def test_every_layer_is_padded_alike_with_zeros(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "base")
    wanted = [gated(load(tmp_path / "base"), 1)]
    out = Checkpoint.open(bake(tmp_path / "base", tmp_path / "out", wanted))
    base = Checkpoint.open(tmp_path / "base")
    assert out.config["intermediate_size"] == 192
    for layer in range(zoo.LAYERS):
        mlp = f"model.layers.{layer}.mlp"
        for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            old, new = base.read(f"{mlp}.{name}.weight"), out.read(f"{mlp}.{name}.weight")
            assert torch.equal(new.narrow(axis, 0, 160), old)
            full = 2 if layer == 1 and name != "up_proj" else 0
            assert int(new.narrow(axis, 160, 32).any(1 - axis).sum()) == full
        assert int(out.read(f"{mlp}.up_proj.bias").sum()) == (2 if layer == 1 else 0)
        assert not out.read(f"{mlp}.down_proj.bias").any()


def test_the_number_of_neurons_is_a_multiple_of_what_was_asked_for(tmp_path: Path) -> None:
    zoo.save("gpt2", tmp_path / "base")
    wanted = [gated(load(tmp_path / "base"), 1), gated(load(tmp_path / "base"), 1, seed=3)]
    base = Checkpoint.open(tmp_path / "base")
    assert make_plan(base, wanted).config_changes == {"n_inner": 192}
    assert make_plan(base, wanted, pad_to=1).config_changes == {"n_inner": 164}
    assert make_plan(base, wanted, pad_to=128).config_changes == {"n_inner": 256}
    out = bake(tmp_path / "base", tmp_path / "out", wanted, pad_to=1)  # audited when the test is over
    assert manifest.read(out).pad_to == 1
    with pytest.raises(RecipeError, match="multiple"):
        make_plan(base, wanted, pad_to=0)


def test_the_plan_is_a_constant_and_says_what_holds_the_gate(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    plan = make_plan(Checkpoint.open(tmp_path), several(load(tmp_path)))
    assert plan.is_constant
    [row] = [one for one in plan.decisions if one.part == "gates"]
    assert (row.write, row.representation) == ("mlp.1, mlp.2", "neurons")
    assert "6 neurons" in row.note
    described = plan.as_json()["interventions"]
    assert [one.get("gate", {}).get("site") for one in described] == [None, "mlp_in.1", "mlp_in.1", "mlp_in.2"]
    # the constant of the two-sided gate takes the bias that is opened anyway, at no further cost
    [constant] = [one for one in plan.decisions if one.write == "mlp.2" and one.part == "shift"]
    assert (constant.representation, constant.parameters) == ("bias", 0)


def test_the_manifest_gives_the_gates_back(tmp_path: Path) -> None:
    zoo.save("qwen2", tmp_path / "base", dtype=torch.bfloat16)
    wanted = several(load(tmp_path / "base"))
    out = bake(tmp_path / "base", tmp_path / "out", wanted)
    found = [one for one in manifest.read(out).interventions if one.gate]
    for before, after in zip([one.gate for one in wanted if one.gate], [one.gate for one in found], strict=True):
        assert before is not None
        assert after is not None
        assert before.described() == after.described()
        assert torch.equal(before.probe, after.probe)


UNDONE_ALONE = {
    "llama": True,
    "qwen2": True,
    "gpt2": True,
    "deepseek_v2": True,
    "gemma": True,
    "phi3": False,
    "mixtral": False,
}


@pytest.mark.parametrize("case", UNDONE_ALONE)
def test_a_gated_bake_is_undone_bit_for_bit_and_without_its_base_where_no_matrix_was_remade(
    case: str, tmp_path: Path
) -> None:
    model_type, overrides, _ = CASES[case]
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, **overrides)
    out = bake(tmp_path / "base", tmp_path / "out", several(load(tmp_path / "base")))
    assert manifest.read(out).originals.needs_base == (not UNDONE_ALONE[case])
    unbake(out, tmp_path / "back", None if UNDONE_ALONE[case] else Checkpoint.open(tmp_path / "base"))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


@pytest.mark.tampered
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
@pytest.mark.parametrize(
    ("tensor", "row"),
    [("gate_proj.weight", 160), ("gate_proj.weight", 191), ("up_proj.bias", 161), ("down_proj.weight", 0)],
    ids=["the probe", "the zeros behind it", "what multiplies it", "the vector"],
)
def test_the_audit_sees_a_neuron_that_was_changed(model_type: str, tensor: str, row: int, tmp_path: Path) -> None:
    zoo.save(model_type, tmp_path / "base", dtype=torch.bfloat16, sliding_window=None)
    out = bake(tmp_path / "base", tmp_path / "out", [gated(load(tmp_path / "base"), 1)])
    base = Checkpoint.open(tmp_path / "base")
    assert audit(out, base).passed
    name = f"model.layers.1.mlp.{tensor}"
    path = out / Checkpoint.open(out).tensors[name].file
    tensors = load_file(path)
    changed = tensors[name] if tensors[name].ndim == 1 else tensors[name][row]
    changed[row if tensors[name].ndim == 1 else -1] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    failed = {check.name: check.detail for check in audit(out, base).checks if not check.passed}
    assert name in failed["tensors"]


@pytest.mark.parametrize(
    ("model_type", "overrides", "said"),
    [
        ("gemma2", {}, "norm stands between"),
        ("mamba", {}, "no mlp write"),
        ("qwen2_moe", {}, "weighted"),
        ("mpt", {}, "no name"),
        ("nemotron", {}, "relu2"),
        ("falcon_h1", {}, "multipliers inside"),
        ("hy_v3", {}, "another name"),
        ("bitnet", {"hidden_act": "silu"}, "takes part"),
    ],
)
def test_a_model_without_room_for_a_gate_is_refused_with_the_reason(
    model_type: str, overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    zoo.save(model_type, tmp_path, **overrides)
    one = Gate(Site("mlp_in", 1), random(0), 0.0)
    with pytest.raises(NotFoldable, match=said):
        make_plan(Checkpoint.open(tmp_path), [adding("resid_post.1", 1.0, 3, one)])


def test_a_class_that_is_to_be_kept_may_have_no_room(tmp_path: Path) -> None:
    one = adding("resid_post.1", 1.0, 3, Gate(Site("mlp_in", 1), random(0), 0.0))
    for model_type, said in (("glm", "one tensor"), ("qwen2", "needs a bias"), ("mixtral", "weighted")):
        zoo.save(model_type, tmp_path / model_type)
        with pytest.raises(NotFoldable, match=said):
            make_plan(Checkpoint.open(tmp_path / model_type), [one], "keep_class")


@pytest.mark.parametrize("target", ["lora", "gguf-vector"])
def test_what_goes_beside_the_model_holds_no_gate(target: str, tmp_path: Path) -> None:
    zoo.save("llama", tmp_path)
    one = adding("resid_post.1", 1.0, 3, Gate(Site("mlp_in", 1), random(0), 0.0))
    with pytest.raises(NotFoldable, match="has a gate, which is further neurons"):
        make_plan(Checkpoint.open(tmp_path), [one], target=target)


def test_an_expert_that_the_other_class_adds_holds_the_gates_and_grows_only_where_they_are_more(tmp_path: Path) -> None:
    zoo.save("mixtral", tmp_path, sliding_window=None)
    base, model = Checkpoint.open(tmp_path), load(tmp_path)
    assert make_plan(base, [gated(model, 1)]).config_changes["moe_num_shared_experts"] == 1
    many = [gated(model, 1, seed=seed) for seed in range(81)]
    assert make_plan(base, many).config_changes["moe_num_shared_experts"] == 2


@pytest.mark.tampered
def test_the_certificate_fails_where_a_gate_never_opens(tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "base")
    wanted = [gated(load(tmp_path / "base"), 1, threshold=500.0, width=50.0), adding("resid_post.0", 1.0, 60)]
    out = bake(tmp_path / "base", tmp_path / "out", wanted)
    report = validate(out, tmp_path / "base", wanted, rows(), pad_id=zoo.PAD, decode_tokens=4)
    assert [check.name for check in report.checks if not check.passed] == ["gates"]


@pytest.mark.tampered
@pytest.mark.parametrize("tensor", ["gate_proj.bias", "up_proj.bias"])
def test_the_certificate_sees_a_neuron_that_was_changed(tensor: str, tmp_path: Path) -> None:
    zoo.save("llama", tmp_path / "base")
    wanted = [gated(load(tmp_path / "base"), 1)]
    out = bake(tmp_path / "base", tmp_path / "out", wanted)
    name = f"model.layers.1.mlp.{tensor}"
    path = out / Checkpoint.open(out).tensors[name].file
    tensors = load_file(path)
    tensors[name][160] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    report = validate(out, tmp_path / "base", wanted, rows(), pad_id=zoo.PAD, decode_tokens=4)
    failed = {check.name for check in report.checks if not check.passed}
    assert {"tensors", "function, constants (float32)"} <= failed


def test_dense_and_sparse_layers_grow_by_numbers_of_their_own(tmp_path: Path) -> None:
    zoo.save("deepseek_v2", tmp_path / "base")
    model = load(tmp_path / "base")
    wanted = [gated(model, 0), gated(model, 2)]
    out = bake(tmp_path / "base", tmp_path / "out", wanted)
    config = Checkpoint.open(out).config
    assert (config["intermediate_size"], config["n_shared_experts"]) == (192, 2)
    with steer(model, wanted):
        hooked = reload_worker.logits(model, rows(), zoo.PAD)
    assert gap(hooked, reload_worker.logits(load(out), rows(), zoo.PAD)) <= CONSTANTS_TOLERANCE
