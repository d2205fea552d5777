"""Imports only go down: the order of the layers is the architecture, and this is where it is written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

#: Lowest first. A module may import its own layer and those below it; a folder counts as one module.
LAYERS = (
    ("distributed", "errors", "llamacpp_worker", "registry", "reload_worker", "runtimes", "streaming"),
    ("affine", "checks", "sites"),
    ("interchange",),
    (
        "answering",
        "direction",
        "gate",
        "checkpoint",
        "models",
        "prompts",
        "rounding",
        "skeleton",
        "stages",
        "workspace",
    ),
    ("architectures", "interventions", "estimators", "judges", "probes"),
    ("arithmetic", "confidence", "depth", "wrapping"),
    ("scoring",),
    ("representations",),
    ("draft", "houses"),
    ("proof",),
    ("refusal",),
    ("activations", "steering", "plan", "recipe"),
    ("explain", "gating", "originals", "combination", "selection", "transfer"),
    ("estimation",),
    ("analysis", "configure"),
    ("manifest", "contents", "tensors", "control"),
    ("adapter",),
    ("targets", "audit"),
    ("comparison", "unbake"),
    ("validate", "evaluate"),
    ("llamacpp",),
    ("agreement", "behaviour", "damage"),
    ("baked", "figures", "fitting", "safety"),
    ("card_figures",),
    ("card",),
    ("hub",),
    ("job",),
    ("pipeline",),
    ("display",),
    ("cli",),
    ("__main__",),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
#: Run by path in a fresh process that must not know steer_bake.
STANDALONE = ("llamacpp_worker", "reload_worker", "streaming")
#: Data folders without code.
DATA = ("prompt_sets",)

PACKAGE = Path(__file__).resolve().parent.parent / "steer_bake"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def top(path: Path) -> str:
    """The module or folder of ``steer_bake/`` that a source file belongs to; ``__init__`` for the package's own."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str, package: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that a source file in ``package`` imports, anywhere in it: in functions and under conditions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            origin = [*start, *(node.module or "").split(".")] if node.module else list(start)
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def dependencies(path: Path) -> set[str]:
    """The other modules and folders of ``steer_bake/`` that ``path`` imports."""
    package = ("steer_bake", *path.relative_to(PACKAGE).parts[:-1])
    names = (name.split(".") for name in imported(path.read_text(encoding="utf-8"), package))
    found = {parts[1] for parts in names if parts[0] == "steer_bake" and len(parts) > 1}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()} - {top(path)}


def test_every_module_has_a_layer() -> None:
    there = {top(path) for path in SOURCES} - {"__init__"}
    assert there - set(RANK) - set(DATA) == set(), "put the new module into LAYERS, on purpose"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    module = top(path)
    if module == "__init__":  # the package's front door shows what it likes of everything but the command line
        assert "cli" not in dependencies(path)
    else:
        up = {name for name in dependencies(path) if RANK.get(name, len(LAYERS)) > RANK[module]}
        assert not up, f"{module} may not import {up}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        graph.setdefault(top(path), set()).update(dependencies(path))
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("module", STANDALONE)
def test_what_runs_in_a_fresh_process_does_not_know_steer_bake(module: str) -> None:
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert not [name for name in imported(source, ("steer_bake",)) if name.split(".")[0] == "steer_bake"]


def test_no_module_is_a_drawer_for_everything() -> None:
    names = {part.removesuffix(".py") for path in SOURCES for part in path.relative_to(PACKAGE).parts}
    assert not names & {"utils", "util", "common", "base", "core", "helpers", "misc"}


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
from . import alpha
from .beta import thing
import steer_bake.gamma
from steer_bake import delta
from .. import epsilon
def late():
    if True:
        from ..zeta.eta import theta
"""
    assert set(imported(source, ("steer_bake", "folder"))) == {
        "steer_bake.folder.alpha",
        "steer_bake.folder.beta.thing",
        "steer_bake.gamma",
        "steer_bake.delta",
        "steer_bake.epsilon",
        "steer_bake.zeta.eta.theta",
    }
