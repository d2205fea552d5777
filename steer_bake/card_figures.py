"""The figures of a model card: shares of base and model with their intervals, and the dose at each site.

They lie in ``figures/`` beside the card. Each holds a hash of the numbers that it shows: one that is up to date is
known by it and not drawn again, so that pushing a folder twice makes no second commit. Drawing needs matplotlib
(``pip install 'steer-bake[figures]'``); without it a card has only those figures that are there and up to date.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .figures import COLOURS, MARKERS, SETTINGS

FOLDER = "figures"
#: Of figures, what they show, for readers who do not see them.
CAPTIONS = {
    "behaviour": "Shares of base and this model with 95 % intervals, as in the table",
    "dose": "Dose at each site: the added length over the mean length of the stream",
}

_MARK = "steer-bake"
_NUMBERS = re.compile(rb"tEXtsteer-bake\0([0-9a-f]{64})")


def numbers(report: Mapping[str, Any] | None, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the figures show, by name; a figure that there are no numbers for is left out."""
    measured = evaluation or {}
    sums = (measured.get("damage") or {}).get("arithmetic") or {}
    rows = [*measured.get("behaviour", ()), *measured.get("safety", ()), *([sums] if "base" in sums else [])]
    doses = [(one["name"], one["site"], one["dose"]) for one in (report or {}).get("interventions", ()) if one["dose"]]
    found = {
        "behaviour": [
            (f"{row['prompt_set']}: {row['label']}", *(_share(row[side]) for side in ("base", "baked"))) for row in rows
        ],
        "dose": doses if len({site for _, site, _ in doses}) > 1 else [],
    }
    return {name: shown for name, shown in found.items() if shown}


def _share(side: Mapping[str, Any]) -> tuple[float, float, float]:
    """In percent, with the ends of the interval."""
    return 100 * side["hits"] / side["total"], 100 * side["low"], 100 * side["high"]


def drawn(folder: Path, shown: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by their path in ``folder``, of :func:`numbers`: those that are up to date as they are, others anew."""
    found = {}
    for name, content in shown.items():
        path, digest = f"{FOLDER}/{name}.png", hashlib.sha256(json.dumps(content).encode()).hexdigest()
        there = (folder / path).read_bytes() if (folder / path).is_file() else b""
        if _numbers_of(there) == digest:
            found[path] = there
        elif find_spec("matplotlib"):
            found[path] = _draw(_DRAWN[name], content, digest)
    return found


def save(folder: Path, figures: Mapping[str, bytes]) -> None:
    """Write ``figures`` below ``folder``, and remove those of ours that are not among them."""
    for path, data in figures.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    for path in ours(folder):
        if path not in figures:
            (folder / path).unlink()


def ours(folder: Path) -> list[str]:
    """The figures in ``folder`` that were drawn here."""
    found = [path for path in sorted((folder / FOLDER).glob("*.png")) if path.stem in CAPTIONS]
    return [f"{FOLDER}/{path.name}" for path in found if _numbers_of(path.read_bytes())]


def _numbers_of(png: bytes) -> str:
    found = _NUMBERS.search(png)
    return found[1].decode() if found else ""


def _draw(function: Callable[[Any, Any], None], content: Any, digest: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.4, 1.1 + 0.42 * min(len(content), 12)), layout="constrained")
        function(figure, content)
        figure.savefig(out, format="png", metadata={"Software": None, _MARK: digest})
    return out.getvalue()


def _behaviour(figure: Any, rows: Any) -> None:
    axes = figure.subplots()
    for number, (who, shift) in enumerate((("base", -0.14), ("this model", 0.14))):
        middle, low, high = ([row[1 + number][part] for row in rows] for part in range(3))
        off = [[max(0.0, m - a) for m, a in zip(middle, low, strict=True)],
               [max(0.0, b - m) for m, b in zip(middle, high, strict=True)]]  # fmt: skip
        axes.errorbar(
            middle, [place + shift for place in range(len(rows))], xerr=off, label=who, color=COLOURS[number],
            marker=MARKERS[number], markersize=5, linestyle="", capsize=2, linewidth=1.2,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("share of answers with the label, %")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9, frameon=False)


def _dose(figure: Any, rows: Any) -> None:
    axes = figure.subplots()
    figure.set_figheight(2.6)
    sites = list(dict.fromkeys(site for _, site, _ in rows))
    for number, name in enumerate(dict.fromkeys(name for name, _, _ in rows)):
        own = [(sites.index(site), dose) for one, site, dose in rows if one == name]
        axes.plot(
            [x for x, _ in own], [y for _, y in own], label=name, color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1,
        )  # fmt: skip
    points = {site.partition(".")[0] for site in sites}
    short = [site.partition(".")[2] if len(points) == 1 else site for site in sites]
    axes.set_xticks(range(len(sites)), short, rotation=0 if len(points) == 1 else 30)
    axes.set_xlabel(f"layer ({points.pop()})" if len(points) == 1 else "site")
    axes.set_ylabel("added length / stream")
    axes.set_ylim(bottom=0)
    if len({name for name, _, _ in rows}) > 1:
        axes.legend(fontsize=8)


_DRAWN: Mapping[str, Callable[[Any, Any], None]] = {"behaviour": _behaviour, "dose": _dose}
