"""How results look: tables and figures on stdout, notes and progress bars on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .direction import Direction
    from .explain import Claim, Explanation, Option
    from .hub import Pushed
    from .plan import Plan
    from .unbake import Step

WIDTH = 100  # where stdout is a file or a pipe
SECONDS = 30.0  # between two lines of progress where stderr is a file or a pipe


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, drawn once there is something to count; where stderr is no terminal a line now and then."""
    console = Console(stderr=True)
    percent = TextColumn("{task.percentage:>3.0f}%")
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), percent, TimeElapsedColumn()
    counted, told = False, time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def advance(done: int, total: int) -> None:
            nonlocal counted, told
            counted = True
            bar.update(task, completed=done, total=total, visible=True)
            if not console.is_terminal and done < total and time.monotonic() - told >= SECONDS:
                note(f"{what}: {done} of {total}")
                told = time.monotonic()

        yield advance
    if counted:
        note(f"{what}: done")


def note(text: str) -> None:
    """Prose, on stderr."""
    click.echo(text, err=True)


def as_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def plan(found: Plan, json_wanted: bool, *, sketch: bool = False) -> None:
    """The decisions of a plan. Of a ``sketch``, whose vectors are made up, no amount and no hash is shown."""
    content = found.as_json()
    if sketch:
        content.pop("interventions")
        for edit in content["edits"]:
            del edit["change"], edit["sha256"]
    if json_wanted:
        as_json(content)
        return
    rows = [(row["write"], row["part"], row["representation"], ", ".join(row["for"])) for row in content["decisions"]]
    _print(_table(["write", "part", "held by", "for"], rows))
    noted: dict[tuple[str, str], list[str]] = {}
    for row in content["decisions"]:
        if row["note"]:
            noted.setdefault((row["representation"], row["note"]), []).append(row["write"])
    for (name, text), writes in noted.items():
        click.echo(f"{name} ({writes[0]}{f' and {len(writes) - 1} more' if writes[1:] else ''}): {text}")
    new = sum(edit["from"] is None for edit in content["edits"])
    click.echo(f"{len(content['edits'])} tensors: {new} new, {len(content['edits']) - new} edited")
    for key, value in content["config_changes"].items():
        click.echo(f"config.json: {key} = {json.dumps(value)}")


def explanation(found: Explanation) -> None:
    """What a model can hold: one table of what is offered, one line for each refusal."""
    from .runtimes import runtimes

    read = "its tensors' headers" if found.read == "headers" else "its config alone"
    click.echo(f"{found.model}: {found.model_type}, {found.layers} layers, width {found.width}, from {read}")
    click.echo(f"{_short(found.parameters)} parameters")
    for key, value in found.layout.items():
        click.echo(f"{key}: {(', '.join(value) or '-') if isinstance(value, list) else value}")
    if found.note:
        click.echo(found.note)
        return
    rows: list[tuple[str | Text, ...]] = []
    for row in found.rows:
        for number, one in enumerate(row.options):
            marks = "".join(mark for prefer, mark in _MARKS.items() if prefer in one.preferred_by)
            rows.append(("" if number else f"{row.operation} {row.sites}", *_offered(one, marks)))
    loads = [{"transformers": "HF"}.get(one.name, one.name) for one in runtimes()]
    _narrow(["", "held by", "", "new parameters", "layers", *loads], rows)
    click.echo("* default (prefer: smallest), b prefer: bit_exact, w prefer: widest_loading; HF is transformers")
    changed: dict[str, set[str]] = {}
    for option in (one for row in found.rows for one in row.options if " + " not in one.representation):
        changed.setdefault(option.representation, set()).update(option.config_changes)
    for name, keys in changed.items():
        if keys:
            click.echo(f"config.json: {name} sets {', '.join(sorted(keys))}")
    for about in dict.fromkeys((one.operation, one.sites) for one in found.houses):
        _houses([one for one in found.houses if (one.operation, one.sites) == about], loads)
    why: dict[str, list[str]] = {}
    for row in found.rows:
        if not row.options:
            why.setdefault(_first_sentence("; ".join(row.refused.values())), []).append(f"{row.operation} {row.sites}")
    for sentence, refused in why.items():
        click.echo(textwrap.fill(f"refused: {', '.join(refused)}: {sentence}", _width(), subsequent_indent="  "))


