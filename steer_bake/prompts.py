"""Labelled prompt sets, and the exact tokens a model reads for each prompt.

A set is a JSONL file (one object a line), a YAML list, a packaged set (``safety/harmful``) or a data set of the hub
(``hf:name:split``). A row has ``text`` (or ``prompt``, or ``messages``) and, optionally, ``label``, ``category``,
``split``, ``system`` and ``pair`` (or ``id``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import RecipeError, did_you_mean

PACKAGED = Path(__file__).parent / "prompt_sets"
POSITIONS = ("last", "mean", "instruction")

_CONTENT_KEYS = ("text", "prompt", "messages")
_ROW_KEYS = (*_CONTENT_KEYS, "label", "category", "topic", "split", "system", "pair", "id")
# Stands for the instruction while its place in the rendered template is looked for: nothing a template would change.
_PLACEHOLDER = "steerbakeinstructionplaceholder"

Message = tuple[str, str]  # (role, content)


@dataclass(frozen=True)
class Prompt:
    """What is asked, before tokenisation: chat messages, or raw text that no template touches."""

    messages: tuple[Message, ...] = ()  # empty when ``text`` is raw
    text: str | None = None
    label: str | None = None
    category: str | None = None
    split: str | None = None
    pair: str | None = None  # rows that share it differ in their label only

    @property
    def beginning(self) -> str:
        """The first words of the last message (or of the text), for messages to the user."""
        content = " ".join((self.messages[-1][1] if self.messages else self.text or "").split())
        return content if len(content) <= 60 else f"{content[:57]}..."


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from and what is taken of them."""

    path: str  # a file, a packaged set's name, or hf:<data set>[@revision][:<configuration>]:<split>
    system: str | Mapping[str, str | None] | None = None  # one for all rows, or one per label
    label: str | None = None  # the label of every row, whatever the row says
    split: str | None = None  # only rows of this split
    category: str | None = None  # only rows of this category
    chat: Literal["auto", False] = "auto"  # False: ``text`` is raw even where the tokenizer has a chat template
    text_column: str | None = None  # data sets of the hub only; default: text, prompt or messages
    label_column: str | None = None  # data sets of the hub only; default: label
    limit: int | None = None  # the first so many rows of each label


@dataclass(frozen=True)
class Encoded:
    """The tokens of one prompt and where they are read: the mean over tokens ``[start, stop)``."""

    ids: tuple[int, ...]
    start: int
    stop: int
    beginning: str = field(default="", compare=False)  # the prompt's first words, for messages to the user


def load(source: str | Path | PromptSource, *, folder: Path) -> list[Prompt]:
    """The prompts of ``source`` in its order; relative paths start at ``folder``.

    A ``system`` prompt per label makes one prompt per label out of every row that has no label of its own; those share
    ``pair``. This is the short way to write contrastive pairs.

    Raises:
        RecipeError: no such set, a malformed row (named by file and line), or nothing left of the set.
    """
    wanted = source if isinstance(source, PromptSource) else PromptSource(str(source))
    made = [
        prompt
        for index, (where, row) in enumerate(_rows(wanted, folder))
        for prompt in _instances(row, where, index, wanted)
    ]
    if not made:
        raise RecipeError(f"prompt set {wanted.path!r} is empty; give at least one row with a text")
    return _limited(_chosen(made, wanted), wanted.limit)


def require_labels(prompts: Sequence[Prompt], labels: Iterable[str]) -> None:
    """Check that every one of ``labels`` has a prompt.

    Raises:
        RecipeError: a label has none; the message names the labels that are there.
    """
    there = sorted({prompt.label for prompt in prompts if prompt.label is not None})
    missing = [label for label in labels if label not in there]
    if missing:
        have = f"the set has {', '.join(map(repr, there))}" if there else "no row of the set has a label"
        raise RecipeError(
            f"no prompt is labelled {' or '.join(map(repr, missing))}: {have}; add rows or rename the label"
        )


