"""The functions that notebooks call."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from pronghorn.data.inspect import inspect_data
from pronghorn.data.notebook import (
    get_chat_template,
    standardize_data_formats,
    standardize_sharegpt,
    to_sharegpt,
)
from pronghorn.errors import DataError
from tests.data.families import CHAT, FAMILIES, tokenizer

SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
    },
    {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
]


def test_standardize_from_value() -> None:
    data = standardize_sharegpt(datasets.Dataset.from_list(SHAREGPT))
    assert data[0]["conversations"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert standardize_sharegpt is standardize_data_formats


def test_standardize_keeps_other_columns_and_other_datasets() -> None:
    rows = [{**row, "id": number} for number, row in enumerate(SHAREGPT)]
    assert standardize_data_formats(datasets.Dataset.from_list(rows))["id"][:] == [0, 1]
    plain = datasets.Dataset.from_list([{"text": "a"}])
    assert standardize_data_formats(plain) is plain


def test_standardize_names_row_and_role() -> None:
    rows = [*SHAREGPT, {"conversations": [{"from": "alien", "value": "x"}]}]
    with pytest.raises(DataError, match="row 3: 'alien' is no known role"):
        standardize_data_formats(datasets.Dataset.from_list(rows))
    data = standardize_data_formats(datasets.Dataset.from_list(rows), aliases_for_user=("human", "alien"))
    assert data[2]["conversations"] == [{"role": "user", "content": "x"}]
    with pytest.raises(DataError, match="row 1: a turn has the keys who, says"):
        standardize_data_formats(datasets.Dataset.from_list([{"messages": [{"who": "x", "says": "y"}]}]))


ALPACA = [
    {"instruction": "Add", "input": "1 {x} [[y]]", "output": "2"},
    {"instruction": "Say", "input": "", "output": "hi"},
]


def test_to_sharegpt_fills_slots_and_drops_empty_parts() -> None:
    data = to_sharegpt(datasets.Dataset.from_list(ALPACA), "{instruction}[[\nInput: {input}]]!")
    assert data.column_names == ["conversations"]
    assert [row["conversations"][0]["value"] for row in data] == ["Add\nInput: 1 {x} [[y]]!", "Say!"]
    assert data[0]["conversations"][1] == {"from": "gpt", "value": "2"}


def test_to_sharegpt_extends_conversations_with_each_row_once() -> None:
    rows = [{"instruction": str(number), "output": str(number)} for number in range(20)]
    data = to_sharegpt(datasets.Dataset.from_list(rows), conversation_extension=3)
    assert all(len(row["conversations"]) == 6 for row in data)
    assert sorted(int(row["conversations"][2]["value"]) for row in data) == list(range(20))
    again = to_sharegpt(datasets.Dataset.from_list(rows), conversation_extension=3)
    assert again[:] == data[:]


def test_to_sharegpt_names_missing_columns() -> None:
    with pytest.raises(DataError, match="no column answer; there are instruction, input, output"):
        to_sharegpt(datasets.Dataset.from_list(ALPACA), output_column_name="answer")


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma", "phi-3", "zephyr", "vicuna"])
def test_get_chat_template(name: str) -> None:
    family = FAMILIES[name]
    tok = get_chat_template(tokenizer(family, None), name)
    assert tok.apply_chat_template(CHAT, tokenize=False) == family.rendered
    assert tok.eos_token == {"gemma": "<end_of_turn>", "phi-3": "<|end|>"}.get(name, family.eos)


def test_get_chat_template_keeps_eos_if_told() -> None:
    tok = get_chat_template(tokenizer(FAMILIES["gemma"], None), "gemma", map_eos_token=False)
    assert tok.eos_token == "<eos>"


def test_get_chat_template_maps_keys_and_still_reads_messages() -> None:
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    tok = get_chat_template(tokenizer(FAMILIES["chatml"], None), "chatml", mapping)
    back = {"user": "human", "assistant": "gpt", "system": "system"}
    own: list[Any] = [{"from": back[m["role"]], "value": m["content"]} for m in CHAT]
    expected = FAMILIES["chatml"].rendered
    assert tok.apply_chat_template(own, tokenize=False) == expected
    assert tok.apply_chat_template(CHAT, tokenize=False) == expected
    inspection = inspect_data([{"conversations": own}], tok, isolate=False)
    assert inspection.report.failed(stops=True) == ()


def test_get_chat_template_system_message() -> None:
    tok = get_chat_template(tokenizer(FAMILIES["chatml"], None), "chatml", system_message="Be brief.")
    assert tok.apply_chat_template(CHAT[1:], tokenize=False) == FAMILIES["chatml"].rendered
    assert tok.apply_chat_template(CHAT, tokenize=False) == FAMILIES["chatml"].rendered


def test_get_chat_template_without_its_token() -> None:
    with pytest.raises(DataError, match=r"ends turns with '<\|im_end\|>', which is no token"):
        get_chat_template(tokenizer(FAMILIES["llama-3"], None), "chatml")
    with pytest.raises(DataError, match="no such chat template"):
        get_chat_template(tokenizer(FAMILIES["llama-3"], None), "unheard")


def test_get_chat_template_of_your_own() -> None:
    text = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    tok = get_chat_template(tokenizer(FAMILIES["llama-3"], None), (text, "<|eot_id|>"))
    assert tok.chat_template == text
