"""Where a bake loads: what it asks of a loader, against what the loaders' sources say (``runtimes.yaml``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

#: What a bake may ask of a loader beyond what the base asks; ``runtimes.yaml`` says what each of them means.
FEATURES = (
    "layers",
    "attention_output_bias",
    "attention_input_bias",
    "mlp_output_bias",
    "mlp_input_bias",
    "untied_head",
    "proportional_rope",
)


@dataclass(frozen=True)
class Entry:
    """What a runtime is known to do with one model type."""

    honours: Mapping[str, bool]  # by feature; what is not here is unknown
    source: str
    date: str


@dataclass(frozen=True)
class Runtime:
    """A program that loads checkpoints."""

    name: str
    version: str
    every: Entry | None  # where it is the same for every type
    types: Mapping[str, Entry]

    def loads(self, model_type: str, needs: Iterable[str]) -> bool | None:
        """Whether a model of this type that needs these features loads as it is meant; None where that is unknown."""
        entry = self.types.get(model_type, self.every)
        if entry is None:
            return None
        found = [entry.honours.get(need) for need in needs]
        return False if False in found else None if None in found else True


@cache
def runtimes() -> tuple[Runtime, ...]:
    """Every runtime that ``runtimes.yaml`` describes."""
    content = yaml.safe_load(files("steer_bake").joinpath("runtimes.yaml").read_text(encoding="utf-8"))
    return tuple(_runtime(name, one) for name, one in content.items())


def _runtime(name: str, content: Mapping[str, Any]) -> Runtime:
    every = _entry({**content, "honours": dict.fromkeys(FEATURES, True)}) if content.get("every_type") else None
    types = {model_type: _entry(one) for model_type, one in content.get("types", {}).items()}
    return Runtime(name, str(content.get("version", "")), every, types)


def _entry(content: Mapping[str, Any]) -> Entry:
    return Entry(dict(content["honours"]), str(content["source"]), str(content["date"]))
