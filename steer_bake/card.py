"""The model card of a baked folder: README.md from a template in ``model_cards/``.

A template of one's own may begin with ``{% extends "checkpoint.md" %}`` and replace blocks of the packaged one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined, TemplateError

from . import architectures, card_figures, manifest, safety
from .architectures import SLOTS
from .errors import RecipeError, UnknownArchitecture
from .judges import INCOHERENT
from .manifest import Manifest
from .plan import CHECKPOINT
from .runtimes import runtimes
from .stages import write_text

LOADING_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({path!r})"""

ADAPTER_CODE = """\
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({path!r}, dtype="auto")"""

#: How other programs are started; ``{path}`` is the repository or the folder.
STARTING = {
    "vllm": "vllm serve {path}",
    "llama.cpp": "python convert_hf_to_gguf.py {folder} --outfile model.gguf",
    "mlx": "mlx_lm.generate --model {path} --prompt Hello",
}

#: By target: the packaged template, and what the hub calls it.
TEMPLATES = {"lora": "adapter.md", "gguf_vector": "vector.md"}
LIBRARIES = {"lora": ("peft", "adapter"), "gguf_vector": ("gguf", "adapter")}

LONGEST_ANSWER = 220  # characters of an example
NOT_FOR_ALL = "not-for-all-audiences"

_UNMEASURED: Mapping[str, Any] = {
    "behaviour": [], "safety": [], "safety_measured": False, "examples": [], "judge": None, "repetition_penalty": None
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SEAL = "<!-- steer-bake wrote this card: {digest} -->\n"
_SEALED = re.compile(r"<!-- steer-bake wrote this card: ([0-9a-f]{64}) -->\s*\Z")


@dataclass(frozen=True)
class Publication:
    """What of a card depends on where, and under what terms, it is published."""

    repo: str | None = None  # "org/name"; None for a folder on this machine
    licence: Mapping[str, Any] = field(default_factory=dict)  # license, license_name, license_link, language
    acknowledged: str | None = None  # why it is published although refusals fell or were not measured
    audit: Mapping[str, Any] | None = None  # of a publication whose certificate is of the bytes only
    reduced: bool = False  # it refuses fewer harmful requests than its base


def render(
    folder: Path,
    report: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    template: Path | None = None,
    publication: Publication = Publication(),
    figures: Collection[str] = (),
) -> str:
    """The card's text for the baked ``folder``, out of its manifest, its report and what was measured of its behaviour.

    ``report`` may be None only where ``publication`` has an audit. ``figures`` are the paths of those that lie beside
    the card (``card_figures``). The packaged template's card is sealed: it ends with a comment by which
    :func:`is_sealed` knows whether somebody changed it.

    Raises:
        RecipeError: the template cannot be read or does not work, or ``report`` or ``evaluation`` is something else.
        CheckpointError: the folder has no readable manifest.
    """
    found = manifest.read(folder, incomplete=True)
    measured = _UNMEASURED if evaluation is None else evaluation
    wanted = ((report, "report", ("checks", "interventions", "passed")), (measured, "evaluation", tuple(_UNMEASURED)))
    for content, what, keys in wanted:
        if content is None and publication.audit is not None:
            continue
        missing = [key for key in keys if key not in (content or {})]
        if missing:
            raise RecipeError(f"the {what} of {folder} has no {missing[0]!r}: give the file that steer-bake wrote")
    if report is not None:
        check_belongs(found, report, f"report of {folder}")
    if evaluation is not None:
        check_belongs(found, evaluation, f"evaluation of {folder}")
    path = template or templates() / TEMPLATES.get(found.target, "checkpoint.md")
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(path.parent), FileSystemLoader(templates())]),
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters["text"] = _text
    try:
        content = _content(folder, found, report, measured, publication)
        text = environment.get_template(path.name).render(**content, figures=_shown(figures))
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the card template {path} does not work: {error or 'it cannot be found'}") from error
    return text if template else _sealed(text)


def drawn(
    folder: Path,
    report: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    template: Path | None = None,
    publication: Publication = Publication(),
) -> tuple[str, dict[str, bytes]]:
    """The card's text with its figures, by their paths in ``folder`` (raises as :func:`render` does)."""
    figures = card_figures.drawn(folder, card_figures.numbers(report, evaluation))
    return render(folder, report, evaluation, template, publication, figures), figures


