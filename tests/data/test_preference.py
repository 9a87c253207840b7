"""Preference and prompt-only rows: what is read of them, what is refused, and what the inspector shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pronghorn import inspect_data
from pronghorn.cli.main import app
from pronghorn.data.inspect import Inspection
from pronghorn.data.options import STOPPING_CHECKS, DataOptions
from pronghorn.data.preference import to_compared
from pronghorn.data.prepare import prepare
from pronghorn.data.report import DataReport
from pronghorn.data.rows import Row
from pronghorn.errors import DataError
from tests import tiny
from tests.data.conftest import Writer
from tests.data.families import CHAT, FAMILIES, family_tokenizer, tokenizer
from tests.data.test_inspect import shown

ASK, FOUR, FIVE = CHAT[1], CHAT[2], {"role": "assistant", "content": "Five!"}
SYSTEM = CHAT[0]


def pair(prompt: Any = None, chosen: Any = "Four.", rejected: Any = "Five!", **more: Any) -> dict[str, Any]:
    columns = {"prompt": [ASK] if prompt is None else prompt, "chosen": chosen, "rejected": rejected}
    return {**{name: value for name, value in columns.items() if value != "absent"}, **more}


def look(rows: list[dict[str, Any]], family: str = "llama-3", **options: Any) -> Inspection:
    return inspect_data(rows, family_tokenizer(family), **{"isolate": False, "max_length": 500, **options})


def text(pieces: Any) -> str:
    return "".join(piece.text for piece in pieces)


FORMS: dict[str, dict[str, Any]] = {
    "messages": pair(chosen=[FOUR], rejected=[FIVE]),
    "answers as text": pair(),
    "one message each": pair(prompt=ASK, chosen=FOUR, rejected=FIVE),
    "prompt implied": pair("absent", [ASK, FOUR], [ASK, FIVE]),
    "prompt given and repeated": pair(chosen=[ASK, FOUR], rejected=[ASK, FIVE]),
    "prompt as text and repeated": pair(ASK["content"], [ASK, FOUR], [ASK, FIVE]),
    "prompt as text": pair(ASK["content"], [FOUR], [FIVE]),
    "as JSON text": pair(json.dumps([ASK]), json.dumps([FOUR]), json.dumps(FIVE)),
    "other names": pair([{"from": "human", "value": ASK["content"]}], [{"from": "gpt", "value": "Four."}]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_row(form: str) -> None:
    inspection = look([FORMS[form]])
    assert inspection.report.bad_rows == ()
    assert inspection.report.format == "preference"
    (example,) = inspection.examples
    assert text(example.pieces) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTwo plus two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert [(answer.side, text(answer.pieces)) for answer in example.answers] == [
        ("chosen", "Four.<|eot_id|>"),
        ("rejected", "Five!<|eot_id|>"),
    ]
    assert not any(piece.trained for piece in example.pieces)
    assert all(piece.trained for answer in example.answers for piece in answer.pieces)


def test_implied_prompt_of_several_turns_ends_with_the_last_question() -> None:
    (example,) = look([pair("absent", CHAT, [*CHAT[:4], FIVE])]).examples
    assert text(example.pieces).endswith(
        "Plus one?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text(example.answers[1].pieces) == "Five!<|eot_id|>"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("H: a\n\nA: Great", "H: a\n\nA: Good", "H: a\n\nA:"),
        ("H: a\n\nA: The cat", "H: a\n\nA: The dog", "H: a\n\nA: The"),
        ("H: a\n\nA: yes", "H: a\n\nA: yes sir", "H: a\n\nA:"),
        ("H: a\n\nA: yes no", "H: a\n\nA: yesterday", "H: a\n\nA:"),
        ("H: a\n\nA: a b", "H: a\n\nA: a\nb", "H: a\n\nA: a"),
        ("H: a\n\nA: same", "H: a\n\nA: same", "H: a\n\nA:"),
    ],
)
def test_prompt_implied_in_text(chosen: str, rejected: str, prompt: str) -> None:
    row = to_compared(Row("x", 1, {"chosen": chosen, "rejected": rejected}), "preference", chat=False)
    assert row.prompt == prompt
    assert [f"{prompt}{answer}" for answer in row.answers.values()] == [chosen, rejected]
    assert all(row.answers.values())


def test_plain_text_has_one_bos_and_one_eos() -> None:
    inspection = look([pair("The sky is", " blue.", " green.<|eot_id|>")])
    (example,) = inspection.examples
    assert text(example.pieces) == "<|begin_of_text|>The sky is"
    assert [text(answer.pieces) for answer in example.answers] == [" blue.<|eot_id|>", " green.<|eot_id|>"]
    assert [check.name for check in inspection.report.failed(stops=False)] == ["plain_text"]


def test_prompt_only() -> None:
    inspection = look([{"prompt": [SYSTEM, ASK], "answer": "4"}, {"prompt": [ASK], "answer": "5"}])
    assert (inspection.report.format, inspection.report.trained_tokens) == ("prompt_only", 0)
    example = inspection.examples[0]
    assert text(example.pieces).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert example.answers == () and example.trained == 0
    assert "all of prompts" in shown(inspection)
    (example,) = look([{"prompt": "The sky is"}]).examples
    assert text(example.pieces) == "<|begin_of_text|>The sky is"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no answer": (pair(chosen="absent"), "chosen", "must be a list of messages, this is null"),
    "empty answer": (pair(rejected=""), "rejected[0].content", "is empty"),
    "empty message": (
        pair(rejected=[{"role": "assistant", "content": " "}]),
        "rejected[0].content",
        "is empty",
    ),
    "null content": (pair(rejected=[{"role": "assistant"}]), "rejected[0].content", "is null or missing"),
    "no messages": (pair(chosen=[]), "chosen", "holds no message"),
    "number": (pair(chosen=3), "chosen", "must be a list of messages, this is a number"),
    "prompt null": (pair("absent", [FOUR], [FIVE]), "chosen", "do not begin with the same question"),
    "prompt empty": (pair([]), "prompt", "holds no message"),
    "other prompts": (
        pair("absent", [ASK, FOUR], [CHAT[3], FIVE]),
        "chosen",
        "do not begin with the same question",
    ),
    "same system, other prompts": (
        pair("absent", [SYSTEM, ASK, FOUR], [SYSTEM, CHAT[3], FIVE]),
        "chosen",
        "do not begin with the same question",
    ),
    "prompt is another text": (
        pair("Elsewhere", [ASK, FOUR], [ASK, FIVE]),
        "prompt",
        "is none of the messages that both answers begin with",
    ),
    "one repeats the prompt": (pair(chosen=[ASK, FOUR]), "chosen[0].role", "is 'user' behind the prompt"),
    "questions differ later": (
        pair("absent", CHAT, [*CHAT[:3], ASK, FIVE]),
        "chosen[1].role",
        "is 'user' behind the prompt that both answers share",
    ),
    "prompt with answer": (pair([ASK, FOUR]), "prompt[1].role", "a prompt ends with what is to be answered"),
    "only the prompt": (pair(chosen=[ASK], rejected=[ASK]), "chosen", "holds the prompt and no answer"),
    "role": (pair([{"role": "narrator", "content": "x"}]), "prompt[0].role", "'narrator' is no role"),
    "train mark": (pair(chosen=[{**FOUR, "train": True}]), "chosen[0].train", "has no effect here"),
    "tools": (pair(tools="search"), "tools", "must be a list of objects"),
    "text among messages": (pair("x", "y", "z"), "", "is made of text, and the first row of messages"),
    "image": (
        pair([{"role": "user", "content": [{"type": "image"}]}]),
        "prompt[0].content[0]",
        "only text can be trained",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_named(case: str) -> None:
    row, field, reason = BAD[case]
    report = look([pair(), row, pair(chosen="Six.")], format="preference").report
    (bad,) = report.bad_rows
    assert (bad.number, bad.field) == (2, field)
    assert reason in bad.reason
    assert (report.rows_read, report.bad, report.train_rows) == (3, 1, 2)


def test_bad_text_rows_are_named() -> None:
    good = pair("a", "b", "c")
    rows = [good, pair(), pair("a", "", "c"), pair("absent", "x y", "z y"), pair("a", "b", "c", tools=[{}])]
    report = look(rows).report
    assert [(bad.number, bad.field) for bad in report.bad_rows] == [
        (2, ""), (3, "chosen"), (4, "chosen"), (5, "tools")
    ]  # fmt: skip
    assert "made of messages, and the first row of text" in report.bad_rows[0].reason
    assert "do not begin with the same text" in report.bad_rows[2].reason


def test_bad_prompt_only_rows_are_named() -> None:
    good = {"prompt": [ASK]}
    report = look(
        [good, {"prompt": []}, {"prompt": [ASK, FOUR]}, {"prompt": None}], format="prompt_only"
    ).report
    assert [(bad.number, bad.field) for bad in report.bad_rows] == [
        (2, "prompt"), (3, "prompt[1].role"), (4, "prompt")
    ]  # fmt: skip


def test_answer_that_parquet_left_out_is_a_bad_row() -> None:
    report = look([pair(), {"prompt": [ASK]}]).report
    assert [bad.field for bad in report.bad_rows] == ["chosen"]


def test_mixed_formats_are_refused() -> None:
    with pytest.raises(DataError, match=r"the first is preference, rows:2 is messages"):
        look([pair(), {"messages": CHAT}])
    with pytest.raises(DataError, match="fit several formats: messages and preference"):
        look([pair(messages=CHAT)])


def test_checks_of_rows() -> None:
    rows = [
        pair(),
        pair(chosen="Five!", rejected="Four."),  # the other way round
        pair(chosen="same", rejected="same"),
        pair(),
        pair(chosen="<|eot_id|>x"),
        pair(chosen=[{**FOUR, "reasoning_content": "2 and 2"}], rejected="Nine"),
    ]
    report = look(rows).report
    failed = {check.name: check.rows.first for check in report.checks if not check.passed}
    assert failed == {
        "contradiction": ("rows:2", "rows:4"),
        "equal_answers": ("rows:3",),
        "duplicates": ("rows:4",),
        "special_text": ("rows:5",),
        "lost_text": ("rows:6",),
    }
    assert [check.name for check in report.failed(stops=True)] == ["equal_answers"]
    assert "equal_answers" in STOPPING_CHECKS


def test_checks_of_templates() -> None:
    llama = str(family_tokenizer("llama-3").chat_template)
    for broken, name in (
        ("{{ bos_token }}" + llama, "bos"),
        (llama.replace("'<|eot_id|>'", "'.'"), "end_token"),
        (llama.replace("{{- bos_token -}}", ""), "no_bos"),
        (
            llama.replace("assistant<|end_header_id|>\\n\\n' }}", "assistant<|end_header_id|>\\n\\nHm' }}"),
            "opening",
        ),
        (llama + "{# strftime_now #}", "date"),
    ):
        assert broken != llama
        inspection = inspect_data(
            [pair()], tokenizer(FAMILIES["llama-3"], broken), isolate=False, max_length=500
        )
        assert name in {check.name for check in inspection.report.checks if not check.passed}, name


def test_checks_of_text() -> None:
    report = look([pair("is ", "Four.", "Five."), pair("a b", "a b c", "a b d")]).report
    failed = {check.name: check.rows.first for check in report.checks if not check.passed}
    assert failed == {"boundary": ("rows:1",), "repeated_prompt": ("rows:2",), "plain_text": ()}


def test_prompt_that_the_template_rewrites_is_a_bad_row() -> None:
    """Qwen-3 takes earlier thoughts out; a template that rewrites the question itself cannot be shown."""
    template = (
        "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
        "{{- 'last: ' if loop.last else '' }}{{ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    report = inspect_data([pair()], tokenizer(FAMILIES["chatml"], template), isolate=False).report
    assert "writes the prompt differently once an answer follows" in report.bad_rows[0].reason


def test_lengths_cuts_and_drops() -> None:
    rows = [
        pair(chosen="a" * 10, rejected="b" * 40),
        pair(chosen="a" * 100, rejected="b"),
        pair([{"role": "user", "content": "q" * 200}]),
    ]
    report = look(rows, max_length=90).report
    assert (report.truncated.first, report.dropped.first) == (("rows:2",), ("rows:3",))
    assert report.truncated_tokens == report.longest - 90 - (200 - 100) + 4 or report.truncated_tokens > 0
    assert report.answers is not None and report.answers.longer == 0.5
    assert report.trained_tokens == round(2 * (report.answers.chosen + report.answers.rejected))
    assert look(rows, max_length=90, too_long="drop").report.dropped.count == 2
    assert DataReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_answers_that_are_equal_once_cut() -> None:
    report = look([pair(chosen="a" * 200, rejected="a" * 300)], max_length=90).report
    assert [check.name for check in report.failed(stops=True)] == ["equal_answers"]


def test_evaluation_rows(rows: Writer) -> None:
    train, held = rows(*[pair(chosen=str(n)) for n in range(20)]), rows(pair(chosen="1"), name="held.jsonl")
    report = inspect_data(str(train), family_tokenizer("chatml"), eval=str(held), isolate=False).report
    assert (report.train_rows, report.eval_rows) == (20, 1)
    assert {check.name for check in report.failed(stops=False)} == {"overlap"}
    report = inspect_data(str(train), family_tokenizer("chatml"), eval_fraction=0.2, isolate=False).report
    assert (report.train_rows, report.eval_rows) == (16, 4)


def test_rendered_in_a_process_alike() -> None:
    given = [pair(), pair("absent", CHAT, [*CHAT[:4], FIVE])]
    here, there = (look(given, isolate=isolate) for isolate in (False, True))
    assert here.examples == there.examples


def test_system_option() -> None:
    (first, second) = look([pair(), pair([SYSTEM, ASK])], system="Own.").examples
    assert "Own.<|eot_id|>" in text(first.pieces)
    assert "Be brief.<|eot_id|>" in text(second.pieces)


@pytest.mark.parametrize(("name", "value"), [("loss_on", "all"), ("packing", True), ("rewritten", "split")])
def test_options_without_effect_are_refused(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"data.{name}={value} has no effect on preference rows"):
        look([pair()], **{name: value})


def test_supervised_training_refuses_them_by_name(rows: Writer) -> None:
    for row, kind, way_out in (
        (pair(), "these are preference rows", "DPOTrainer"),
        ({"prompt": [ASK]}, "prompts without answers", "GRPOTrainer"),
    ):
        with pytest.raises(DataError, match=kind) as refused:
            prepare(DataOptions(train=str(rows(row))), family_tokenizer("llama-3"), 100)
        assert way_out in refused.value.fix
    # the way out that it names
    options = DataOptions(
        train=str(rows(pair(chosen=[FOUR]))), rename={"chosen": "completion"}, isolate=False
    )
    assert prepare(options, family_tokenizer("llama-3"), 100).report.format == "prompt_completion"
    implied = rows(pair("absent", [ASK, FOUR], [ASK, FIVE]))
    options = DataOptions(train=str(implied), rename={"chosen": "messages"}, isolate=False)
    assert prepare(options, family_tokenizer("llama-3"), 100).report.format == "messages"


def test_terminal_shows_both_answers_side_by_side() -> None:
    (line,) = [line for line in shown(look([pair()])).splitlines() if "Four." in line]
    assert "Five!<|eot_id|>" in line
    assert "chosen: 3 tokens" in shown(look([pair()]))
    assert "the longer one is chosen in 0% of rows" in shown(look([pair()]))


def test_page_shows_both_answers() -> None:
    page = look([pair(chosen="<b>Four</b>.")]).html()
    assert '<div class="chosen">' in page and '<div class="rejected">' in page
    assert "&lt;b&gt;Four&lt;/b&gt;.</span>" in page
    assert page.count("<div") == page.count("</div")


def test_command(rows: Writer, tmp_path: Any) -> None:
    base = str(tiny.write_base(tmp_path / "base"))
    good, equal = (
        rows(pair("absent", CHAT, [*CHAT[:4], FIVE])),
        rows(pair(chosen="Five!"), name="equal.jsonl"),
    )
    fast = ["data.isolate=false", "--model", base]
    run = CliRunner().invoke(app, ["inspect", str(good), *fast, "--json"])
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout)
    assert values["report"]["format"] == "preference"
    assert [answer["side"] for answer in values["examples"][0]["answers"]] == ["chosen", "rejected"]
    run = CliRunner().invoke(app, ["inspect", str(equal), *fast])
    assert isinstance(run.exception, DataError) and "equal_answers: " in str(run.exception)
    run = CliRunner().invoke(app, ["inspect", str(equal), "data.allow=[equal_answers]", *fast])
    assert run.exit_code == 0, run.output
