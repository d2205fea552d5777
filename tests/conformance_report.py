"""What the conformance matrix gave, as the stored JSON and as docs/architectures.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import zoo
from .conformance import CELLS, Outcome

ROOT = Path(__file__).resolve().parent.parent
STORED, DOCUMENT = ROOT / "docs/conformance.json", ROOT / "docs/architectures.md"

#: Of one type: per variant ("tied", "untied") and cell {"exact": [...], "gap": ...} or {"refused": ...}.
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]


def as_json(found: Mapping[str, Mapping[str, Outcome]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {cell: outcome.as_json() for cell, outcome in cells.items()} for name, cells in found.items()}


def kind(outcome: Mapping[str, Any]) -> str:
    """How a cell is held, or that it is not: what must not change unnoticed."""
    if "exact" in outcome:
        return " + ".join(outcome["exact"])
    return "refused" if "refused" in outcome else "FAILED"


def line(model_type: str, cells: Cells) -> str:
    return f"{model_type:24} " + " | ".join(
        f"{name}: " + ", ".join(kind(outcome) for outcome in outcomes.values()) for name, outcomes in cells.items()
    )


def write(found: Mapping[str, Cells]) -> None:
    rows = (f"  {json.dumps(name)}: {json.dumps(cells)}" for name, cells in sorted(found.items()))
    STORED.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    DOCUMENT.write_text(document(found))


def stored() -> dict[str, Cells]:
    found: dict[str, Cells] = json.loads(STORED.read_text())
    return found


def holds(cells: Cells, cell: str) -> bool:
    """Whether every variant of a type holds ``cell`` exactly."""
    return all("exact" in outcomes[cell] for outcomes in cells.values())


def document(found: Mapping[str, Cells]) -> str:
    """docs/architectures.md."""
    return ""
