"""What ``runtimes.yaml`` says of other programs: checked entries only, and unknown where nothing was read."""

from __future__ import annotations

import re

import pytest
from transformers import CONFIG_MAPPING

from steer_bake.architectures import claimed
from steer_bake.runtimes import FEATURES, Entry, runtimes

COVERED = (
    *("llama", "qwen2", "qwen3", "mistral", "mixtral", "phi3", "gemma", "gemma2", "gemma3_text", "olmo2", "gpt2"),
    *("gpt_neox", "granite", "deepseek_v3", "gpt_oss"),
)
BY_NAME = {one.name: one for one in runtimes()}
ENTRIES = [
    pytest.param(entry, id=f"{one.name}-{model_type}")
    for one in runtimes()
    for model_type, entry in [*one.types.items(), *([("every", one.every)] if one.every else [])]
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_says_where_and_when_it_was_read(entry: Entry) -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", entry.date)
    assert len(entry.source) > 10
    assert set(entry.honours) <= set(FEATURES)
    assert all(isinstance(value, bool) for value in entry.honours.values())


@pytest.mark.parametrize("name", ["vllm", "llama.cpp", "mlx"])
def test_the_common_families_are_covered(name: str) -> None:
    assert set(COVERED) <= set(BY_NAME[name].types)
    assert BY_NAME[name].version


def test_every_entry_is_of_a_type_that_can_be_baked() -> None:
    for one in runtimes():
        assert set(one.types) <= set(claimed()) & set(CONFIG_MAPPING)


def test_what_was_not_read_is_unknown_and_one_missing_feature_is_a_no() -> None:
    assert BY_NAME["vllm"].loads("unheard_of", []) is None
    assert BY_NAME["vllm"].loads("qwen2", ["layers"]) is True
    assert BY_NAME["vllm"].loads("qwen2", ["layers", "mlp_output_bias"]) is False
    assert BY_NAME["vllm"].loads("mixtral", ["layers", "mlp_output_bias"]) is None
    assert BY_NAME["transformers"].loads("anything", FEATURES) is True
