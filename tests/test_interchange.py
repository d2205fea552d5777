"""Vectors of other tools are read at the layer where those tools add them; nothing is ever unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import save_file

from steer_bake import direction, interchange
from steer_bake.cli import main
from steer_bake.direction import Direction, unit
from steer_bake.errors import RecipeError
from steer_bake.sites import Site

from . import jobs

VECTOR = torch.randn(8, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(8, generator=torch.Generator().manual_seed(1))


class Steering:
    """Stands for any class of another package; a file with one in it runs that package's code when it is unpickled."""

    def __init__(self) -> None:
        self.layer_activations = {3: VECTOR}


def repeng(path: Path) -> None:
    writer = GGUFWriter(path, "controlvector")  # as repeng's export_gguf does
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    writer.add_tensor("direction.3", VECTOR.numpy())
    writer.add_tensor("direction.5", OTHER.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def half_precision(path: Path) -> None:
    writer = GGUFWriter(path, "controlvector")
    writer.add_tensor("direction.3", VECTOR.numpy().astype(np.float16))
    writer.add_tensor("direction.5", OTHER.numpy().astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def steering_vectors(path: Path) -> None:
    torch.save({"layer_activations": {3: VECTOR, 5: OTHER}, "layer_type": "decoder_block"}, path)


def layers_in_safetensors(path: Path) -> None:
    save_file({"layer_3": VECTOR, "layer_5": OTHER}, path)


def hooks_in_safetensors(path: Path) -> None:
    save_file({"blocks.3.hook_resid_post": VECTOR, "blocks.5.hook_resid_post": OTHER}, path)


def table_of_layers(path: Path) -> None:
    torch.save({3: VECTOR, 5: OTHER}, path)


def arrays(path: Path) -> None:
    np.savez(path, **{"3": VECTOR.numpy(), "5": OTHER.numpy()})


@pytest.mark.parametrize(
    ("write", "ending"),
    [
        (repeng, "gguf"),
        (half_precision, "gguf"),
        (steering_vectors, "pt"),
        (table_of_layers, "pth"),
        (layers_in_safetensors, "safetensors"),
        (hooks_in_safetensors, "safetensors"),
        (arrays, "npz"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_layers_vector_is_read_at_what_that_layer_puts_out(tmp_path: Path, write: Any, ending: str) -> None:
    write(tmp_path / f"v.{ending}")
    found = {one.site: one for one in direction.load(tmp_path / f"v.{ending}")}
    assert set(found) == {Site("resid_post", 3), Site("resid_post", 5)}
    tolerance = 2e-3 if write is half_precision else 1e-6
    for layer, wanted in ((3, VECTOR), (5, OTHER)):
        one = found[Site("resid_post", layer)]
        assert torch.allclose(one.scale * one.vector, wanted, atol=tolerance)
        assert abs(float(one.vector.norm()) - 1) < 1e-6


@pytest.mark.parametrize("kind", ["self_attn", "mlp"])
def test_steering_vectors_of_a_sublayer_are_read_at_its_output(tmp_path: Path, kind: str) -> None:
    torch.save({"layer_activations": {3: VECTOR}, "layer_type": kind}, tmp_path / "v.pt")
    [found] = direction.load(tmp_path / "v.pt")
    assert found.site == Site({"self_attn": "attn_out", "mlp": "mlp_out"}[kind], 3)


def test_a_bare_vector_has_no_site(tmp_path: Path) -> None:
    np.save(tmp_path / "mood.npy", VECTOR[None].numpy())
    torch.save(VECTOR, tmp_path / "mood.pt")
    for name in ("mood.npy", "mood.pt"):
        [found] = direction.load(tmp_path / name)
        assert found.site is None
        assert torch.allclose(found.scale * found.vector, VECTOR, atol=1e-6)


def objects_in_pt(path: Path) -> None:
    torch.save(Steering(), path)


def objects_in_npy(path: Path) -> None:
    np.save(path, np.array([Steering()], dtype=object), allow_pickle=True)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"3": [1.0, 2.0]}))


def a_model(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", VECTOR.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def truncated(path: Path) -> None:
    repeng(path)
    path.write_bytes(path.read_bytes()[:-20])


def a_place_without_a_site(path: Path) -> None:
    torch.save({"layer_activations": {3: VECTOR}, "layer_type": "input_layernorm"}, path)


def a_matrix(path: Path) -> None:
    np.save(path, torch.randn(3, 8).numpy())


@pytest.mark.parametrize(
    ("write", "ending", "words"),
    [
        (objects_in_pt, "pt", "could run code and are not loaded"),
        (objects_in_npy, "npy", "no readable numpy file"),
        (plain_pickle, "bin", "neither a tensor nor a table of tensors|could run code"),
        (a_model, "gguf", "architecture 'llama'"),
        (truncated, "gguf", "no readable GGUF file"),
        (a_place_without_a_site, "pt", "'input_layernorm' have no site"),
        (a_matrix, "npy", "a vector .d. is needed"),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)[:12]),
)
def test_what_is_no_vector_is_refused_in_a_sentence(tmp_path: Path, write: Any, ending: str, words: str) -> None:
    path = tmp_path / f"v.{ending}"
    write(path)
    with pytest.raises(RecipeError, match=words):
        direction.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for ending in interchange.ENDINGS:
        with pytest.raises(RecipeError, match="is not there"):
            direction.load(tmp_path / f"v{ending}")


def test_a_control_vector_is_written_at_natural_length(tmp_path: Path) -> None:
    vector, length = unit(VECTOR)
    directions = [Direction(vector, Site("resid_post", 3), scale=length)]
    direction.save_control_vector(directions, tmp_path / "v.gguf", "llama")
    file = GGUFReader(tmp_path / "v.gguf")
    assert [one.name for one in file.tensors] == ["direction.3"]
    assert np.allclose(file.tensors[0].data, VECTOR.numpy(), atol=1e-6)
    assert file.fields["controlvector.model_hint"].contents() == "llama"
    for wrong in (Site("resid_post", 0), Site("resid_pre", 3), None):
        with pytest.raises(RecipeError, match=r"resid_post\.1 and later"):
            direction.save_control_vector([Direction(vector, wrong)], tmp_path / "w.gguf", "llama")


def test_extract_writes_a_control_vector_where_the_name_says_so(llama: Path, tmp_path: Path) -> None:
    path = jobs.write_recipe(tmp_path, llama)
    done = CliRunner().invoke(main, ["extract", str(path), "-o", str(tmp_path / "v.gguf")])
    assert done.exit_code == 0, done.output
    CliRunner().invoke(main, ["extract", str(path), "-o", str(tmp_path / "v.safetensors")])
    [ours], [theirs] = direction.load(tmp_path / "v.safetensors"), direction.load(tmp_path / "v.gguf")
    assert ours.site == theirs.site == Site("resid_post", 1)
    assert torch.allclose(ours.scale * ours.vector, theirs.scale * theirs.vector, atol=1e-6)
    again = CliRunner().invoke(main, ["extract", str(path), "-o", str(tmp_path / "v.gguf")])
    assert again.exit_code == 0, again.output  # a control vector may be replaced