def in_pairs(prompts: Sequence[Prompt], positive: str, negative: str) -> list[Prompt]:
    """The prompts of two labels, all of ``positive`` and then all of ``negative``, the n-th rows belonging together.

    They are matched by ``pair`` where every row has one, and by their order where none has.

    Raises:
        RecipeError: a label is missing, or rows are left without a partner.
    """
    require_labels(prompts, [positive, negative])
    sides = [[prompt for prompt in prompts if prompt.label == label] for label in (positive, negative)]
    if any(prompt.pair is not None for side in sides for prompt in side):
        keys = [[prompt.pair for prompt in side] for side in sides]
        if len(set(keys[0])) != len(keys[0]) or set(keys[0]) != set(keys[1]) or len(keys[0]) != len(keys[1]):
            odd = sorted(set(map(str, keys[0])) ^ set(map(str, keys[1])))[:5]
            what = f"without a partner: {', '.join(odd)}" if odd else "a pair occurs twice"
            raise RecipeError(
                f"{positive!r} and {negative!r} cannot be paired ({what}); give each pair one row of each label"
            )
        place = {key: index for index, key in enumerate(keys[0])}
        sides[1].sort(key=lambda prompt: place[prompt.pair])
    elif len(sides[0]) != len(sides[1]):
        raise RecipeError(
            f"{len(sides[0])} prompts are labelled {positive!r} and {len(sides[1])} {negative!r}: "
            "pairs need as many of each; give the rows a 'pair' or choose an estimator without pairs"
        )
    return sides[0] + sides[1]


# --- rows


