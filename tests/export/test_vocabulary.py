"""Tokenizer, template and config files: the base's own, and only what changed is changed, and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pronghorn.export.vocabulary import merged_files
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny.tokenizer().save_pretrained(folder)
    write(
        folder / "config.json",
        {"model_type": "llama", "vocab_size": 512, "eos_token_id": 3, "pad_token_id": 0},
    )
    write(folder / "generation_config.json", {"eos_token_id": [3, 2], "pad_token_id": 0})
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edit(path: Path, **changes: Any) -> None:
    write(path, {**read(path), **changes})


def merge(base: Path, adapter: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    edits = merged_files(base, adapter, **{"vocabulary": None, "untied": False, **options})
    found = {name: content.decode() if content is not None else None for name, content in edits.files.items()}
    parsed = {
        name: json.loads(text) if text and name.endswith(".json") else text for name, text in found.items()
    }
    return parsed, edits.listed


def test_a_tokenizer_saved_again_changes_nothing(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer(
        "a" * 100, truncation=True, max_length=8, padding="max_length"
    )  # leaves state in tokenizer.json
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert read(tmp_path / "adapter" / "tokenizer.json")["truncation"] is not None
    old_style = read(base / "tokenizer.json")
    old_style["model"]["merges"] = [" ".join(merge) for merge in old_style["model"]["merges"]]
    write(base / "tokenizer.json", old_style)
    edit(base / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", eos_token={"content": tiny.EOS})
    assert merge(base, tmp_path / "adapter") == ({}, [])
    (tmp_path / "bare").mkdir()
    assert merge(base, tmp_path / "bare") == ({}, [])


def test_added_tokens_reach_every_file_that_lists_tokens(base: Path, tmp_path: Path) -> None:
    edit(
        base / "tokenizer_config.json",
        added_tokens_decoder={"0": {"content": tiny.PAD}},
        tokenizer_class="Old",
    )
    write(base / "added_tokens.json", {})
    write(base / "vocab.json", {"kept": 0})
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    found, listed = merge(base, tmp_path / "adapter", vocabulary=513)
    assert found["tokenizer.json"]["added_tokens"][-1]["content"] == "<think>"
    assert found["tokenizer_config.json"]["added_tokens_decoder"]["512"]["content"] == "<think>"
    assert found["tokenizer_config.json"]["tokenizer_class"] == "Old"
    assert found["added_tokens.json"] == {"<think>": 512}
    assert found["config.json"] == {**read(base / "config.json"), "vocab_size": 513}
    assert "vocab.json" not in found
    assert listed[0] == "tokenizer.json: taken from the adapter (1 new tokens)"
    assert listed[-1] == "config.json: vocab_size 512 -> 513" and len(listed) == 4


def test_a_changed_end_token_changes_its_ids(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    write(base / "special_tokens_map.json", {"eos_token": tiny.EOS})
    edit(base / "generation_config.json", eos_token_id=[3])
    found, listed = merge(base, tmp_path / "adapter")
    assert found["config.json"]["eos_token_id"] == 2
    assert found["generation_config.json"]["eos_token_id"] == [2, 3]
    assert (
        found["tokenizer_config.json"]["eos_token"]
        == found["special_tokens_map.json"]["eos_token"]
        == "<|im_start|>"
    )
    assert 'tokenizer_config.json: eos_token "<|im_end|>" -> "<|im_start|>"' in listed
    assert "config.json: eos_token_id 3 -> 2" in listed and len(listed) == 4


def test_a_changed_template_replaces_the_base_s_wherever_it_stands(base: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages }} new"
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter") == (
        {"chat_template.jinja": "{{ messages }} new"},
        ["chat_template.jinja: taken from the adapter"],
    )
    (base / "chat_template.jinja").unlink()
    edit(base / "tokenizer_config.json", chat_template="old")
    found, listed = merge(base, tmp_path / "adapter")
    assert set(found) == {"tokenizer_config.json"} and len(listed) == 1
    assert found["tokenizer_config.json"]["chat_template"] == "{{ messages }} new"


def test_another_vocabulary_leaves_no_contradicting_file(base: Path, tmp_path: Path) -> None:
    (base / "merges.txt").write_text("old")
    tiny.tokenizer(480).save_pretrained(tmp_path / "adapter")
    found, listed = merge(base, tmp_path / "adapter", vocabulary=480)
    assert found["merges.txt"] is None and "merges.txt: left out" in listed
    assert len(found["tokenizer.json"]["model"]["vocab"]) == 480


def test_a_base_without_tokenizer_gets_the_adapter_s(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "config.json", {"model_type": "llama"})
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    found, listed = merge(tmp_path / "base", tmp_path / "adapter")
    assert (
        set(found) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} and len(listed) == 3
    )


def test_multimodal_configs_keep_the_text_part_in_step(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    tiny.tokenizer().save_pretrained(folder)
    config = {"model_type": "gemma3", "text_config": {"vocab_size": 512, "tie_word_embeddings": True}}
    write(folder / "config.json", config)
    (tmp_path / "adapter").mkdir()
    found, listed = merge(folder, tmp_path / "adapter", vocabulary=520, untied=True)
    text = {"vocab_size": 520, "tie_word_embeddings": False}
    assert found["config.json"] == {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    assert "config.json text_config: vocab_size 512 -> 520" in listed
