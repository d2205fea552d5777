"""Extension points are folders: ``<folder>/<name>.py`` defines ``<name>``, and ``ls`` is the documentation.

Out-of-tree extensions come in through entry points: the group ``steer_bake.<folder>``, an entry named like the
object it loads. Nothing is imported before it is asked for, except where a whole folder must be searched.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from .errors import RecipeError, did_you_mean

#: Every extension point.
FOLDERS = (
    "architectures", "estimators", "houses", "interventions", "judges", "probes", "representations", "targets"
)  # fmt: skip


def _modules(folder: str) -> dict[str, str]:
    """Module path by name; a file goes before an entry point of its name."""
    return _found(folder, tuple(importlib.import_module(f"steer_bake.{folder}").__path__))


@functools.cache  # reading what every installed package offers takes 20 ms, and a plan asks hundreds of times
def _found(folder: str, where: tuple[str, ...]) -> dict[str, str]:
    """Of a package that looks for its modules in ``where``: a program may append a folder of its own."""
    found = {entry.name: entry.module for entry in entry_points(group=f"steer_bake.{folder}")}
    own = [one.name for one in pkgutil.iter_modules(where) if not one.name.startswith("_")]
    return found | {name: f"steer_bake.{folder}.{name}" for name in own}


def names(folder: str) -> list[str]:
    """The names that ``folder`` (for example ``"estimators"``) offers, sorted."""
    return sorted(_modules(folder))


def identifier(name: str) -> str:
    """``name`` as its file is called: ``gguf-vector`` is ``gguf_vector.py``."""
    return name.replace("-", "_")


def module(folder: str, name: str) -> Any:
    """The module that defines ``name`` in ``folder``; hyphens and underscores are the same.

    Raises:
        RecipeError: no file and no entry point has that name; the message names the closest one.
    """
    found = _modules(folder).get(identifier(name))
    if found is None:
        raise RecipeError(f"{folder} has no {identifier(name)!r}: {did_you_mean(identifier(name), names(folder))}")
    return importlib.import_module(found)


def load(folder: str, name: str) -> Any:
    """The object ``name`` that ``<folder>/<name>.py`` defines (raises as :func:`module` does)."""
    return getattr(module(folder, name), identifier(name))


def load_all(folder: str) -> dict[str, Any]:
    """Every object of ``folder`` by name."""
    return {name: load(folder, name) for name in names(folder)}
