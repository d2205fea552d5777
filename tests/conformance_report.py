"""What the conformance matrix gave, as the stored JSON and as docs/architectures.md."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from . import zoo
from .conformance import CELLS, Outcome

ROOT = Path(__file__).resolve().parent.parent
STORED, DOCUMENT = ROOT / "docs/conformance.json", ROOT / "docs/architectures.md"

#: Of one type: per variant ("tied", "untied") and cell {"exact": [...], "gap": ...} or {"refused": ...}.
Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]

_SHORT = {"embedding_rows": "rows", "rank_one": "rank-one"}
_HEAD = """# Which model types hold what

Written by `scripts/conformance` out of `docs/conformance.json`, which it writes too. Every type that transformers maps
to a causal language model and that can be built small ({built} of {types}; `tests/zoo.py`) is built with random float32
weights, with its head tied and untied where the class honours it. Each cell plans, bakes, and reloads the folder by
plain transformers, strictly, in a process that never imports steer_bake. *Exact* means: the logits are those of the
hooks (max gap 2e-5 std, with and without left padding; the hooks move them by at least 0.3 std), greedy decoding with
cache is identical, and for `writes` the stream obeys (1e-5) on the hooked and on the reloaded model. Everything else is
refused before anything is written.

| | types that hold it exactly | marked * | refused |
|---|---|---|---|
"""
_LEGEND = """
"middle" is the layer before the middle, "all" every layer at once. A type counts as exact where all its variants are.

- `bias`: the bias of a writer that is there or that a config flag unlocks. `rows`: rows of the embedding.
  `rank-one`: edits of the writers. `carrier`, `squares`: one more decoder layer (two different ways to fill it).
- `*`: squares lack the share eps / (ms + eps) of the vector, ms being the stream's mean square there; here that is
  {share} at worst, and it accounts for the whole gap. These do not count as exact.
- `~`: the gap is more than 2e-5 std but no more than twice what the class itself makes of weights that are rounded once
  more ({noise}). These count as exact.
- `a / b`: with the head tied / untied, where they differ. A number: refused, with the reason below.

"""


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
    """The stored JSON, one line per type, each reason for a refusal once; and the document."""
    reasons = _reasons(found)
    rows = (
        f"    {json.dumps(name)}: {json.dumps(_numbered(name, cells, reasons))}"
        for name, cells in sorted(found.items())
    )
    texts = (f"    {json.dumps(reason)}" for reason in reasons)
    STORED.write_text(
        '{\n  "reasons": [\n' + ",\n".join(texts) + '\n  ],\n  "types": {\n' + ",\n".join(rows) + "\n  }\n}\n"
    )
    DOCUMENT.write_text(document(stored()))


def _numbered(model_type: str, cells: Cells, reasons: Mapping[str, int]) -> dict[str, Any]:
    return {
        name: {
            cell: {"refused": reasons[_reason(model_type, one["refused"])]} if "refused" in one else one
            for cell, one in outcomes.items()
        }
        for name, outcomes in cells.items()
    }


def stored() -> dict[str, Cells]:
    content = json.loads(STORED.read_text())
    reasons = content["reasons"]
    found: dict[str, Cells] = {
        model_type: {
            name: {
                cell: {"refused": reasons[one["refused"] - 1]} if "refused" in one else one
                for cell, one in outcomes.items()
            }
            for name, outcomes in cells.items()
        }
        for model_type, cells in content["types"].items()
    }
    return found


def short_of(outcome: Mapping[str, Any]) -> bool:
    """Whether a share of the vector is missing that can be told from rounding."""
    return outcome.get("because") == "epsilon"


def holds(cells: Cells, cell: str) -> bool:
    """Whether every variant of a type holds ``cell`` exactly."""
    return all("exact" in outcomes[cell] and not short_of(outcomes[cell]) for outcomes in cells.values())


def document(found: Mapping[str, Cells]) -> str:
    """docs/architectures.md."""
    reasons = _reasons(found)
    types = len(zoo.TYPES) + len(zoo.UNBUILDABLE)
    summary = "".join(
        f"| {cell} | {_count(found, lambda cells: holds(cells, cell))} "  # noqa: B023
        f"| {_count(found, lambda cells: any(short_of(one[cell]) for one in cells.values()))} "  # noqa: B023
        f"| {_count(found, lambda cells: any('refused' in one[cell] for one in cells.values()))} |\n"  # noqa: B023
        for cell in CELLS
    )
    every = [outcome for cells in found.values() for outcomes in cells.values() for outcome in outcomes.values()]
    share = max((one["share"] for one in every if short_of(one)), key=float, default="0")
    noise = _list(sorted(t for t, cells in found.items() if any(_mark(cells, cell) == "~" for cell in CELLS)))
    head = _HEAD.format(built=len(found), types=types).replace("of them marked *", "marked *")
    table = "".join(
        f"| {name} | " + " | ".join(_entry(cells, cell, name, reasons) for cell in CELLS) + " |\n"
        for name, cells in sorted(found.items())
    )
    return (
        head
        + summary
        + _LEGEND.format(share=share, noise=noise)
        + "## Types\n\n| type | "
        + " | ".join(CELLS)
        + " |\n|---"
        + "|---" * len(CELLS)
        + "|\n"
        + table
        + "\n## Reasons\n\nThe type's name is left out, and the numbers of layers are those of the tiny models.\n\n"
        + "".join(f"{number}. {reason}\n" for reason, number in reasons.items())
        + "\n## Not built\n\n"
        + "".join(
            f"- {name}: {reason}\n" for name, reason in sorted(zoo.UNBUILDABLE.items()) if name not in zoo.COMPOSITES
        )
    )


def _count(found: Mapping[str, Cells], test: Callable[[Cells], bool]) -> int:
    return sum(map(test, found.values()))


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _mark(cells: Cells, cell: str) -> str:
    causes = {outcomes[cell].get("because") for outcomes in cells.values()}
    return "*" if "epsilon" in causes else "~" if "rounding" in causes else ""


def _reason(model_type: str, text: str) -> str:
    """A refusal with the names of the type and of single layers taken out, so that equal ones are equal."""
    inner = zoo.COMPOSITES.get(model_type, (model_type,))[0]
    for name in sorted({model_type, inner}, key=len, reverse=True):
        text = re.sub(rf"\b(an? |the )?{re.escape(name)} ", "the ", text)
    text = re.sub(r"projection at \S+ is", "projection at a writer is", text.replace("at a writer is", "at X is"))
    text = re.sub(r"model type '\S+' (is not described[^.]*)\..*", r"the type \1", text)
    return re.sub(r"(resid_\w+|attn_out|mlp_out)\.\d+", r"\1.L", text)


def _reasons(found: Mapping[str, Cells]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for name, cells in sorted(found.items()):
        for cell in CELLS:
            for outcomes in cells.values():
                if "refused" in outcomes[cell]:
                    numbers.setdefault(_reason(name, outcomes[cell]["refused"]), len(numbers) + 1)
    return numbers


def _entry(cells: Cells, cell: str, model_type: str, reasons: Mapping[str, int]) -> str:
    found = []
    for _, outcomes in sorted(cells.items()):
        outcome = outcomes[cell]
        if "refused" in outcome:
            text = str(reasons[_reason(model_type, outcome["refused"])])
        else:
            text = " + ".join(_SHORT.get(one, one) for one in outcome.get("exact", ["FAILED"]))
        found.append(text)
    return " / ".join(dict.fromkeys(found)) + _mark(cells, cell)
