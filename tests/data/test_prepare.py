"""Prepared rows and their report: counts, checks, evaluation rows, cache, and templates that hang."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pronghorn.data.checks import PREFERENCE_CHECKS, ROW_CHECKS
from pronghorn.data.isolated import IsolatedTemplate
from pronghorn.data.options import STOPPING_CHECKS, DataOptions
from pronghorn.data.prepare import Prepared, examine, prepare
from pronghorn.data.report import DataReport
from pronghorn.data.templates import ChatTemplate, Prefix, RenderError
from pronghorn.errors import DataError
from tests.data.conftest import Writer
from tests.data.families import CHAT, FAMILIES, family_tokenizer, tokenizer


def ask(number: int, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]}


def run(path: Path | tuple[str, ...], limit: int = 1000, family: str = "chatml", **options: Any) -> Prepared:
    names = path if isinstance(path, tuple) else (str(path),)
    return prepare(DataOptions(train=names, **{"isolate": False, **options}), family_tokenizer(family), limit)


def shown(report: DataReport) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_columns_and_counts(rows: Writer) -> None:
    prepared = run(rows(*[ask(number) for number in range(10)]))
    tok = family_tokenizer("chatml")
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert prepared.eval is None
    ids = [tok.apply_chat_template(ask(n)["messages"], return_dict=False) for n in range(10)]
    assert [list(row) for row in prepared.train["input_ids"]] == ids
    report = prepared.report
    assert (report.rows_read, report.train_rows, report.eval_rows) == (10, 10, 0)
    assert report.tokens == sum(map(len, ids))
    assert (
        report.trained_tokens == sum(label != -100 for row in prepared.train["labels"] for label in row) == 40
    )
    assert report.trained_share == 40 / report.tokens
    assert (report.longest, sum(count for _, count in report.histogram)) == (len(ids[0]), 10)
    assert report.template == "tokenizer" and report.template_hash is not None
    assert all(check.passed for check in report.checks)


def test_report_survives_json(rows: Writer) -> None:
    report = run(rows(ask(1), "{", ask(1, "x" * 500)), limit=100, skip_bad=1).report
    assert DataReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_truncated_and_dropped_rows_are_named(rows: Writer) -> None:
    long_question = {
        "messages": [{"role": "user", "content": "q" * 200}, {"role": "assistant", "content": "a"}]
    }
    path = rows(ask(1), ask(2, "y" * 200), long_question)
    prepared = run(path, limit=100)
    report = prepared.report
    assert report.truncated.first == (f"{path}:2",)
    assert report.dropped.first == (f"{path}:3",)
    assert [len(ids) for ids in prepared.train["input_ids"]][1] == 100
    assert report.truncated_tokens == report.longest - 100 or report.truncated_tokens > 0
    text = shown(report)
    assert "cut to the limit" in text and "rows.jsonl:2" in text
    assert "dropped as too long" in text and "rows.jsonl:3" in text
    assert run(path, limit=100, too_long="drop").report.dropped.count == 2


def test_nothing_left_to_train(rows: Writer) -> None:
    with pytest.raises(DataError, match="keep no trained token within 5 tokens"):
        run(rows(ask(1)), limit=5)


def test_evaluation_file(rows: Writer) -> None:
    train, held = rows(ask(1), ask(2)), rows(ask(3), ask(2), name="held.jsonl")
    prepared = run(train, eval=str(held))
    assert (len(prepared.train), len(prepared.eval)) == (2, 2)
    (overlap,) = prepared.report.failed(stops=False)
    assert (overlap.name, overlap.rows.first) == ("overlap", (f"{held}:2",))


def test_evaluation_share_is_deterministic_and_never_splits_equal_rows(rows: Writer) -> None:
    path = rows(*[ask(number // 2) for number in range(200)])
    prepared = run(path, eval_fraction=0.1)
    held = {tuple(ids) for ids in prepared.eval["input_ids"]}
    assert len(prepared.eval) == 20 and len(held) == 10
    assert not held & {tuple(ids) for ids in prepared.train["input_ids"]}
    again = run(path, eval_fraction=0.1, cache=False)
    assert again.eval["input_ids"][:] == prepared.eval["input_ids"][:]
    other = run(path, eval_fraction=0.1, seed=1)
    assert other.eval["input_ids"][:] != prepared.eval["input_ids"][:]


def test_cache_is_by_content(rows: Writer, tmp_path: Path) -> None:
    path = rows(ask(1), ask(2))
    first = run(path)
    assert not first.report.cached
    second = run(path)
    assert second.report.cached and second.train["labels"][:] == first.train["labels"][:]
    assert run(path, skip_bad=3).report.cached
    assert not run(path, cache=False).report.cached
    assert not run(path, limit=999).report.cached
    assert not run(path, loss_on="all").report.cached
    assert not run(path, family="phi-4").report.cached
    rows(ask(1), ask(3))
    changed = run(path)
    assert not changed.report.cached and changed.report.data_hash != first.report.data_hash
    assert not list((tmp_path / "cache" / "pronghorn").glob(".new-*"))


def test_a_failure_leaves_nothing_behind(rows: Writer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mix formats"):
        run(rows(ask(1), {"text": "a"}))
    assert list((tmp_path / "cache" / "pronghorn").iterdir()) == []


def test_several_files_in_order(rows: Writer) -> None:
    one, two = rows(ask(1), name="one.jsonl"), rows(ask(2), ask(3, ""), name="two.jsonl")
    prepared = run((str(one), str(two)), skip_bad=1)
    assert len(prepared.train) == 2
    assert prepared.report.bad_rows[0].file == str(two)


def test_system_option(rows: Writer) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, *ask(2)["messages"]]}
    prepared = run(rows(ask(1), own), system="Be brief.")
    tok = family_tokenizer("chatml")
    texts = [tok.decode(ids) for ids in prepared.train["input_ids"]]
    assert texts[0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert texts[1].startswith("<|im_start|>system\nown<|im_end|>")


def test_names_of_stopping_checks() -> None:
    checks = {**ROW_CHECKS, **PREFERENCE_CHECKS}
    assert {name for name, (stops, _) in checks.items() if stops} == set(STOPPING_CHECKS)
    with pytest.raises(ValueError, match="no check that stops a run"):
        DataOptions(train="x", allow=("duplicates",))


def _spoiled(check: str) -> Any:
    llama = str(family_tokenizer("llama-3").chat_template)
    if check == "bos":
        return tokenizer(FAMILIES["llama-3"], "{{ bos_token }}" + llama)
    if check == "end_token":
        return tokenizer(FAMILIES["llama-3"], llama.replace("'<|eot_id|>'", "'.'"))
    return tokenizer(
        FAMILIES["llama-3"], llama.replace("message.content | trim", "''").replace("'<|eot_id|>'", "''")
    )


@pytest.mark.parametrize("check", ["bos", "end_token", "masked"])
def test_checks_that_stop(check: str, rows: Writer) -> None:
    path = rows(ask(1), ask(2))
    tok = _spoiled(check)
    with pytest.raises(DataError, match=rf"{check}: .* 2 \({path}:1, {path}:2\)") as caught:
        prepare(DataOptions(train=str(path), isolate=False), tok, 100)
    assert f"data.allow=[{check}" in caught.value.fix
    if check != "masked":
        assert (
            prepare(DataOptions(train=str(path), isolate=False, allow=(check,)), tok, 100).report.train_rows
            == 2
        )


def test_serving_check(rows: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes something else each time cannot be trained on."""
    ids = iter(range(1000))
    monkeypatch.setattr(ChatTemplate, "ids", lambda self, messages, tools: [next(ids)])
    with pytest.raises(DataError, match="serving: rows whose ids differ"):
        run(rows(ask(1)))


