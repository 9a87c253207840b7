"""pronghorn.json: written, read back, and refused when it says something else than it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pronghorn.adapters.record import (
    RECORD_NAME,
    AdapterRecord,
    differences,
    library_versions,
    read_record,
    write_record,
)
from pronghorn.errors import AdapterError

RECORD = AdapterRecord(
    base_name="owner/model",
    base_revision="0123abcd",
    base_path="/models/base",
    base_fingerprint="ph1:00",
    max_seq_length=2048,
    tied="untie",
    versions={"peft": "0.21.2"},
    trainable=("a.lora_A", "a.lora_B"),
    rank=16,
    vocab_rows=515,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write_record(tmp_path, RECORD) == tmp_path / RECORD_NAME == tmp_path / "pronghorn.json"
    assert read_record(tmp_path) == RECORD
    minimal = AdapterRecord(base_name="base")
    write_record(tmp_path, minimal)
    assert read_record(tmp_path) == minimal


def test_no_record_is_no_error(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


def test_keys_of_a_newer_version_are_left_alone(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    parsed = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({**parsed, "new_key": 1}))
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "not a record of format 1"),
        ({"base_name": None}, "base_name is not a text"),
        ({"base_path": 3}, "base_path is not a text"),
        ({"tied": []}, "tied is not a text"),
        ({"max_seq_length": "long"}, "max_seq_length is not a count"),
        ({"rank": 0}, "rank is not a count"),
        ({"rank": True}, "rank is not a count"),
        ({"versions": {"peft": 1}}, "versions is not a map of texts"),
        ({"trainable": "all"}, "trainable is not a list of texts"),
    ],
)
def test_a_wrong_record_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    parsed = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({**parsed, **change}))
    with pytest.raises(AdapterError, match=said) as caught:
        read_record(tmp_path)
    assert RECORD_NAME in caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"'])
def test_damaged_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(AdapterError, match="cannot be used"):
        read_record(tmp_path)


def test_differences_are_named_one_by_one() -> None:
    assert differences(RECORD, RECORD) == []
    now = replace(
        RECORD,
        max_seq_length=512,
        rank=8,
        tied=None,
        versions={"peft": "0.22", "torch": "3"},
        trainable=("a.lora_A", "b.lora_A"),
    )
    assert differences(RECORD, now) == [
        "max_seq_length: 2048 at training, 512 now",
        "rank: 16 at training, 8 now",
        "tied: untie at training, None now",
        "trainable tensors: 1 gone (first: a.lora_B), 1 new (first: b.lora_A)",
        "peft: 0.21.2 at training, 0.22 now",
    ]


def test_versions_name_what_decides_the_meaning() -> None:
    found = library_versions()
    assert {"torch", "transformers", "peft"} <= found.keys()
    assert all(value[0].isdigit() for value in found.values())
