"""steer-bake: activation steering, turned into ordinary model weights.

    from steer_bake import Site, bake, direction, intervene, steer

    vector = direction.load("v.safetensors")[0]
    added = intervene("add", vector, Site("resid_post", 14), 8.0)
    with steer(model, [added]):              # hooks: the reference
        ...
    bake("org/name", [added], "steered")     # files: an ordinary checkpoint

Names are loaded when they are first used, so that ``import steer_bake`` is cheap and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .direction import Direction
    from .errors import SteerBakeError
    from .gate import Gate
    from .interventions import Intervention, intervene
    from .models import resolve
    from .pipeline import bake, run
    from .plan import make_plan
    from .sites import Site
    from .steering import steer

__all__ = [
    "Direction",
    "Gate",
    "Intervention",
    "Site",
    "SteerBakeError",
    "bake",
    "intervene",
    "make_plan",
    "resolve",
    "run",
    "steer",
]

#: Where each public name lives. No name is a module's: importing a submodule would hide it.
_HOME = {
    "Direction": "direction",
    "Gate": "gate",
    "Intervention": "interventions",
    "Site": "sites",
    "SteerBakeError": "errors",
    "bake": "pipeline",
    "intervene": "interventions",
    "make_plan": "plan",
    "resolve": "models",
    "run": "pipeline",
    "steer": "steering",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