def test_checks_that_warn(rows: Writer) -> None:
    path = rows(ask(1), ask(2, "<|im_end|>"), ask(1))
    tok = family_tokenizer("chatml")
    tok.pad_token = tok.eos_token
    tok.chat_template += "{# strftime_now #}"
    report = examine(DataOptions(train=str(path), isolate=False), tok, 100).report
    failed = {check.name: check.rows.first for check in report.failed(stops=False)}
    assert failed == {
        "duplicates": (f"{path}:3",),
        "special_text": (f"{path}:2",),
        "pad_token": (),
        "date": (),
    }
    assert "special_text: conversations whose text spells special tokens" in shown(report)


def test_plain_prompts_are_told_from_conversations(rows: Writer) -> None:
    """Text trains without the template, messages with it; as in TRL."""
    plain, chat = rows({"prompt": "q1", "completion": "yes"}), ask(1)["messages"]
    report = run(plain).report
    (check,) = report.failed(stops=False)
    assert check.name == "plain_text" and report.template is None
    assert "plain_text: the rows are plain text, which trains without the chat template" in shown(report)
    messages = rows({"prompt": chat[:1], "completion": chat[1:]}, name="chat.jsonl")
    assert run(messages).report.failed(stops=False) == ()
    untemplated = tokenizer(FAMILIES["chatml"], None)
    assert prepare(DataOptions(train=str(plain)), untemplated, 100).report.failed(stops=False) == ()