def write(
    folder: Path,
    report: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    template: Path | None = None,
    publication: Publication = Publication(),
) -> None:
    """Write README.md and its figures into ``folder`` (raises as :func:`render` does)."""
    text, figures = drawn(folder, report, evaluation, template, publication)
    card_figures.save(folder, figures)
    write_text(folder / "README.md", text)


def _shown(figures: Collection[str]) -> dict[str, str]:
    """By name, the Markdown of each figure; empty where it is not there."""
    paths = {name: f"{card_figures.FOLDER}/{name}.png" for name in card_figures.CAPTIONS}
    return {
        name: f"![{card_figures.CAPTIONS[name]}]({path})" if path in figures else "" for name, path in paths.items()
    }


def _content(
    folder: Path, found: Manifest, report: Mapping[str, Any] | None, measured: Mapping[str, Any],
    publication: Publication,
) -> dict[str, Any]:  # fmt: skip
    """Everything that a template can show."""
    base, recipe, plan = found.base, found.content["recipe"], found.content["plan"]
    origin = base["hub_id"] or base["original"]
    fell = _harmful_fell(measured)
    known = safety.refusals(measured)
    reduced = fell == "clearly" or known.state == "fell"
    place = publication.repo or str(folder)
    name = Path(origin or base["name"]).name
    return {
        "metadata": _metadata(found, origin, publication, measured, not_for_all=reduced),
        "title": _text(publication.repo.split("/")[-1]) if publication.repo else f"{_text(name)}, steered",
        "base": base,
        "origin": origin,
        "place": place,
        "repo": publication.repo,
        "licence": publication.licence.get("license_name") or publication.licence.get("license"),
        "acknowledged": publication.acknowledged,
        "interventions": report["interventions"] if report else plan["interventions"],
        "gates": report.get("gates", ())
        if report
        else [{"gate": one["gate"]} for one in plan["interventions"] if "gate" in one],
        "openings": measured.get("gates", ()),
        "purpose": _purpose(recipe or ""),
        "direction": _direction(plan, recipe or ""),
        "code": loading_code(place, found.target),
        "loading": _loading(folder, plan, publication.repo) if found.target == CHECKPOINT else [],
        "adapter": _adapter(found),
        "report": report,
        "audit": publication.audit,
        "gaps": _gaps(report),
        "edits": plan["edits"],
        "new": sum(one["from"] is None for one in plan["edits"]),
        "matrices": sum(one["from"] is not None and len(one["shape"]) > 1 for one in plan["edits"]),
        "decisions": sorted({one["representation"] for one in plan["decisions"]}),
        "config_changes": plan["config_changes"],
        "model_type": plan["model_type"],
        "rehoused_from": plan.get("rehoused_from"),
        "approximate": any(one.get("approximate") for one in plan["decisions"]),
        "needs_base": found.originals.needs_base,
        "recipe": recipe,
        "fence": _fence(recipe or ""),
        "tool": found.content["tool"],
        "harmful_fell": "clearly" if reduced else fell,
        "margin": 100 * safety.MARGIN,
        "share": _share,
        "incoherent": _incoherent,
        "number": _number,
        "damage": measured.get("damage"),
        "effect": (report or {}).get("effect"),
        **{key: measured[key] for key in _UNMEASURED},
    }


def _sealed(text: str) -> str:
    return text + _SEAL.format(digest=hashlib.sha256(text.encode()).hexdigest())


def is_sealed(text: str) -> bool:
    """Whether a card is as the packaged template made it, and nobody has changed it since."""
    found = _SEALED.search(text)
    return found is not None and hashlib.sha256(text[: found.start()].encode()).hexdigest() == found[1]


def problem(text: str, publication: Publication) -> str:
    """What keeps a card, which somebody may have written by hand, from being published; empty where nothing does."""
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        fields = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        return f"has metadata that is no YAML ({str(error).splitlines()[0]})"
    if not isinstance(fields, dict):
        return "has no metadata between two lines of '---'; steer-bake card --dry-run shows what belongs there"
    for name, value in publication.licence.items():
        if name.startswith("license") and fields.get(name) != value:
            return f"says {name}: {fields.get(name)!r}, and the base has {value!r}; put that there"
    if publication.acknowledged is not None and publication.acknowledged not in text:
        return f"does not say why the safety change is acknowledged; add this line: {publication.acknowledged}"
    if publication.reduced and NOT_FOR_ALL not in (fields.get("tags") or []):
        return f"lacks the tag {NOT_FOR_ALL!r}, though the model refuses fewer harmful requests than its base; add it"
    if publication.audit is not None and "base plus" not in text:
        return "does not say that only its bytes are certified ('base plus plan'); add that, or let the card be made"
    return ""


