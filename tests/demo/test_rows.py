"""The demo's rows: real, each once, and nothing of the held-out ones in the train ones."""

from __future__ import annotations

import ast
import json

import make_rows
import pytest

SOURCE = '''
def plain(a, *, b=1):
    """Add the two numbers.  And more.

    Not this one.
    """

class Box:
    async def open(self):
        """Open the box, e.g. a small
        one, now."""
        def inner():
            """Inner functions are not rows."""

def bare(): pass
def short():
    """Do it."""
def shouting():
    """no capital letter and no stop here"""
'''


def test_rows_are_signature_and_first_sentence() -> None:
    found = list(make_rows.module_rows("m", ast.parse(SOURCE)))
    assert [(row.signature, row.sentence) for row in found] == [
        ("m.plain(a, *, b=1)", "Add the two numbers."),
        ("m.Box.open(self)", "Open the box, e.g. a small one, now."),
    ]


def test_the_split_is_disjoint_by_sentence_question_and_module(rows) -> None:
    train, held_out = rows
    assert (len(train), len(held_out)) == (make_rows.TRAIN_ROWS, make_rows.HELD_OUT_ROWS)
    for key in (
        lambda row: " ".join(make_rows.words(row.sentence)),
        lambda row: row.question,
        lambda row: row.module,
    ):
        assert not {key(row) for row in train} & {key(row) for row in held_out}
    sentences = [" ".join(make_rows.words(row.sentence)) for row in train + held_out]
    assert len(set(sentences)) == len(sentences)


def test_no_module_dominates_the_held_out_rows(rows) -> None:
    modules = [row.module for row in rows[1]]
    assert max(map(modules.count, modules)) <= make_rows.HELD_OUT_ROWS // 10


def test_the_files_are_messages_and_the_same_each_time(
    tmp_path, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["make_rows.py", str(tmp_path / "rows")])
    make_rows.main()
    for name, part in zip(("train.jsonl", "heldout.jsonl"), rows, strict=True):
        lines = (tmp_path / "rows" / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [row.messages() for row in part]
    roles = [turn["role"] for turn in json.loads(lines[0])["messages"]]
    assert roles == ["user", "assistant"]
