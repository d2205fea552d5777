"""The model card of a baked folder: README.md from a template in ``model_cards/``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from . import manifest
from .errors import RecipeError
from .judges import INCOHERENT

LOADING_CODE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({path!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({path!r})"""

LONGEST_ANSWER = 220  # characters of an example

_UNMEASURED: Mapping[str, Any] = {
    "behaviour": [], "safety": [], "safety_measured": False, "examples": [], "judge": None, "repetition_penalty": None
}  # fmt: skip
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~])")


def render(
    folder: Path, report: Mapping[str, Any], evaluation: Mapping[str, Any] | None, template: Path | None = None
) -> str:
    """The card's text for the baked ``folder``, out of its manifest, its report and what was measured of its behaviour.

    Raises:
        RecipeError: the template cannot be read or does not work, or ``report`` or ``evaluation`` is something else.
        CheckpointError: the folder has no readable manifest.
    """
    found = manifest.read(folder)
    measured = _UNMEASURED if evaluation is None else evaluation
    wanted = ((report, "report", ("checks", "interventions", "passed")), (measured, "evaluation", tuple(_UNMEASURED)))
    for content, what, keys in wanted:
        missing = [key for key in keys if key not in content]
        if missing:
            raise RecipeError(f"the {what} of {folder} has no {missing[0]!r}: give the file that steer-bake wrote")
    _belongs(found, report, f"report of {folder}")
    if evaluation is not None:
        _belongs(found, evaluation, f"evaluation of {folder}")
    fell = _harmful_fell(measured)
    base, recipe = found.base, found.content["recipe"]
    origin = base["hub_id"] or base["original"]
    path = template or templates() / "checkpoint.md"
    environment = Environment(
        loader=FileSystemLoader(path.parent), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.filters["text"] = _text
    try:
        return environment.get_template(path.name).render(
            metadata=_metadata(origin, not_for_all=fell == "clearly"),
            title=f"{_text(Path(origin or base['name']).name)}, steered",
            base=base,
            origin=origin,
            interventions=report["interventions"],
            code=LOADING_CODE.format(path=str(folder)),
            report=report,
            edits=found.content["plan"]["edits"],
            config_changes=found.content["plan"]["config_changes"],
            model_type=found.content["plan"]["model_type"],
            rehoused_from=found.content["plan"].get("rehoused_from"),
            gates=report.get("gates", ()),
            openings=measured.get("gates", ()),
            recipe=recipe,
            fence=_fence(recipe or ""),
            tool=found.content["tool"],
            harmful_fell=fell,
            share=_share,
            incoherent=_incoherent,
            **{name: measured[name] for name in _UNMEASURED},
        )
    except (TemplateError, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the card template {path} does not work: {error or 'it cannot be found'}") from error


def _belongs(found: manifest.Manifest, measured: Mapping[str, Any], what: str) -> None:
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


def _metadata(origin: str | None, *, not_for_all: bool) -> str:
    """The card's YAML header, in the fields that the hub knows."""
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if origin:
        fields |= {"base_model": origin, "base_model_relation": "finetune"}
    fields["tags"] = ["steer-bake", "activation-steering", *(["not-for-all-audiences"] if not_for_all else [])]
    return yaml.safe_dump(fields, sort_keys=False).strip()


def _text(value: object) -> str:
    """``value`` as one line that Markdown shows as it is: in a table's cell too, whatever a model has answered."""
    line = " ".join("".join(one if one.isprintable() else " " for one in str(value)).split())
    if len(line) > LONGEST_ANSWER:
        line = line[: LONGEST_ANSWER - 3].rstrip() + "..."
    return _MARKDOWN.sub(r"\\\1", line)


def _fence(text: str) -> str:
    """A code fence longer than any in ``text``."""
    return "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _share(share: Mapping[str, Any]) -> str:
    percent = 100 * share["hits"] / share["total"]
    return f"{percent:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]"


def _incoherent(row: Mapping[str, Any]) -> str:
    base, baked = row["labels"].get(INCOHERENT, (0, 0))
    return f"{base}, {baked}"
