"""YAML to a typed recipe. The only place where pydantic is used: behind it everything is a plain dataclass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError, did_you_mean
from .prompts import Prompt, PromptSource, load


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prompts(_Section):
    """A prompt set: a path, a packaged set's name, ``hf:name:split``, or a mapping with options."""

    path: str
    system: str | dict[str, str | None] | None = None
    label: str | None = None
    split: str | None = None
    category: str | None = None
    labels: list[str] | None = None
    topics: list[str] | None = None
    chat: Literal["auto", False] = "auto"
    text_column: str | None = None
    label_column: str | None = None
    limit: Annotated[int, Field(gt=0)] | None = None

    def load(self, folder: Path) -> list[Prompt]:
        """The prompts, relative paths starting at ``folder`` (the recipe's own)."""
        return load(PromptSource(**self.model_dump()), folder=folder)


def _path_as_mapping(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


def _as_names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_as_names)]
PromptSet = Annotated[Prompts, BeforeValidator(_path_as_mapping)]
Sites = str | list[str]


class Read(_Section):
    """Where directions are read: which sites, and which of each prompt's tokens."""

    sites: Sites | None = None  # default: the sites of the interventions
    position: str | int = "last"


class Answers(_Section):
    """Of the positive prompts only those whose answer (their last message) gets ``label`` from ``judge``."""

    judge: str = "phrases"
    label: str = "refusal"


class Combine(_Section):
    """One vector learned in the span of the directions of all categories of the positive prompts."""

    epochs: Annotated[int, Field(gt=0)] = 5
    rate: Annotated[float, Field(gt=0)] = 0.02  # of AdamW
    batch: Annotated[int, Field(gt=0)] = 8  # prompts of each side
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    ridge: Annotated[float, Field(gt=0)] = 1e-4  # of the benign covariance
    relative: bool = False  # the ridge as a multiple of trace / d
    units: Literal["dose", "unit"] = "dose"  # what length 1 is: the mean stream norm at the site, or 1
    seed: int = 0


class Estimator(_Section):
    """How a direction is computed from the labelled prompts of one set, or of several."""

    name: str = "mean_difference"
    positive: str
    negative: str
    neutral: str | None = None  # a label: prompts that are neither
    prompts: Names = ["train"]  # which of the recipe's prompt sets
    category: str | None = None  # of the positive prompts only this one
    options: dict[str, bool | int | float | str] = {}  # the estimator's own
    orthogonal_to: str | None = None  # a label of that set: its mean activation is projected out of the direction
    scores: Literal["prompts", "opening"] = "prompts"  # where c(x) comes from: the rows, or how the answer would open
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = (
        None  # labels by c(x): above it positive, below -it negative
    )
    openings: list[str] | None = None  # how refusals begin; default: the common English ways
    scale: Literal["natural", "quantile"] = "natural"
    validation: Names | None = None  # for the quantiles; default: prompts
    answers: Answers | None = None
    model: str | None = None  # a sibling of the recipe's model that directions are estimated on
    separates: Annotated[float, Field(ge=0.5, le=1)] = 0.75  # how well they must then tell the sides apart in ours
    combine: Combine | None = None


class LoadDirection(_Section):
    load: str


class Gate(_Section):
    """Where an added vector is open: a probe of what the MLP of each site reads, fitted on labelled prompts."""

    probe: str = "logistic"
    positive: Names = []  # labels of the prompts on which it opens
    negative: Names = []  # and of those on which it stays closed
    prompts: Names = ["train"]  # sets; a text without a chat template (``chat: false``) is read whole
    validation: Names | None = None  # that the threshold is chosen on; default: every fifth prompt of ``prompts``
    unrelated: list[str] = []  # sets on which it should stay closed, beside the packaged plain texts
    position: Literal["answer", "last"] = "answer"  # from the end of the instruction on, or from the last token on
    generated: Annotated[int, Field(ge=0)] = 8  # tokens of the model's own answer that are read as well
    threshold: Literal["youden"] | float = "youden"  # or log-odds
    width: Annotated[float, Field(gt=0)] = 2.0  # log-odds from closed to open
    sharpness: Annotated[float, Field(ge=1)] = 8.0
    otherwise: float | None = None  # a coefficient: this much of the vector is added where the gate is closed
    name: str = ""  # what it is called in reports; default: its positive labels
    load: str | None = None  # a gate file instead of prompts

    @property
    def called(self) -> str:
        return self.name or "+".join(self.positive)

    @model_validator(mode="after")
    def _consistent(self) -> Gate:
        if self.load is None and not (self.positive and self.negative):
            raise ValueError("a gate needs the labels 'positive' and 'negative', or 'load: FILE'")
        if set(self.positive) & set(self.negative):
            raise ValueError(f"{min(set(self.positive) & set(self.negative))!r} is both positive and negative")
        return self


class Intervention(_Section):
    """What is done with the direction, and where."""

    name: str = "add"
    sites: Sites
    coefficient: float | dict[int, float] = 1.0  # one number, or one per layer
    units: Literal["scale", "unit", "dose"] = "scale"
    direction: LoadDirection | None = None  # this intervention's own direction instead of the recipe's
    from_site: str | None = Field(default=None, alias="from")  # use the direction of this site at every site
    gate: Gate | None = None