def _rows(source: PromptSource, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with the words that name its place."""
    if source.path.startswith("hf:"):
        yield from _dataset_rows(source)
        return
    if source.text_column or source.label_column:
        raise RecipeError(
            f"{source.path!r}: text_column and label_column are for hf: data sets; rename the keys in the file"
        )
    path = _resolve(source.path, folder)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"prompt set {path} cannot be read as UTF-8 text: {error}") from error
    yield from (_json_rows if path.suffix == ".jsonl" else _yaml_rows)(path, content)


def _resolve(path: str, folder: Path) -> Path:
    for candidate in (folder / path, PACKAGED / f"{path}.jsonl"):
        if candidate.is_file():
            if candidate.suffix not in (".jsonl", ".yaml", ".yml"):
                raise RecipeError(
                    f"prompt set {candidate} is neither .jsonl nor .yaml; a data set of another format: hf:"
                )
            return candidate
    packaged = [found.relative_to(PACKAGED).with_suffix("").as_posix() for found in PACKAGED.rglob("*.jsonl")]
    raise RecipeError(
        f"no prompt set {path!r}: {folder / path} is not a file, and packaged sets are another matter "
        f"({did_you_mean(path, packaged)}); a data set of the hub is written hf:{path}"
    )


def _json_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(
                f'{where}: not JSON ({error.msg}); each line is one object like {{"text": ...}}'
            ) from error
        yield where, _checked(row, where)


def _yaml_rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = yaml.safe_load(content)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from error
    if not isinstance(rows, list):
        if rows is None:
            return
        raise RecipeError(f"{path}: a prompt set is a list of rows ('- text: ...'), not a {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _checked({"text": row} if isinstance(row, str) else row, where)


def _dataset_rows(source: PromptSource) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError(f"{source.path!r} needs the datasets library: pip install 'steer-bake[datasets]'") from error
    name, *rest = source.path.removeprefix("hf:").split(":")
    if len(rest) > 2 or not name:
        raise RecipeError(f"{source.path!r}: write hf:name:split or hf:name:configuration:split")
    name, _, revision = name.partition("@")
    configuration, split = (rest[0] if len(rest) == 2 else None), (rest[-1] if rest else "train")
    try:
        table = datasets.load_dataset(name, configuration, split=split, revision=revision or None)
    except Exception as error:  # the library raises whatever its readers, the network and the hub raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(f"data set {source.path!r} cannot be loaded: {reason}") from error
    columns = list(table.column_names)
    text = source.text_column or next((key for key in _CONTENT_KEYS if key in columns), None)
    label = source.label_column or ("label" if "label" in columns else None)
    if text is None:
        raise RecipeError(
            f"{source.path!r} has columns {', '.join(columns)}: say which holds the prompt with text_column"
        )
    for column in (text, label):
        if column is not None and column not in columns:
            raise RecipeError(f"{source.path!r} has no column {column!r}: {did_you_mean(column, columns)}")
    names = getattr(table.features[label], "names", None) if label else None  # a ClassLabel stores numbers
    kept = {key: key for key in ("category", "pair", "id") if key in columns}
    for number, item in enumerate(table):
        row = {key: str(item[column]) for key, column in kept.items() if item[column] is not None}
        row["messages" if isinstance(item[text], list) else "text"] = item[text]
        if label and item[label] is not None:
            row["label"] = names[item[label]] if names else str(item[label])
        where = f"{source.path}, row {number}"
        yield where, _checked(row, where)


def _checked(row: object, where: str) -> dict[str, Any]:
    """``row`` where its keys and their types are right."""
    if not isinstance(row, dict):
        raise RecipeError(f"{where}: a row is an object with a text, not a {type(row).__name__}")
    for key in row:
        if key not in _ROW_KEYS:
            raise RecipeError(f"{where}: unknown key {key!r}: {did_you_mean(str(key), _ROW_KEYS)}")
    contents = [key for key in _CONTENT_KEYS if key in row]
    if len(contents) != 1:
        have = f"this one has {' and '.join(contents)}" if contents else "this one has none of them"
        raise RecipeError(f"{where}: a row has one of text, prompt or messages; {have}")
    for key in ("text", "prompt", "label", "category", "split", "system"):
        if key in row and not isinstance(row[key], str) and not (row[key] is None and key not in _CONTENT_KEYS):
            raise RecipeError(f"{where}: {key!r} is {row[key]!r}, which is not a text; put it in quotes")
    for key in ("pair", "id"):
        if isinstance(row.get(key), (dict, list)):
            raise RecipeError(f"{where}: {key!r} is {row[key]!r}; give a text or a number")
    return row


# --- rows to prompts


def _instances(row: dict[str, Any], where: str, index: int, source: PromptSource) -> Iterator[Prompt]:
    """The prompts one row stands for: one, or one per label of a system mapping."""
    label = source.label if source.label is not None else row.get("label")
    pair = row.get("pair", row.get("id"))
    if isinstance(source.system, Mapping):
        if label is not None and label not in source.system:
            raise RecipeError(f"{where}: no system prompt for label {label!r}: {did_you_mean(label, source.system)}")
        pair = index if pair is None else pair
        systems = source.system if label is None else {label: source.system[label]}
    else:
        systems = {label: source.system}
    for name, system in systems.items():
        messages = _messages(row, where, system)
        made = Prompt(messages, None, name, row.get("category"), row.get("split"), None if pair is None else str(pair))
        if source.chat is False:
            if len(messages) != 1 or "messages" in row:
                raise RecipeError(f"{where}: chat: false takes plain texts, no messages and no system prompt")
            made = replace(made, messages=(), text=messages[0][1])
        yield made


def _messages(row: dict[str, Any], where: str, system: str | None) -> tuple[Message, ...]:
    if "messages" in row:
        messages = _conversation(row["messages"], where)
    else:
        messages = (("user", row["text"] if "text" in row else row["prompt"]),)
    system = row["system"] if row.get("system") is not None else system
    if system is None or messages[0][0] == "system":
        return messages
    return (("system", system), *messages)


def _conversation(messages: object, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise RecipeError(f'{where}: messages is a list like [{{"role": "user", "content": ...}}]')
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise RecipeError(f"{where}: a message has the keys role and content; this one is {message!r}")
        if not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise RecipeError(f"{where}: role and content of a message are texts; this one is {message!r}")
    return tuple((message["role"], message["content"]) for message in messages)


def _chosen(prompts: list[Prompt], source: PromptSource) -> list[Prompt]:
    for key, wanted in (("split", source.split), ("category", source.category)):
        if wanted is None:
            continue
        there = {str(value) for prompt in prompts if (value := getattr(prompt, key)) is not None}
        prompts = [prompt for prompt in prompts if getattr(prompt, key) == wanted]
        if not prompts:
            raise RecipeError(
                f"prompt set {source.path!r} has no row of {key} {wanted!r}: {did_you_mean(wanted, there)}"
            )
    return prompts


def _limited(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    if limit is None:
        return prompts
    if limit < 1:
        raise RecipeError(f"limit is {limit}; give at least 1 or leave it out")
    taken: dict[str | None, int] = {}
    kept = []
    for prompt in prompts:
        taken[prompt.label] = taken.get(prompt.label, 0) + 1
        if taken[prompt.label] <= limit:
            kept.append(prompt)
    return kept


# --- prompts to tokens


def encode(tokenizer: Any, prompts: Sequence[Prompt], position: str | int = "last") -> list[Encoded]:
    """The tokens generation would see for each prompt, and the tokens that are read.

    Messages go through the tokenizer's chat template with the generation prompt; a conversation that ends with an
    assistant message is continued instead. Without a template a single user message is raw text.

    Args:
        tokenizer: a transformers tokenizer.
        position: ``last`` (the token that predicts the answer), an offset (``-1`` is last, ``0`` the first token),
            ``mean`` (of all tokens) or ``instruction`` (mean over the content of the last user message).

    Raises:
        RecipeError: an unknown position, an empty prompt, or one the template or the position does not fit.
    """
    return [_encode(tokenizer, prompt, _position(position)) for prompt in prompts]


def check_length(encoded: Sequence[Encoded], limit: int, new_tokens: int = 0) -> None:
    """Check that every prompt fits ``limit`` tokens (the model's context) together with ``new_tokens`` of an answer.

    Raises:
        RecipeError: one has more; the message names the prompt, its length and the limit.
    """
    for one in encoded:
        if len(one.ids) + new_tokens > limit:
            answer = f", {new_tokens} more are asked for," if new_tokens else ""
            raise RecipeError(
                f"the prompt {one.beginning!r} has {len(one.ids)} tokens{answer} and the model's context is {limit}; "
                "shorten it"
            )


def _position(position: str | int) -> str | int:
    if isinstance(position, int) or position in POSITIONS:
        return position
    try:
        return int(position)
    except ValueError:
        known = f"{did_you_mean(position, POSITIONS)} Known: {', '.join(POSITIONS)} or a token offset like -5"
        raise RecipeError(f"unknown read position {position!r}: {known}") from None


def _encode(tokenizer: Any, prompt: Prompt, position: str | int) -> Encoded:
    templated = bool(prompt.messages) and bool(getattr(tokenizer, "chat_template", None))
    if templated:
        ids = tuple(_template(tokenizer, prompt, prompt.messages, tokenize=True, return_dict=True)["input_ids"])
    else:
        ids = tuple(tokenizer(_raw(prompt))["input_ids"])
    if not ids:
        raise RecipeError("a prompt is empty: it has no token to read")
    start, stop = (
        _instruction(tokenizer, prompt, ids, templated) if position == "instruction" else _span(position, ids, prompt)
    )
    return Encoded(ids, start, stop, prompt.beginning)


def _raw(prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    if len(prompt.messages) != 1:
        raise RecipeError(
            f"the prompt {prompt.beginning!r} has a system prompt or several messages, and this tokenizer has no chat "
            "template to put them together; use plain texts or a chat model"
        )
    return prompt.messages[0][1]


def _template(tokenizer: Any, prompt: Prompt, messages: Sequence[Message], **options: bool) -> Any:
    from jinja2 import TemplateError

    answering = messages[-1][0] == "assistant"  # an answer that is begun is continued, not followed by another one
    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=not answering, continue_final_message=answering, **options
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(role for role, _ in messages)
        raise RecipeError(
            f"the chat template refuses the prompt {prompt.beginning!r} (roles: {roles}): {error}"
        ) from error


def _span(position: str | int, ids: tuple[int, ...], prompt: Prompt) -> tuple[int, int]:
    if position == "mean":
        return 0, len(ids)
    offset = -1 if position == "last" else int(position)
    if not -len(ids) <= offset < len(ids):
        raise RecipeError(f"read position {offset}: the prompt {prompt.beginning!r} has only {len(ids)} tokens")
    start = offset % len(ids)
    return start, start + 1


def _instruction(tokenizer: Any, prompt: Prompt, ids: tuple[int, ...], templated: bool) -> tuple[int, int]:
    """Tokens ``[start, stop)`` of the last user message's content."""
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(
            "read position 'instruction' needs a fast tokenizer (one with tokenizer.json); use 'last' or 'mean'"
        )
    if templated:
        text, first, last = _instruction_in_template(tokenizer, prompt)
    else:
        text = _raw(prompt)
        first, last = 0, len(text)
    found = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    inside = [place for place, (low, high) in enumerate(found["offset_mapping"]) if high > first and low < last]
    if tuple(found["input_ids"]) != ids or not inside:
        raise RecipeError(
            f"the instruction of the prompt {prompt.beginning!r} cannot be found among its tokens; read 'last'"
        )
    return inside[0], inside[-1] + 1


def _instruction_in_template(tokenizer: Any, prompt: Prompt) -> tuple[str, int, int]:
    """The rendered text and the characters of the instruction in it.

    It is looked for by rendering a placeholder in its stead: its own words may occur elsewhere in the text.
    """
    place = max((i for i, (role, _) in enumerate(prompt.messages) if role == "user"), default=None)
    if place is None:
        raise RecipeError(f"the prompt {prompt.beginning!r} has no user message; read 'last' or 'mean'")
    stand_in = [*prompt.messages[:place], ("user", _PLACEHOLDER), *prompt.messages[place + 1 :]]
    text = str(_template(tokenizer, prompt, prompt.messages, tokenize=False))
    head, *tails = str(_template(tokenizer, prompt, stand_in, tokenize=False)).split(_PLACEHOLDER)
    if len(tails) != 1 or not text.startswith(head) or not text.endswith(tails[0]):
        raise RecipeError(f"the chat template rewrites the prompt {prompt.beginning!r}; read 'last' or 'mean' instead")
    return text, len(head), len(text) - len(tails[0])
