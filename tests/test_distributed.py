"""Scale: several processes, weights on disk, any batch size: the same directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_bake import activations, architectures, direction, distributed, gating
from steer_bake.cli import main
from steer_bake.models import Offload, load_model

from . import jobs, tiny

ESTIMATORS: dict[str, dict[str, Any]] = {
    "wrmd": {"options": {"relative": True}},
    "pca": {},
}
SITES = "resid_post.0-2"


def recipe(folder: Path, model: Path, name: str) -> Path:
    """Enough prompts that wrmd needs a d x d covariance, three lengths and scores."""
    rows = [
        {
            "text": f"{text} {'again ' * (number % 3)}{number}",
            "label": label,
            "score": (1 if label == "gloomy" else -1) * (0.2 + 0.05 * (number % 12)),
        }
        for label in ("gloomy", "cheerful")
        for number in range(tiny.WIDTH + 5)
        for text in [jobs.TRAIN[label][number % 4]]
    ]
    folder.mkdir()
    jobs.write_prompts(folder)
    jobs.write_rows(folder / "train.jsonl", rows)
    estimator = {"name": name, "positive": "gloomy", "negative": "cheerful", **ESTIMATORS[name]}
    return jobs.write_recipe(folder, model, estimator=estimator, read={"sites": SITES})


def extracted(recipe_file: Path, out: Path, *options: str | Path, processes: int = 1) -> list[direction.Direction]:
    return direction.load(launched("extract", recipe_file, out, *options, processes=processes))


def launched(verb: str, recipe_file: Path, out: Path, *options: str | Path, processes: int = 1) -> Path:
    """Run the command line as a user would, under torchrun where several processes are asked for."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "steer_bake"]
    done = subprocess.run(
        [*command, verb, str(recipe_file), "-o", str(out), "--device", "cpu", *map(str, options)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def far(one: list[direction.Direction], other: list[direction.Direction]) -> float:
    """The largest relative difference of the vectors in stream units."""
    assert [each.site for each in one] == [each.site for each in other]
    return max(
        float((left.vector * left.scale - right.vector * right.scale).norm()) / left.scale
        for left, right in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_two_processes_give_the_directions_of_one(llama: Path, tmp_path: Path, name: str) -> None:
    file = recipe(tmp_path / "job", llama, name)
    alone = extracted(file, tmp_path / "one.safetensors")
    both = extracted(file, tmp_path / "two.safetensors", processes=2)
    assert 0 <= far(alone, both) <= 1e-5
    assert [one.stream_norm for one in alone] == pytest.approx([one.stream_norm for one in both], rel=1e-6)


def test_two_processes_fit_the_gates_of_one(llama: Path, tmp_path: Path) -> None:
    """Each answers and reads its share of the prompts."""
    words = [text.split()[0].lower() for texts in jobs.TRAIN.values() for text in texts]
    rows = [{"text": text, "label": "quiet"} for text in words] + [
        {"text": text.upper(), "label": "loud"} for text in words
    ]
    jobs.write_prompts(tmp_path)
    jobs.write_rows(tmp_path / "train.jsonl", rows)
    gate = {"positive": "loud", "negative": "quiet", "probe": "lda", "generated": 2}
    file = jobs.write_recipe(
        tmp_path, llama, estimator={"positive": "loud", "negative": "quiet"},
        intervention={"name": "add", "sites": "resid_post.1-2", "gate": gate},
    )  # fmt: skip
    alone, both = (
        gating.load(launched("probe", file, tmp_path / f"{count}.safetensors", processes=count)) for count in (1, 2)
    )
    assert [one.gate.site for one in alone] == [one.gate.site for one in both]
    for one, other in zip(alone, both, strict=True):
        assert torch.allclose(one.gate.probe, other.gate.probe, rtol=1e-4, atol=1e-6)
        assert one.gate.threshold == pytest.approx(other.gate.threshold, rel=1e-4, abs=1e-5)
        assert one.measures["auroc"] == pytest.approx(other.measures["auroc"])
        assert one.measures["train_tokens"] == other.measures["train_tokens"]


WORKER = """
import json, sys
from pathlib import Path
from steer_bake import activations, architectures, distributed
from steer_bake.models import load_model
from steer_bake.prompts import Prompt, encode
from steer_bake.models import load_tokenizer
from steer_bake.sites import Site

folder, out = map(Path, sys.argv[1:])
with distributed.joined("cpu"):
    model, totals = load_model(folder, dtype="float32"), []
    encoded = encode(load_tokenizer(folder), [Prompt((("user", f"Count to {n}."),)) for n in range(9)])
    site = Site("resid_post", 1)
    found = activations.collect(
        model, architectures.layout(model.config), encoded, ["a"] * 9, [site], rows=True,
        progress=lambda done, total: totals.append(total),
    )[site]["a"]
    rank = distributed.rank()
    (out / f"{rank}.json").write_text(json.dumps({"prompts": totals[-1], "rows": found.rows.tolist()}))
"""


def test_each_process_runs_its_own_prompts_and_knows_the_rows_of_all(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "worker.py"), str(llama), str(tmp_path)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert [one["prompts"] for one in found] == [5, 4], "neither process ran all nine"
    assert found[0]["rows"] == found[1]["rows"]
    rows = torch.tensor(found[0]["rows"])
    assert rows.shape == (9, tiny.WIDTH)
    assert all(bool(row.any()) for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) == 9


def test_each_process_reads_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not everything twice: the shares of any number of processes are a partition."""
    for size in (1, 2, 3, 7):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda size=size: size)
        shares = []
        for rank in range(size):
            monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
            shares.append(distributed.share(10))
        assert sorted(index for share in shares for index in share) == list(range(10))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_run_under_torchrun_says_what_to_do_instead(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(main, ["run", str(jobs.write_recipe(tmp_path, llama)), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "start only 'extract' under torchrun" in result.stderr
    assert not (tmp_path / "out").exists()


def test_weights_on_disk_give_the_directions_of_weights_in_memory(tied_llama: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path / "job", tied_llama, "wrmd")
    plain = extracted(file, tmp_path / "one.safetensors")
    limit = "--max-memory", "cpu=100KiB"
    spread = extracted(file, tmp_path / "two.safetensors", "--offload", tmp_path / "weights", *limit)
    assert far(plain, spread) <= 1e-5


@pytest.mark.parametrize("limit", ["60KiB", "100KiB"], ids=["everything", "some layers"])
def test_a_spread_model_really_leaves_weights_on_disk(tied_llama: Path, tmp_path: Path, limit: str) -> None:
    model = load_model(tied_llama, dtype="float32", device=Offload(tmp_path / "weights", {"cpu": limit}))
    places: dict[str, Any] = model.hf_device_map  # type: ignore[assignment]
    assert "disk" in places.values()
    assert activations._where(model) == (torch.device("cpu"), True)
    on_disk = [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]
    assert on_disk
    layout = architectures.layout(model.config)
    site = architectures_site(layout.layers)
    encoded, labels = some_prompts()
    found = activations.collect(model, layout, encoded, labels, [site])[site]["a"]
    whole = load_model(tied_llama, dtype="float32")
    torch.testing.assert_close(found.mean, activations.collect(whole, layout, encoded, labels, [site])[site]["a"].mean)
    still = [name for name, tensor in model.named_parameters() if tensor.device.type == "meta"]
    assert set(on_disk) <= set(still), "what was read was forgotten again"


def architectures_site(layers: int) -> Any:
    from steer_bake.sites import Site

    return Site("resid_post", layers - 1)


def some_prompts() -> tuple[Any, list[str]]:
    from steer_bake.prompts import Prompt, encode

    asked = ["Why?", "What is rain made of?", "Tell me of the sea."]
    return encode(tiny.tokenizer(), [Prompt((("user", text),)) for text in asked]), ["a", "a", "b"]


def test_batches_and_kept_rows_do_not_change_a_covariance(llama: Path) -> None:
    """Of few prompts the rows are kept, of many the products are summed: the covariance is one and the same."""
    from steer_bake.estimators._covariance import covariance
    from steer_bake.prompts import Prompt, encode

    model = load_model(llama, dtype="float32")
    layout = architectures.layout(model.config)
    count = tiny.WIDTH + 8
    asked = [Prompt((("user", f"{'word ' * (number % 5)}{number}"),)) for number in range(count)]
    encoded, labels = encode(tiny.tokenizer(), asked), ["a"] * count
    weights = [0.1 + 0.9 * number / count for number in range(count)]
    site = architectures_site(2)
    options: dict[str, Any] = {"covariance": ["a"], "weights": weights}
    summed = activations.collect(model, layout, encoded, labels, [site], **options)[site]["a"]
    small = activations.collect(model, layout, encoded, labels, [site], tokens_per_batch=40, **options)[site]["a"]
    kept = activations.collect(model, layout, encoded, labels, [site], rows=True, **options)[site]["a"]
    assert summed.rows is None
    assert summed.covariance is not None
    assert kept.covariance is None
    size = summed.covariance.norm()
    assert float((summed.covariance - covariance(kept)).norm() / size) < 1e-6
    assert float((small.covariance - summed.covariance).norm() / size) < 1e-5  # type: ignore[operator]
    torch.testing.assert_close(summed.centre, kept.centre)
    few = activations.collect(model, layout, encoded[:5], labels[:5], [site], covariance=["a"])[site]["a"]
    assert few.covariance is None
    assert few.rows is not None, "five rows are smaller than d x d"