def test_isolated_template_renders_alike(rows: Writer) -> None:
    path = rows(*[ask(number) for number in range(5)], {"messages": CHAT})
    for family in ("llama-3", "phi-3"):
        here = run(path, family=family)
        there = run(path, family=family, isolate=True, cache=False)
        assert there.train["labels"][:] == here.train["labels"][:]


LOOP = (
    "{%- for m in messages %}{{ m.content }}{%- if 'hang' in m.content %}"
    "{%- for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
BLOAT = "{% for m in messages %}{{ m.content * (10 ** 11 if 'hang' in m.content else 1) }}{% endfor %}"


@pytest.mark.parametrize(("text", "reason"), [(LOOP, "did not finish within 0.5 s"), (BLOAT, "MemoryError")])
def test_template_that_hangs_or_bloats_names_its_row(text: str, reason: str) -> None:
    tok = tokenizer(FAMILIES["chatml"], text)
    chats = [[{"role": "user", "content": content}] for content in ("a", "hang", "b")]
    started = time.monotonic()
    with IsolatedTemplate(ChatTemplate(tok, text, "tokenizer", True), seconds=0.5) as template:
        first, second, third = template.render([Prefix(chat, 1) for chat in chats])
    assert (first, third) == ("a", "b")
    assert isinstance(second, RenderError) and reason in second.reason
    assert time.monotonic() - started < 60


def test_template_that_always_hangs_is_refused() -> None:
    tok = tokenizer(FAMILIES["chatml"], LOOP)
    chat = [{"role": "user", "content": "hang"}]
    with (
        IsolatedTemplate(ChatTemplate(tok, LOOP, "tokenizer", True), seconds=0.05) as template,
        pytest.raises(DataError, match="did not finish on 4 conversations"),
    ):
        template.render([Prefix(chat, 1)] * 10)


def test_slow_tokenizer_is_refused(rows: Writer) -> None:
    tok = family_tokenizer("chatml")
    slow = type("SlowTokenizer", (), {"is_fast": False, "chat_template": tok.chat_template})()
    with pytest.raises(DataError, match="SlowTokenizer is a slow tokenizer"):
        prepare(DataOptions(train=str(rows(ask(1)))), slow, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "a", "eval": "b", "eval_fraction": 0.1}, "give eval or eval_fraction, not both"),
        ({"train": ()}, "at least 1 item"),
        ({"train": " "}, "an empty name"),
        ({"train": "a", "tran": "b"}, "Extra inputs are not permitted"),
        ({"train": "a", "loss_on": "user"}, "'assistant', 'last_assistant' or 'all'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataOptions(**options)
