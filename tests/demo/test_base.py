"""The demo's base: small, whole, made from other text than the rows, and better than counting tokens."""

from __future__ import annotations

from pathlib import Path

import base_text
import make_rows
import measure
import pytest
import torch
from transformers import AutoModelForCausalLM

BASE = Path(measure.__file__).parent / "base"


def test_the_shipped_folder_is_under_10_mb() -> None:
    assert 1e6 < sum(path.stat().st_size for path in BASE.iterdir()) < 10e6


def test_the_base_loads_with_no_missing_or_unexpected_key() -> None:
    model, info = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True, local_files_only=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16


def test_the_tokenizer_knows_the_chat_turns() -> None:
    _, tokenizer = measure.load(BASE)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    question, answer = measure.encode(
        tokenizer, [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    )
    assert tokenizer.decode(question) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert answer[-1] == tokenizer.eos_token_id
    assert answer.count(tokenizer.eos_token_id) == 1


def test_row_sentences_are_found_whatever_their_case_and_line_breaks() -> None:
    known = base_text.RowSentences(["Return the file's name.", "Return the file's size in bytes."])
    assert known.first_in("see: RETURN the\n  file's (size) in bytes") == "return the file s size in bytes"
    assert known.first_in("Return the file's age.") is None


def test_function_docstrings_are_taken_out_of_code() -> None:
    source = b'"""Gone."""\nX = "kept"\ndef f():\n    """Gone,\n    too."""\n    # gone\n    return X  # ok\n'
    kept = base_text.code_without_docstrings(source, make_rows.ast.parse(source))
    assert kept == 'X = "kept"\ndef f():\n    return X  # ok'


def test_no_row_sentence_is_in_the_text_the_base_is_made_from(rows) -> None:
    texts = base_text.training_text()
    assert min(len(texts.prose), len(texts.code), len(texts.chats), len(texts.code_chats)) > 500
    everything = [*texts.prose, *texts.code, *map(" ".join, texts.chats), *map(" ".join, texts.code_chats)]
    text = f" {' '.join(make_rows.words(' '.join(everything)))} "
    # Every held-out row and a part of the others, sought in another way than the generator does.
    sought = [" ".join(make_rows.words(row.sentence)) for row in [*rows[1], *rows[0][::10]]]
    assert not [sentence for sentence in sought if f" {sentence} " in text]


def test_the_base_is_below_the_unigram_loss_of_the_held_out_rows(rows) -> None:
    train, held_out = ([row.messages()["messages"] for row in part] for part in rows)
    model, tokenizer = measure.load(BASE)
    assert measure.loss(model, tokenizer, held_out) < measure.unigram_loss(tokenizer, train, held_out)


def test_unigram_loss_is_add_one_smoothed_counting() -> None:
    class Letters:
        eos_token = "."

        def __len__(self) -> int:
            return 4

        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
            return ""

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": ["ab.".index(letter) for letter in text]}

    def row(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": ""}, {"role": "assistant", "content": text}]

    # counts a 2, b 1, "." 1 of 4 tokens, vocabulary 4: p(b) = 2/8, p(.) = 2/8
    expected = torch.tensor([2 / 8, 2 / 8]).log().mean().neg().item()
    assert measure.unigram_loss(Letters(), [row("aab")], [row("b")]) == pytest.approx(expected)