def loading_code(place: str | Path, target: str) -> str:
    """How to load what lies in a folder or a repository."""
    return (ADAPTER_CODE if target == "lora" else LOADING_CODE).format(path=str(place))


def check_belongs(found: Manifest, measured: Mapping[str, Any], what: str) -> None:
    """Refuse a report or an evaluation that was made for another plan (raises RecipeError)."""
    if measured.get("plan_sha256") != found.content["plan_sha256"]:
        raise RecipeError(f"the {what} was made for another plan than the folder holds: validate or run this one again")


def templates() -> Path:
    """The folder of the card templates: inside the installed package, or beside it in a checkout."""
    installed = Path(str(files("steer_bake"))) / "model_cards"
    return installed if installed.is_dir() else installed.parent.parent / "model_cards"


def _harmful_fell(measured: Mapping[str, Any]) -> Literal["clearly", "perhaps"] | None:
    """Whether fewer harmful requests are refused, and whether the interval of the difference leaves zero out."""
    for row in measured["safety"]:
        if row["prompt_set"] == "safety/harmful" and row["difference"] < 0:
            return "clearly" if row["high"] < 0 else "perhaps"
    return None


def _adapter(found: Manifest) -> Mapping[str, Any]:
    """What the card of an adapter says of merging and of who loads it."""
    edits, notes = found.content["plan"]["edits"], {one["note"] for one in found.content["plan"]["decisions"]}
    return {
        "bias": any(edit["tensor"].endswith("bias") for edit in edits),
        "new_bias": any(edit["from"] is None for edit in edits),
        "tied": any("tied" in note for note in notes),
        "revision": found.base["revision"],
    }


def _metadata(
    found: Manifest, origin: str | None, publication: Publication, measured: Mapping[str, Any], *, not_for_all: bool
) -> str:
    """The card's YAML header, in the fields that the hub knows."""
    library, relation = LIBRARIES.get(found.target, ("transformers", "finetune"))
    fields: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if origin:
        fields |= {"base_model": origin, "base_model_relation": relation}
    fields |= publication.licence
    fields["tags"] = ["steer-bake", "activation-steering", *([NOT_FOR_ALL] if not_for_all else [])]
    name = publication.repo or (f"{Path(origin).name}-steered" if origin else "steered")
    results = [_result(row) for row in (*measured["behaviour"], *measured["safety"])] + _damage_results(measured)
    if results:
        fields["model-index"] = [{"name": name.split("/")[-1], "results": results}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=10_000).strip()


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the behaviour table, for the hub's own table: shares of this model, and of the base beside it."""
    metric, named = re.sub(r"\W+", "_", str(row["label"])) + "_rate", f"share of {row['label']}"
    metrics = [
        {"type": metric, "name": f"{named}, {who}", "value": round(side["hits"] / side["total"], 4)}
        for who, side in (("this model", row["baked"]), ("base", row["base"]))
    ]
    return {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": str(row["prompt_set"]), "name": f"{row['prompt_set']} ({row['base']['total']} prompts)"},
        "metrics": metrics,
    }