def _houses(found: Sequence[Claim], loads: Sequence[str]) -> None:
    """The other classes that a model could be of, for what is asked at one site."""
    rows = [(one.model_type, *_offered(one.option, "b" if one.same_bits else "")) for one in found if one.option]
    if rows:
        example = found[0]
        click.echo(
            f"\nas another class (prefer: rehouse:CLASS), {example.operation} {example.sites}; proven before a bake"
        )
        _narrow(["", "held by", "", "new parameters", "layers", *loads], rows)
        click.echo("b the same bits in bfloat16 as under its own class")
    for one in found:
        if not one.option:
            text = f"refused: as {one.model_type}: {_first_sentence(one.refused)}"
            click.echo(textwrap.fill(text, _width(), subsequent_indent="  "))


def _offered(one: Option, marks: str) -> tuple[str | Text, ...]:
    share = f"{100 * one.share:.1f} %" if one.share >= 0.001 else "< 0.1 %"
    return (
        one.representation.replace("embedding_rows", "embedding"),
        marks,
        f"{_short(one.parameters)}  {share}" if one.parameters else "0",
        str(one.layers or ""),
        *map(_known, one.loads.values()),
    )


def _narrow(columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    table = _table(columns, rows)
    table.collapse_padding = True
    for column in table.columns:
        column.no_wrap = True
    _print(table)


_MARKS = {"smallest": "*", "bit_exact": "b", "widest_loading": "w"}


def _known(answer: bool | None) -> Text:
    if answer is None:
        return Text("?", style="dim")
    return Text("yes", style="green") if answer else Text("no", style="red")


def _short(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _first_sentence(reason: str) -> str:
    """The beginning of a refusal, without the site it is about."""
    return re.split(r"[.;:] ", re.sub(r"^(\w+ at )?\w+\.\d+: ", "", reason), maxsplit=1)[0]


def directions(found: Sequence[Direction]) -> None:
    rows = [(str(one.site), f"{one.scale:.4g}", f"{one.stream_norm or 0:.4g}", one.sha256[:12]) for one in found]
    _print(_table(["site", "scale", "stream norm", "sha256"], rows))


def analysis(content: Mapping[str, Any]) -> None:
    """The layers of an analysis, and its figures in words."""
    rows = [
        (name, *(f"{row[key]:.3f}" for key in ("correlation", "error", "score", "auc", "distance")))
        for name, row in content["layers"].items()
    ]
    _print(_table(["site", "r", "sign error", "r - error", "AUC", "d'"], rows))
    click.echo(f"looked at closely: {content['site']}")
    if not content["held_out"]:
        note("measured on the training prompts; name a set under 'estimator: {validation: ...}'")


def selection(content: Mapping[str, Any]) -> None:
    """The configurations tried, the least change first, and the one to use as lines of a recipe."""
    trials = sorted(content["trials"], key=lambda trial: trial["change"])
    rows = [
        (
            str(trial["configuration"]["top"]), f"{trial['configuration']['coefficient']:+g}",
            trial["configuration"]["name"], f"{trial['drop']:.3f}", f"{trial['change']:.3f}",
            "chosen" if trial == content["chosen"] else "",
        )
        for trial in trials
    ]  # fmt: skip
    _print(_table(["layers", "coefficient", "", "drop of c", "change", ""], rows))
    chosen = content["chosen"]
    one = chosen["configuration"]
    sites = ", ".join(chosen["sites"])
    click.echo(f"intervention: {{name: {one['name']}, sites: [{sites}], coefficient: {one['coefficient']:g}}}")


def gates(found: Sequence[Mapping[str, Any]]) -> None:
    """Gates and what was measured of their probes."""
    rows = []
    for one in found:
        measures = one["measures"]
        low, high = measures["auroc_interval"]
        token, once = measures["per_token"], measures["once_per_prompt"]
        false = ", ".join(f"{name} {100 * share:.1f} %" for name, share in measures["false_fires"].items())
        rows.append(
            (
                f"{one['name']} {one['site']}",
                f"{measures['auroc']:.3f} [{low:.3f}, {high:.3f}]",
                f"{100 * token['true_positives']:.0f} / {100 * token['false_positives']:.0f} %",
                f"{100 * once['true_positives']:.0f} / {100 * once['false_positives']:.0f} %",
                f"{measures['calibration_error']:.3f}",
                false,
            )
        )
    _print(
        _table(["gate", "AUROC", "true / false, per token", "once a prompt", "calibration error", "elsewhere"], rows)
    )
    click.echo("baked is the decision per token; elsewhere: tokens of unrelated texts on which the gate is open")


def openings(found: Sequence[Mapping[str, Any]]) -> None:
    """On which tokens of which prompts gates are open."""
    rows = [
        (one["prompt_set"], f"{one['gate']} {one['site']}", _open(one["answer"]), _open(one["all"])) for one in found
    ]
    _print(_table(["prompts", "gate", "open behind the instruction", "open on all tokens"], rows))


def _open(counts: Mapping[str, int]) -> str:
    between = counts["tokens"] - counts["open"] - counts["closed"]
    return f"{counts['open']}/{counts['tokens']}" + (f", {between} in part" if between else "")


def report(content: Mapping[str, Any], what: str = "certificate") -> None:
    """The certificate or another report, one line per check."""
    rows = [
        (check["name"], _verdict(check["passed"]), _number(check["value"]), _number(check["limit"]), check["detail"])
        for check in content["checks"]
    ]
    _print(_table(["check", "", "measured", "limit", "detail"], rows, f"{what} of {content['folder']}"))


def steps(found: Sequence[Step]) -> None:
    """Where each file of a base comes from."""
    _print(_table(["file", "how"], [(step.name, step.how) for step in found]))


def pushed(done: Pushed, *, dry_run: bool) -> None:
    """What was published, file by file."""
    words = {"upload": "sent", "copy": "copied on the server", "keep": "there already", "delete": "removed"}
    _print(_table(["file", "", "bytes"], [(one.path, words[one.how], f"{one.size:,}") for one in done.files]))
    visible = "private" if done.private else "public"
    if dry_run:
        new = f"; {done.repo} would be created, {visible}" if done.created else f"; {done.repo} is {visible}"
        click.echo(f"at most {done.sent:,} bytes would be sent{new}")
        return
    if done.committed:
        click.echo(f"{done.url} ({visible}), certificate: {done.certificate}")
    else:
        click.echo(f"{done.url} has all of this already: no commit was made")
    if done.pull_request:
        click.echo(f"pull request: {done.pull_request}")
    click.echo(f"commit: {done.commit}")


def outcome(model: Path, proof: Mapping[str, Any], evaluation: Mapping[str, Any], ran: Mapping[str, bool]) -> None:
    """The summary of a run, on one screen."""
    report(proof)
    rows = []
    for row in [*evaluation["behaviour"], *evaluation["safety"], *_sums(evaluation)]:
        interval = f"{100 * row['difference']:+.0f} points [{100 * row['low']:+.0f}, {100 * row['high']:+.0f}]"
        rows.append((row["prompt_set"], row["label"], _share(row["base"]), _share(row["baked"]), interval))
    if rows:
        title = "behaviour: share of answers with the label, 95 % intervals"
        _print(_table(["prompts", "label", "base", "baked", "difference"], rows, title))
    if evaluation.get("gates"):
        openings(evaluation["gates"])
    if not evaluation["safety_measured"]:
        click.echo("refusals were not measured (--no-safety)")
    _plain_text(evaluation)
    doses = [(one["site"], one["dose"]) for one in proof["interventions"] if one["dose"]]
    if doses:
        click.echo(f"dose (added length / stream): {_doses(doses)}")
    done = [name for name, now in ran.items() if not now]
    if done:
        note(f"up to date: {', '.join(done)}")
    click.echo(f"model: {model}")
    loading_code(model)


def _sums(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The row of the sums, where they were measured."""
    found = evaluation.get("damage", {}).get("arithmetic", {})
    return [found] if "base" in found else []


def _plain_text(evaluation: Mapping[str, Any]) -> None:
    if "damage" not in evaluation:
        click.echo("perplexity and sums were not measured (damage: false)")
        return
    found = evaluation["damage"]["prose"]
    before, after, ratio, low, high = (
        "not finite" if found[key] is None else f"{found[key]:.3g}" for key in ("base", "baked", "ratio", "low", "high")
    )
    click.echo(f"perplexity of plain text: {before} to {after}, x {ratio} [{low}, {high}]")
    if why := evaluation["damage"]["arithmetic"].get("unmeasured"):
        click.echo(f"sums were not measured: {why}")


def loading_code(model: Path, target: str = "checkpoint") -> None:
    """The lines of plain transformers, or of PEFT."""
    from .card import loading_code

    click.echo(f"\n{loading_code(model, target)}")


def sides(rows: Sequence[Mapping[str, str]]) -> None:
    """Base and baked, answer by answer."""
    table = _table(["prompt", "base", "baked"], [(row["prompt"], row["base"], row["baked"]) for row in rows])
    table.show_lines = True
    for column, ratio in zip(table.columns, (1, 2, 2), strict=True):
        column.ratio = ratio
    _print(table)


def agreement(judge: str, found: Mapping[str, Any], show: bool) -> None:
    """A judge against people: the figures, the table of both, and on demand every disagreement."""

    def share(one: Mapping[str, Any] | None) -> str:
        if one is None:
            return "-"
        return f"{one['hits'] / one['total']:.3f} [{one['low']:.3f}, {one['high']:.3f}] of {one['total']}"

    click.echo(f"{judge}: accuracy {share(found['accuracy'])}")
    if found["kappa"] is None:
        click.echo("Cohen's kappa: none, there is one label only")
    else:
        click.echo(f"Cohen's kappa {found['kappa']:.3f} [{found['kappa_low']:.3f}, {found['kappa_high']:.3f}]")
    labels = found["labels"]
    rows = [
        (label, *map(str, counts), share(found["recall"].get(label)), share(found["precision"].get(label)))
        for label, counts in zip(labels, found["table"], strict=True)
    ]
    _print(_table(["people \\ judge", *labels, "recall", "precision"], rows))
    if took := found["judging"]:
        cost = "" if took["cost"] is None else f", cost {took['cost']:.4f}"
        click.echo(
            f"asked {took['asked']}, kept from before {took['kept']}, tries repeated {took['retries']}, failed "
            f"{took['failed']}, tokens {took['prompt_tokens']} + {took['completion_tokens']}{cost}"
        )
    if show:
        _print(_table(["row", "people", "judge"], found["disagreements"]))


def listing(found: Mapping[str, Mapping[str, str]]) -> None:
    """Every extension point with what it offers."""
    for title, entries in found.items():
        click.echo(title)
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            room = max(_width() - width - 5, 20)
            click.echo(f"  {name:<{width}}  {text if len(text) <= room else text[: room - 3].rstrip() + '...'}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | Text]], title: str | None = None) -> Table:
    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE, pad_edge=False)
    for row in rows:
        # Text, not str: square brackets in a model's answer are no markup, and control characters are not obeyed.
        table.add_row(*(cell if isinstance(cell, Text) else Text(_printable(cell)) for cell in row))
    return table


def _print(table: Table) -> None:
    Console(width=_width()).print(table)


def _width() -> int:
    """The terminal's width, or what COLUMNS says; a readable one where there is neither."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return Console().width
    return WIDTH


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() or one == "\n" else " " for one in text)


def _verdict(passed: bool) -> Text:
    return Text("pass", style="green") if passed else Text("FAIL", style="bold red")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _doses(doses: Sequence[tuple[str, float]]) -> str:
    if len(doses) <= 4:
        return ", ".join(f"{dose:.2f} at {site}" for site, dose in doses)
    sizes = [dose for _, dose in doses]
    return f"{min(sizes):.2f} to {max(sizes):.2f} at each of {len(doses)} sites, {doses[0][0]} to {doses[-1][0]}"


def _share(share: Mapping[str, Any]) -> str:
    low, high = 100 * share["low"], 100 * share["high"]
    return f"{share['hits']}/{share['total']} = {100 * share['hits'] / share['total']:.0f} % [{low:.0f}, {high:.0f}]"
