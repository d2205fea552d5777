"""The numbers of ``analysis`` as figures, PNG and SVG each. Needs matplotlib: ``pip install 'steer-bake[figures]'``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import RecipeError

# Colours that are told apart with every kind of colour vision (Okabe and Ito), in this order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
SETTINGS: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "steer-bake",  # the same numbers make the same file
    "svg.fonttype": "none",
}


def check() -> None:
    """Raise RecipeError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise RecipeError("figures need matplotlib: pip install 'steer-bake[figures]'")


def draw(numbers: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every figure that ``numbers`` (``analysis.analyse``) allow, into ``folder``; the files written.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    check()
    import matplotlib
    from matplotlib.figure import Figure

    drawn: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
        "layers": _layers, "concentration": _concentration, "pca": _pca, "cosines": _cosines, "refusals": _refusals,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with matplotlib.rc_context(SETTINGS):
        for name, function in drawn.items():
            if name not in numbers:
                continue
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            function(figure, numbers)
            for kind in ("png", "svg"):
                files.append(folder / f"{name}.{kind}")
                figure.savefig(files[-1], metadata={"Date": None} if kind == "svg" else {})
    return files


def _layers(figure: Any, numbers: Mapping[str, Any]) -> None:
    rows = numbers["layers"]
    names = list(rows)
    one, other = figure.subplots(2, 1, sharex=True)
    places = range(len(names))
    for key, label, colour in (
        ("correlation", "correlation r", COLOURS[0]), ("error", "sign error", COLOURS[1]),
        ("score", "r - error", COLOURS[6]),
    ):  # fmt: skip
        one.plot(places, [rows[name][key] for name in names], label=label, color=colour, marker="o", markersize=3)
    one.axvline(names.index(numbers["site"]), color="#999999", linestyle=":")
    one.set_title(
        f"Projection on {numbers['estimator']} and {numbers['confidence']}, {_measured(numbers)}", fontsize=10
    )
    one.legend(fontsize=8, ncols=3)
    other.plot(places, [rows[name]["auc"] for name in names], color=COLOURS[2], marker="s", markersize=3)
    other.axvline(names.index(numbers["site"]), color="#999999", linestyle=":")
    other.set_ylabel("AUC")
    other.set_ylim(min(0.45, *(rows[name]["auc"] for name in names)), 1.02)
    step = max(1, len(names) // 12)
    other.set_xticks(list(places)[::step], [name.partition(".")[2] for name in names][::step])
    points = {name.partition(".")[0] for name in names}
    other.set_xlabel(f"layer ({', '.join(sorted(points))}); dotted: {numbers['site']}")


def _measured(numbers: Mapping[str, Any]) -> str:
    count = numbers["prompts"]["measured on"]
    return f"{count} held-out prompts" if numbers["held_out"] else f"the {count} training prompts"


def _concentration(figure: Any, numbers: Mapping[str, Any]) -> None:
    found = numbers["concentration"]
    axes = figure.subplots()
    curve = found["curve"]
    axes.plot([k for k, _ in curve], [share for _, share in curve], color=COLOURS[0], label=numbers["estimator"])
    width = found["width"]
    axes.plot([0, width], [0, 1], color="#999999", linestyle=":", label="evenly spread")
    top = next(key for key in found if key.startswith("top_") and key != "top_dimensions")
    axes.set_title(
        f"{numbers['site']}: the {top.removeprefix('top_')} largest of {width} dimensions hold {found[top]:.1%} of the "
        "magnitude",
        fontsize=10,
    )
    axes.set_xlabel("dimensions, largest first")
    axes.set_ylabel("share of the magnitude")
    axes.set_xlim(0, width)
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")


def _pca(figure: Any, numbers: Mapping[str, Any]) -> None:
    found = numbers["pca"]
    axes = figure.subplots()
    for number, (name, points) in enumerate(found["points"].items()):
        axes.scatter(
            [x for x, _ in points], [y for _, y in points], s=22, alpha=0.75, label=f"{name} ({len(points)})",
            color=COLOURS[number % len(COLOURS)], linewidths=0,
            marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],  # no two groups look alike
        )  # fmt: skip
    shares = found["variance"]
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    apart = "" if found["silhouette"] is None else f", silhouette {found['silhouette']:.2f}"
    axes.set_title(f"Activations at {numbers['site']}{apart}", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8)


def _cosines(figure: Any, numbers: Mapping[str, Any]) -> None:
    names, matrix = numbers["cosines"]["categories"], numbers["cosines"]["matrix"]
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=-1, vmax=1, cmap="PuOr_r")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for y, row in enumerate(matrix):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=_ink(value))
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set_title(f"Directions of the categories, {numbers['estimator']} at {numbers['site']}", fontsize=10)


def _ink(value: float) -> str:
    return "white" if abs(value) > 0.7 else "black"


def _refusals(figure: Any, numbers: Mapping[str, Any]) -> None:
    points = numbers["refusals"]["points"]
    axes = figure.subplots()
    xs, ys = [one["harmless"] for one in points], [one["harmful"] for one in points]
    axes.plot(xs, ys, color="#999999", linewidth=1, zorder=1)
    axes.scatter(xs, ys, c=[COLOURS[6] if one["coefficient"] == 0 else COLOURS[0] for one in points], zorder=2)
    for number, (x, y, text) in enumerate(_named(points)):  # by turns below and above the line
        place, side = (((5, -12), "left"), ((-5, 6), "right"))[number % 2]
        axes.annotate(text, (x, y), textcoords="offset points", xytext=place, ha=side, fontsize=8)
    axes.plot([0, 1], [0, 1], color="#999999", linestyle=":")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("over-refusal: harmless prompts")
    axes.set_ylabel("refusal: harmful prompts")
    axes.set_title(
        f"{numbers['refusals']['of'].capitalize()},\n{numbers['estimator']} added at {numbers['site']}", fontsize=10
    )


_CLOSE = 0.04  # points nearer than this share one text


def _named(points: Sequence[Mapping[str, float]]) -> list[tuple[float, float, str]]:
    """Where texts stand and what they say: the coefficients of all points that lie there."""
    found: list[tuple[float, float, list[str]]] = []
    for one in points:
        text = "unsteered" if one["coefficient"] == 0 else f"{one['coefficient']:+g}"
        x, y = one["harmless"], one["harmful"]
        near = next((texts for left, up, texts in found if abs(left - x) < _CLOSE and abs(up - y) < _CLOSE), None)
        if near is None:
            found.append((x, y, [text]))
        else:
            near.append(text)
    return [(x, y, ", ".join(texts)) for x, y, texts in found]