class Target(_Section):
    name: str = "checkpoint"
    # where several representations are exact; keep_class also rules out a model class other than the base's
    prefer: Annotated[
        str, Field(pattern=r"^(smallest|bit_exact|widest_loading|keep_class|approximate|rehouse(:\w+)?)$")
    ] = "smallest"
    pad_to: Annotated[int, Field(gt=0)] = 64  # what gates make the number of an MLP's neurons a multiple of


class Validate(_Section):
    prompts: PromptSet = Prompts(path="plain", limit=24)
    decode_tokens: Annotated[int, Field(gt=0)] = 24
    stream: bool = False  # for a model larger than memory: its weights stay on disk


class Evaluate(_Section):
    """What the steering is for, measured: the share of answers to which ``judge`` gives ``label``."""

    judge: str = "phrases"
    judge_options: dict[str, Any] = {}  # what the judge takes: a model, an endpoint, the name of a key's variable
    label: str = "refusal"
    sets: list[str] = ["test"]
    max_new_tokens: Annotated[int, Field(gt=0)] = 48
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0  # of greedy decoding, for base and baked alike


class Damage(_Section):
    """How much is measured of what the steering costs elsewhere, beside the perplexity of the packaged texts."""

    problems: Annotated[int, Field(gt=0)] = 40  # sums to work out
    max_new_tokens: Annotated[int, Field(gt=0)] = 160  # of each answer


def _as_section(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class Recipe(_Section):
    """One YAML file: one reproducible result."""

    model: str
    prompts: dict[str, PromptSet] = {}
    read: Read = Read()
    estimator: Estimator | None = None
    direction: LoadDirection | None = None
    intervention: Annotated[list[Intervention], BeforeValidator(_as_list)]
    target: Target = Target()
    validation: Validate = Field(default=Validate(), alias="validate")
    evaluate: Evaluate | None = None
    safety: bool = True
    damage: Annotated[Damage | None, BeforeValidator(_as_section)] = Damage()  # false: not measured

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.estimator and self.direction:
            raise ValueError("give either 'estimator' or 'direction', not both")
        if not self.estimator and not self.direction and any(one.direction is None for one in self.intervention):
            raise ValueError(
                "a direction is needed: 'estimator: {positive: ..., negative: ...}' or 'direction: {load: FILE}'"
            )
        if self.estimator and self.estimator.positive == self.estimator.negative:
            raise ValueError(f"'positive' and 'negative' are both {self.estimator.positive!r}: name two labels")
        if self.estimator and self.estimator.combine and self.estimator.category:
            raise ValueError("'combine' takes every category: leave out 'category'")
        for name in self.prompts:
            if name.startswith("safety/"):
                raise ValueError(f"the prompt set {name!r} needs another name: 'safety/...' are the packaged sets")
        gates = [one.gate for one in self.intervention if one.gate and not one.gate.load]
        called = [gate.called for gate in gates]
        twice = next((name for name in called if called.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two gates are called {twice!r}: give each a 'name' of its own")
        named = [*self.estimator.prompts, *(self.estimator.validation or [])] if self.estimator else []
        for gate in gates:
            named += [*gate.prompts, *(gate.validation or []), *gate.unrelated]
        for name in [*named, *(self.evaluate.sets if self.evaluate else [])]:
            if name not in self.prompts:
                raise ValueError(f"there is no prompt set {name!r} under 'prompts': {did_you_mean(name, self.prompts)}")
        return self


def read(path: Path) -> tuple[Recipe, str]:
    """The recipe in a YAML file, and its text as it is.

    Raises:
        RecipeError: the file cannot be read, is no YAML mapping, or a key or value is wrong; an unknown key is named
            with the nearest known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    return parse(text, str(path)), text


def parse(text: str, name: str = "recipe") -> Recipe:
    """The recipe in a YAML text (raises as :func:`read` does)."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{name} must be a mapping that begins with 'model:'; see recipes/quickstart.yaml")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{name}: " + "; ".join(_sentences(content, error))) from error


def _sentences(content: dict[str, Any], error: ValidationError) -> list[str]:
    """One sentence per place that is wrong (pydantic has one per member of a union)."""
    said: dict[str, list[str]] = {}
    for one in error.errors():
        where, given = _place(content, one["loc"])
        if one["type"] == "extra_forbidden":
            *parents, key = one["loc"]
            said[where] = [f"unknown key {where!r}: {did_you_mean(str(key), _known_keys(parents))}"]
            continue
        message = str(one["msg"]).removeprefix("Value error, ")
        if one["type"] == "missing":
            message = "is missing"
        elif one["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {given!r:.80}"
        said.setdefault(where, []).append(f"{where!r}: {message}" if where else message)
    return [messages[0] if len(messages) == 1 else " or ".join(messages) for messages in said.values()]


def _place(content: Any, loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """The dotted name of a place in the YAML and what is there; the names that pydantic gives to types are left out."""
    parts: list[str] = []
    here = content
    for part in loc:
        if isinstance(here, list) and isinstance(part, int):
            parts, here = [*parts, str(part)], here[part]
        elif isinstance(here, dict) and part in here:
            parts.append(str(part))
            here = here[part]
        elif part == loc[-1] and isinstance(here, dict):  # a key that is missing
            parts.append(str(part))
    return ".".join(parts), here


def _known_keys(parents: list[Any]) -> list[str]:
    """The keys that a section has, found by walking the types along ``parents``."""
    section: type[BaseModel] = Recipe
    for part in parents:
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        section = (_section_in(fields[part].annotation) if part in fields else None) or section
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_in(inner)
        if found is not None:
            return found
    return None
