"""Complete or not at all: whatever ends a bake, no path looks finished that is not, and the base keeps its bytes.

Run as a program this file is the victim: it imports once, then forks one bake after another for the tests to kill.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steer_bake.affine import Affine
from steer_bake.checkpoint import Appended, Checkpoint, Edit, Rows, publish, write_edited
from steer_bake.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent
D, ROWS, SHARDS = 64, 4000, 3


def make_base(folder: Path) -> Path:
    """Three shards of half a megabyte: enough for a bake to have a middle."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for index in range(SHARDS):
        file = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file({f"layers.{index}.w": torch.randn(D, ROWS, generator=generator).bfloat16()}, folder / file)
        weight_map[f"layers.{index}.w"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"num_hidden_layers": 3}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def bake(
    kind: str,
    base_folder: Path,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> None:
    """One bake of each kind: new tensors, edited ones, longer ones, parts of old ones, renamed ones."""
    base = Checkpoint.open(base_folder)
    column = torch.ones(D, 1) / D**0.5
    none = torch.zeros(D, 0)
    rename: dict[str, str] = {}
    drop: list[str] = []
    if kind == "additive":
        edits = [Edit(f"layers.{index}.b", (D,), "BF16", Affine(none, none, torch.ones(D))) for index in range(SHARDS)]
    elif kind == "ablation":
        affine = Affine(-column, column, torch.zeros(D))
        edits = [Edit(name, (D, ROWS), "BF16", affine, 0, name) for name in base.tensors]
    elif kind == "neurons":
        more, none = Appended(torch.ones(D, 64), 1), Affine.identity(D)
        edits = [Edit(name, (D, ROWS + 64), "BF16", none, 0, name, more) for name in base.tensors]
    elif kind == "parts":
        drop, whole = list(base.tensors), Affine.identity(ROWS)
        rows = {"top": Rows(0, D // 2), "bottom": Rows(D // 2, D, (1, 3, 0, 2))}
        edits = [
            Edit(f"{name}.{part}", (D // 2, ROWS), "BF16", whole, 1, name, rows=rows[part])
            for name in drop
            for part in rows
        ]
    else:
        rename = {"layers.1.w": "layers.2.w", "layers.2.w": "layers.3.w"}
        edits = [Edit("layers.1.w", (D, ROWS), "BF16", Affine.identity(D))]
    with publish(out, overwrite=overwrite) as folder:
        write_edited(base, edits, folder, config_changes={"kind": kind}, rename=rename, drop=drop, progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def kill_bakes(place: Path, count: int, seed: int) -> list[int]:
    """Kill ``count`` bakes of ``place/base`` at random moments; [not complete, complete]. The victim's side."""
    torch.set_num_threads(1)
    chance, tally = random.Random(seed), [0, 0]
    base, out, before = place / "base", place / "out", state(place / "base")
    kinds = ("additive", "ablation", "neurons", "parts", "growing")
    expected, seconds = {}, {}
    for kind in kinds:
        began = time.perf_counter()
        run(partial(bake, kind, base, place / kind), None)
        seconds[kind] = time.perf_counter() - began
        expected[kind] = contents(place / kind)
    for trial in range(count):
        kind, overwrite = kinds[trial % len(kinds)], trial // len(kinds) % 2 == 1
        if not overwrite:
            shutil.rmtree(out, ignore_errors=True)
        allowed = [expected[kind], contents(out) if overwrite else None]
        job = partial(bake, kind, base, out, overwrite=overwrite)
        run(job, chance.random() * 1.1 * seconds[kind])
        assert state(base) == before, "the base changed"
        found = contents(out) if out.exists() else None
        assert found is None or found in allowed, f"trial {trial}: {kind} looks finished but is not"
        tally[found == expected[kind]] += 1
        if found is not None and not overwrite:
            shutil.rmtree(out)
        run(job, None)
        assert contents(out) == expected[kind], f"trial {trial}: the run after the kill did not complete"
        assert {path.name for path in place.iterdir()} == {"base", "out", *kinds}, "something was left behind"
    return tally


def run(job: Callable[[], None], kill_after: float | None) -> None:
    """Run ``job`` in a fork; kill it -9 after some seconds, or let it end and insist on success."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert kill_after is not None or status == 0


def victim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.test_checkpoint_crash", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False)


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_bakes_leave_nothing_that_looks_finished(base: Path, tmp_path: Path, count: int) -> None:
    done = victim("kill", str(tmp_path), str(count))
    assert done.returncode == 0, done.stderr
    killed, complete = json.loads(done.stdout)
    assert killed + complete == count
    assert killed > count // 5, "the moments were not spread over the bake"


def test_a_file_that_may_not_grow_becomes_a_sentence(base: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel refuses the write in the middle, as a full disk does."""
    before = state(base)
    done = victim("limited", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout
    assert "bytes are needed" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    assert state(base) == before


def test_a_full_disk_becomes_a_sentence(base: Path, tmp_path: Path) -> None:
    """A real file system of two megabytes, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("this system gives no user namespaces; the test with RLIMIT_FSIZE covers the same path")
    script = 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -m tests.test_checkpoint_crash full "$3" "$1"'
    command = [*namespace, "sh", "-c", script, "sh", str(disk), sys.executable, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    early, late = done.stdout.splitlines()
    assert "make room" in early
    assert "the disk is full" in late
    assert "are free" in late


def test_a_place_that_cannot_be_written_becomes_a_sentence(base: Path) -> None:
    for out in (Path("/proc/steer"), Path("/sys/kernel/steer"), base / "config.json" / "out"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            bake("additive", base, out)


def test_an_interrupt_cleans_up_and_goes_on(base: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake("ablation", base, tmp_path / "out", progress=interrupt)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_an_output_that_exists_is_not_touched(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    bake("additive", base, out)  # an empty folder is as good as none
    before = state(out)
    with pytest.raises(CheckpointError, match="not empty"):
        bake("ablation", base, out)
    assert state(out) == before
    bake("ablation", base, out, overwrite=True)
    assert state(out) != before
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_overwriting_takes_only_models(base: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").touch()
    for out in (home, home / "thesis.tex"):
        with pytest.raises(CheckpointError):
            bake("additive", base, out, overwrite=True)
    assert (home / "thesis.tex").exists()


def test_leftovers_go_only_when_their_process_is_dead(base: Path, tmp_path: Path) -> None:
    with publish(tmp_path / "probe") as hidden:
        stamp = hidden.name.removeprefix(".probe.baking-").rpartition("-")[0]
    shutil.rmtree(tmp_path / "probe")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f".out.baking-{stamp}-{dead.pid}": False,
        f".out.baking-{stamp}-{os.getppid()}": True,  # alive
        f".out.baking-elsewhere-{dead.pid}": True,  # another machine on the same disk
        f".other.baking-{stamp}-{dead.pid}": True,  # another output
        ".out.baking": True,
    }
    for name in names:
        (tmp_path / name).mkdir()
    bake("additive", base, tmp_path / "out")
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_an_old_folder_that_had_stepped_aside_comes_back(base: Path, tmp_path: Path) -> None:
    """Killed between the two renames of an overwrite: the old output is restored before anything else."""
    out = tmp_path / "out"
    with publish(out) as hidden:
        stamp = hidden.name.removeprefix(".out.baking-").rpartition("-")[0]
        (hidden / "config.json").write_text("old")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    out.rename(tmp_path / f".out.replaced-{stamp}-{dead.pid}")
    with pytest.raises(CheckpointError, match="not empty"):
        bake("additive", base, out)
    assert (out / "config.json").read_text() == "old"


def limited(place: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    try:
        bake("ablation", place / "base", place / "out")
    except CheckpointError as error:
        sys.stdout.write(f"{error}\n")


def full(place: Path, disk: Path) -> None:
    """A bake that clearly does not fit; then one for which the bytes are enough but the blocks are not."""
    base = place / "base"
    needed = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    for room in (needed // 2, -(-needed // 4096) * 4096):  # three shards end inside a block each
        (disk / "hog").write_bytes(bytes(shutil.disk_usage(disk).free - room))
        try:
            bake("ablation", base, disk / "out")
        except CheckpointError as error:
            sys.stdout.write(f"{error}\n")
        (disk / "hog").unlink()
        assert not any(disk.iterdir())


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    if what == "kill":
        sys.stdout.write(json.dumps(kill_bakes(Path(where), int(rest[0]), seed=int(rest[0]))))
    elif what == "limited":
        limited(Path(where))
    else:
        full(Path(where), Path(rest[0]))
