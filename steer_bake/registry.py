"""Extension points are folders: ``<folder>/<name>.py`` defines ``<name>``, and ``ls`` is the documentation.

Out-of-tree extensions come in through entry points: the group ``steer_bake.<folder>``, an entry named like the
object it loads. Nothing is imported before it is asked for, except where a whole folder must be searched.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from .errors import RecipeError, did_you_mean

#: Every extension point.
FOLDERS = (
    "architectures", "estimators", "houses", "interventions", "judges", "probes", "representations", "targets"
)  # fmt: skip


def names(folder: str) -> list[str]:
    """The names that ``folder`` (for example ``"estimators"``) offers, sorted."""
    package = importlib.import_module(f"steer_bake.{folder}")
    found = {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")}
    found.update(entry.name for entry in entry_points(group=f"steer_bake.{folder}"))
    return sorted(found)


def identifier(name: str) -> str:
    """``name`` as its file is called: ``gguf-vector`` is ``gguf_vector.py``."""
    return name.replace("-", "_")


def module(folder: str, name: str) -> Any:
    """The module that defines ``name`` in ``folder``; hyphens and underscores are the same.

    Raises:
        RecipeError: no file and no entry point has that name; the message names the closest one.
    """
    package, name = importlib.import_module(f"steer_bake.{folder}"), identifier(name)
    if any(found.name == name for found in pkgutil.iter_modules(package.__path__)):
        return importlib.import_module(f"steer_bake.{folder}.{name}")
    for entry in entry_points(group=f"steer_bake.{folder}", name=name):
        return importlib.import_module(entry.module)
    raise RecipeError(f"{folder} has no {name!r}: {did_you_mean(name, names(folder))}")


def load(folder: str, name: str) -> Any:
    """The object ``name`` that ``<folder>/<name>.py`` defines (raises as :func:`module` does)."""
    return getattr(module(folder, name), identifier(name))


def load_all(folder: str) -> dict[str, Any]:
    """Every object of ``folder`` by name."""
    return {name: load(folder, name) for name in names(folder)}