def _damage_results(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Perplexity and sums, for the hub's own table."""
    damage = measured.get("damage") or {}
    found = [_result(damage["arithmetic"])] if "base" in damage.get("arithmetic", {}) else []
    prose = damage.get("prose")
    if prose and prose["base"] is not None and prose["baked"] is not None:
        values = (("this model", prose["baked"]), ("base", prose["base"]))
        named = {"type": prose["prompt_set"], "name": f"{prose['prompt_set']} ({prose['texts']} texts)"}
        found.append(
            {
                "task": {"type": "text-generation", "name": "Text generation"},
                "dataset": named,
                "metrics": [
                    {"type": "perplexity", "name": f"perplexity, {who}", "value": round(value, 4)}
                    for who, value in values
                ],
            }
        )
    return found


def _gaps(report: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The certificate as distances: what the hooks do to the base, and how far the file is from the hooks."""
    if not report or "effect" not in report:
        return []
    rows = [{"between": "base, and base with hooks (the effect)", **report["effect"]}]
    names = {
        "storage": "base with hooks, and this file in its own dtype",
        "llama.cpp": "base with hooks, and llama.cpp with this vector",
        "llama.cpp, no vector": "base, and llama.cpp without it (how far the GGUF file is from the base)",
    }
    for leg, gap in report["legs"].items():
        rows.append({"between": names.get(leg, f"base with hooks, and this file in float32 ({leg})"), **gap})
    return rows


def _purpose(recipe: str) -> str:
    """What the recipe's author says of it: the comment that it begins with."""
    said = []
    for line in recipe.splitlines():
        if not line.startswith("#"):
            break
        said.append(line.lstrip("# ").rstrip())
    return _escaped(" ".join(said))


def _direction(plan: Mapping[str, Any], recipe: str) -> str:
    """Which estimator found the direction and what it tells apart, where that is known."""
    names = {(one["direction"] or {}).get("estimator") for one in plan["interventions"]} - {None, ""}
    try:
        estimator = (yaml.safe_load(recipe) or {}).get("estimator") or {}
        sides = estimator.get("positive"), estimator.get("negative")
    except (yaml.YAMLError, AttributeError):
        sides = None, None
    if len(names) != 1:
        return ""
    between = f" between `{sides[0]}` and `{sides[1]}` prompts" if all(sides) else ""
    return f"The direction was estimated by `{names.pop()}`{between}."


def _loading(folder: Path, plan: Mapping[str, Any], repo: str | None) -> list[dict[str, Any]]:
    """Every runtime: whether it loads what the plan adds, and how it is started."""
    needs, local = _needs(folder, plan), Path(repo or folder).name
    return [
        {
            "name": one.name,
            "version": one.version[:12] if _COMMIT.fullmatch(one.version) else one.version,
            "loads": None if needs is None else one.loads(plan["model_type"], needs),
            "command": STARTING.get(one.name, "").format(path=repo or folder, folder=local),
        }
        for one in runtimes()
    ]


def _needs(folder: Path, plan: Mapping[str, Any]) -> list[str] | None:
    """What a loader must have for the tensors that the base has not; None where nobody can tell."""
    try:
        layout = architectures.layout(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (UnknownArchitecture, OSError, ValueError):
        return None
    needs = {"layers"} if any(one["layers"] for one in plan["decisions"]) else set()
    blocks = {slot: layout.architecture.blocks(slot) for slot in SLOTS}
    writing = {
        slot: {weight.bias for block in found for weight in (*block.weights, *block.inner)}
        for slot, found in blocks.items()
    }
    heads = {slot: {str(name).partition(".")[0] for name in names} for slot, names in writing.items()}
    stack = f"{layout.architecture.stack}."
    for edit in plan["edits"]:
        name = edit["tensor"]
        if stack not in name:
            needs |= {"untied_head"} if edit["from"] not in (None, name) else set()
        elif edit["from"] is None and name.endswith(".bias"):
            inside = name.partition(stack)[2].partition(".")[2]
            slot = "attention" if inside.partition(".")[0] in heads["attention"] else "mlp"
            writes = any(fnmatch.fnmatchcase(inside, str(bias)) for bias in writing[slot])
            needs.add(f"{slot}_{'output' if writes else 'input'}_bias")
    return sorted(needs)


def _text(value: object) -> str:
    """``value`` as one line that Markdown shows as it is: in a table's cell too, whatever a model has answered."""
    line = _line(value)
    return _escaped(line if len(line) <= LONGEST_ANSWER else line[: LONGEST_ANSWER - 3].rstrip() + "...")


def _escaped(value: str) -> str:
    return _MARKDOWN.sub(r"\\\1", _line(value))


def _line(value: object) -> str:
    return " ".join("".join(one if one.isprintable() else " " for one in str(value)).split())


def _fence(text: str) -> str:
    """A code fence longer than any in ``text``."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _share(share: Mapping[str, Any]) -> str:
    percent = 100 * share["hits"] / share["total"]
    return f"{percent:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _incoherent(row: Mapping[str, Any]) -> str:
    base, baked = row["labels"].get(INCOHERENT, (0, 0))
    return f"{base}, {baked}"
