"""Every row that cannot be used is named by file, number, field and reason."""

from __future__ import annotations

import io
import json
import re
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pronghorn.data import json_list
from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import Prepared, examine, prepare
from pronghorn.data.rows import MAX_ROW_BYTES, BadRow, Row, from_dataset, from_rows, open_source
from pronghorn.errors import DataError
from tests.data.conftest import Writer
from tests.data.families import FAMILIES, family_tokenizer, tokenizer

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def read(path: Path) -> list[Row | BadRow]:
    return list(open_source(str(path), DataOptions(train=str(path))).read())


def look(path: Path, **options: Any) -> Prepared:
    """Examine without a second process: these rows are not about that."""
    return examine(DataOptions(train=str(path), isolate=False, **options), family_tokenizer("gemma"), 1000)


def messages(*turns: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def turn(role: Any, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK, TELL = turn("user", "a"), turn("assistant", "b")

BAD: dict[str, tuple[Any, str, str]] = {
    "broken json": ('{"messages": [', "", "not JSON: Expecting value at column 15"),
    "unquoted": ("{messages: 1}", "", "not JSON: Expecting property name"),
    "not an object": ("[1, 2]", "", "a row must be a JSON object, this is a list"),
    "number": ("3", "", "this is a number"),
    "messages null": (
        messages() | {"messages": None},
        "messages",
        "must be a list of messages, this is null",
    ),
    "messages missing": ({"chat": []}, "messages", "must be a list of messages, this is null"),
    "messages empty": (messages(), "messages", "holds no message"),
    "messages text": ({"messages": "hello"}, "messages", "must be a list of messages, this is text"),
    "messages broken json text": ({"messages": "[{"}, "messages", "is text that is not JSON"),
    "message text": (
        messages("hello"),
        "messages[0]",
        "must be an object with role and content, this is text",
    ),
    "role unknown": (messages(turn("narrator", "a"), TELL), "messages[0].role", "'narrator' is no role"),
    "role missing": (messages({"content": "a"}, TELL), "messages[0].role", "is missing"),
    "role number": (messages(turn(1, "a"), TELL), "messages[0].role", "must be text, this is a number"),
    "content empty": (messages(ASK, turn("assistant", "")), "messages[1].content", "is empty"),
    "content blank": (messages(ASK, turn("assistant", " \n")), "messages[1].content", "is empty"),
    "content null": (messages(ASK, turn("assistant", None)), "messages[1].content", "is null or missing"),
    "content missing": (messages(ASK, {"role": "assistant"}), "messages[1].content", "is null or missing"),
    "content number": (
        messages(turn("user", 3), TELL),
        "messages[0].content",
        "must be text, this is a number",
    ),
    "content image": (
        messages(turn("user", [{"type": "image_url", "image_url": {"url": "x"}}]), TELL),
        "messages[0].content[0]",
        "is a image_url part; only text can be trained",
    ),
    "half a character": (
        messages(ASK, turn("assistant", "x\ud800")),
        "messages[1].content",
        "half a character",
    ),
    "train text": (
        messages(ASK, turn("assistant", "b", train="yes")),
        "messages[1].train",
        "must be True or False",
    ),
    "weight two": (messages(ASK, turn("assistant", "b", weight=2)), "messages[1].weight", "must be 0 or 1"),
    "no answer": (messages(ASK), "messages", "has no assistant message to train on"),
    "answer first": (messages(TELL, ASK), "messages[0].role", "cannot start with the answer"),
    "nothing trains": (messages(ASK, turn("assistant", "b", train=False)), "messages", "no message trains"),
    "tool call without name": (
        messages(ASK, turn("assistant", None, tool_calls=[{"type": "function"}])),
        "messages[1].tool_calls[0]",
        "has no function name",
    ),
    "tool arguments": (
        messages(ASK, turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "{x"}}])),
        "messages[1].tool_calls[0].arguments",
        "is text that is not JSON",
    ),
    "tools text": (messages(ASK, TELL, tools="search"), "tools", "must be a list of objects"),
    "reasoning number": (
        messages(ASK, turn("assistant", "b", reasoning_content=3)),
        "messages[1].reasoning_content",
        "must be text, this is a number",
    ),
    "template raises": (
        messages(ASK, turn("system", "s"), TELL),
        "messages",
        "the chat template raised TemplateError: gemma takes one system message",
    ),
    "deep": ("[" * 100_000, "", "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_row_is_named(case: str, rows: Writer) -> None:
    row, field, reason = BAD[case]
    path = rows(GOOD, row, GOOD)
    report = look(path, format="messages").report
    (bad,) = report.bad_rows
    assert (bad.file, bad.number, bad.field) == (str(path), 2, field)
    assert reason in bad.reason
    assert (report.rows_read, report.bad, report.train_rows) == (3, 1, 2)


OTHER_FORMATS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "conversations role": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "alien", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "conversations[0].from",
        "'alien' is no role",
    ),
    "conversations empty": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
        "conversations[1].value",
        "is empty",
    ),
    "completion empty": (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": ""},
        "completion",
        "is empty",
    ),
    "completion null": (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": None},
        "completion",
        "is null",
    ),
    "output number": (
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": 1},
        "output",
        "a number",
    ),
    "input list": (
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "input": ["x"], "output": "b"},
        "input",
        "must be text, this is a list",
    ),
    "text null": ({"text": "a"}, {"text": None}, "text", "is null"),
    "text number": ({"text": "a"}, {"text": 1}, "text", "must be text, this is a number"),
}


@pytest.mark.parametrize("case", OTHER_FORMATS)
def test_bad_row_of_other_formats_is_named(case: str, rows: Writer) -> None:
    good, row, field, reason = OTHER_FORMATS[case]
    (bad,) = look(rows(good, row)).report.bad_rows
    assert (bad.number, bad.field) == (2, field)
    assert reason in bad.reason


@pytest.mark.parametrize(("name", "form"), [("rows.jsonl", b"%b\n%b\n%b"), ("rows.json", b"[%b,\n%b, %b]")])
def test_huge_row_is_named_and_never_parsed(name: str, form: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    line = json.dumps(GOOD).encode()
    path.write_bytes(form % (line, b'{"text": "' + b"x" * (50 << 20) + b'"}', line))
    tracemalloc.start()
    first, bad, last = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(bad, BadRow) and bad.number == 2
    assert bad.reason == f"50 MB in one row; the limit is {MAX_ROW_BYTES >> 20} MB"
    assert peak < 4 * MAX_ROW_BYTES
    assert isinstance(first, Row) and isinstance(last, Row) and last.number == 3


def test_byte_order_mark_blank_lines_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert read(path) == [Row(str(path), 1, {"text": "a"}), Row(str(path), 3, {"text": "b"})]


def test_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    assert read(path)[1] == BadRow(str(path), 2, "", "not UTF-8 at byte 10; save the file as UTF-8")


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '{"data": [{"text": "a"}, {"text": "b"}]}',
        '{"text": "a"}\n{"text": "b"}\n',
        '\ufeff[\n{"text": "a"},\n{"text": "b"}]',
    ],
)
def test_json_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    assert read(path) == [Row(str(path), 1, {"text": "a"}), Row(str(path), 2, {"text": "b"})]


def test_json_file_of_one_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(GOOD, indent=2))
    assert read(path) == [Row(str(path), 1, GOOD)]


def test_json_lists_are_cut_the_same_wherever_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": 'a "b", \\ [c] {'}, {"n": [[], {"m": ","}], "text": "\\"}, {}, "],", -1.5, [], "ä"]
    texts = [json.dumps(value, indent=1) for value in values]
    body = ("\n , ".join(texts) + " ]}\n").encode()
    limit = len(texts[1])
    texts[1:1] = [json.dumps({"text": '"\\' * 20, "n": [1] * 9}), json.dumps([[{"n": n}] for n in range(20)])]
    long = (",".join(texts) + "]").encode()
    for size in range(1, 200):
        monkeypatch.setattr(json_list, "BLOCK", size)
        assert [json.loads(each) for each in json_list.elements(io.BytesIO(body), 99, b"}")] == values
        cut = [*json_list.elements(io.BytesIO(long), limit)]
        assert cut[1:3] == [len(texts[1]), len(texts[2])]
        assert [json.loads(each) for each in cut[:1] + cut[3:] if isinstance(each, bytes)] == values


@pytest.mark.parametrize(
    ("text", "bad", "error"),
    [
        (
            '[\n{"text": "a"},\n{"text": },\n{"text":\n\n3 4}, 5\n]',
            {2: "Expecting value at column 10", 3: "at line 3 of the row, column 3", 4: "is a number"},
            None,
        ),
        ('[{"text": "a"}, , {"text": "b"},]', {2: "Expecting value", 4: "Expecting value"}, None),
        ('[{"text": "a"}, {"text": "\udce9"}]', {2: "not UTF-8 at byte 10"}, None),
        ('[{"text": "a"], {"text": "b"}]', {1: "Expecting ',' delimiter"}, None),
        ('[{"text": "a"}, ' + "[" * 99_999 + "]" * 99_999 + "]", {2: "nested too deeply"}, None),
        ('[{"text": "a"}, {"text": "b"}', {}, "2: the file ends within the list"),
        (
            '[{"text": "a"}, {"text": "b", {"text": "c"}]',
            {2: "Expecting property name"},
            "2: the file ends within",
        ),
        ('[{"text": "a}]', {1: "Unterminated string"}, "1: the file ends within the list"),
        (
            '[{"text": "a"}]\n[{"text": "b"}]',
            {},
            '1: the list ends here, but the file goes on: [{"text": "b"',
        ),
        ("[", {}, "0: the file ends within the list"),
    ],
)
def test_broken_json_lists_name_the_row(
    text: str, bad: dict[int, str], error: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    found = []
    with pytest.raises(DataError, match=re.escape(f"{path}:{error}")) if error else nullcontext():
        for row in open_source(str(path), DataOptions(train=str(path))).read():
            found.append(row)
    named = {row.number: row.reason for row in found if isinstance(row, BadRow)}
    assert named.keys() == bad.keys() and all(reason in named[number] for number, reason in bad.items())
    assert [row.number for row in found] == [*range(1, len(found) + 1)]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"data": [', "]}")])
def test_memory_does_not_grow_with_a_json_list(opening: str, closing: str, tmp_path: Path) -> None:
    path, row = tmp_path / "rows.json", json.dumps({"text": "x" * 20_000})
    path.write_text(opening + ",\n".join([row] * 2000) + closing)  # 40 MB
    tracemalloc.start()
    numbers = [item.number for item in open_source(str(path), DataOptions(train=str(path))).unparsed()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers == [*range(1, 2001)] and peak < 6 * json_list.BLOCK


def test_objects_too_large_for_a_row(tmp_path: Path) -> None:
    path, fill = tmp_path / "rows.json", "x" * MAX_ROW_BYTES
    path.write_text(json.dumps({"messages": [{"role": "user", "content": fill}]}))
    assert read(path) == [BadRow(str(path), 1, "", "16 MB in one row; the limit is 16 MB")]
    path.write_text(json.dumps({"data": [{"text": "a"}, {"text": fill}], "more": 1}))
    with pytest.raises(
        DataError, match=r'rows\.json:2: the list ends here, but the file goes on: , "more": 1}'
    ):
        read(path)
    path.write_text("{" + '"a": {' * 99_999)
    with pytest.raises(DataError, match=r"nested too deeply|not JSON"):
        read(path)


def test_broken_json_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{\n"text": "a",\n"text": }\n')
    with pytest.raises(DataError, match=r"rows\.json:3: not JSON: Expecting value at column 9"):
        read(path)
    path.write_text("3")
    with pytest.raises(DataError, match="a number where a list of rows was expected"):
        read(path)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffinstruction,output\n"a, ""b""","c\nd"\nx\n', encoding="utf-8")
    assert read(path) == [
        Row(str(path), 1, {"instruction": 'a, "b"', "output": "c\nd"}),
        BadRow(str(path), 2, "", "1 fields where the header has 2"),
    ]


def test_csv_with_messages_as_json_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    quoted = json.dumps(GOOD["messages"]).replace('"', '""')
    path.write_text(f'messages\n"{quoted}"\n')
    assert look(path).report.train_rows == 1


def test_csv_header_with_repeated_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="repeats or lacks a name"):
        read(path)


def test_csv_field_limit_is_restored(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    (row,) = read(path)
    assert isinstance(row, Row) and len(row.value["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_parquet_and_its_null_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    values = [GOOD, {"messages": [turn("user", "a", name="me"), TELL]}]
    pq.write_table(pa.Table.from_pylist(values), path)
    first, second = read(path)
    assert isinstance(first, Row) and isinstance(second, Row)
    assert [first.value, second.value] == values


def test_parquet_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_text("nothing")
    with pytest.raises(DataError, match="not a Parquet file"):
        read(path)
    pq.write_table(pa.table({"text": [str(n) for n in range(9999)]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:99] + b"?" * 99 + whole[198:])
    with pytest.raises(DataError, match="not a Parquet file"):
        read(path)


def test_huge_row_of_a_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronghorn.data.rows.MAX_ROW_BYTES", 1 << 20)
    path, values = tmp_path / "rows.parquet", [{"text": "a"}, {"text": "x" * (2 << 20)}, {"text": "b"}]
    pq.write_table(pa.Table.from_pylist(values), path)
    data = datasets.Dataset.from_list(values)
    for found in (read(path), from_dataset(data, str(path)).read(), from_rows(values, str(path)).read()):
        assert [*found][1] == BadRow(str(path), 2, "", "2 MB in one row; the limit is 1 MB")


def test_a_row_group_is_not_read_at_once(tmp_path: Path) -> None:
    path, pool = tmp_path / "rows.parquet", pa.default_memory_pool()
    table = pa.table({"text": [f"{n:010}" * 200 for n in range(15_000)]})  # 30 MB
    pq.write_table(table, path, compression="none", use_dictionary=False)
    del table
    before = pool.bytes_allocated()
    peak = max(pool.bytes_allocated() for _ in open_source(str(path), DataOptions(train=str(path))).read())
    assert peak - before < 15 << 20


def test_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "split")
    assert [row.value for row in read(tmp_path / "plain") if isinstance(row, Row)] == [
        {"text": "a"},
        {"text": "b"},
    ]
    name = str(tmp_path / "split")
    (row,) = open_source(name, DataOptions(train=name, split="test")).read()
    assert row == Row(name, 1, {"text": "b"})
    with pytest.raises(DataError, match="no split 'valid'; it has train, test"):
        open_source(name, DataOptions(train=name, split="valid"))


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "rows.xlsx").write_text("x")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for name, message in {
        str(tmp_path / "none.jsonl"): "no such file or folder",
        "rows.jsonl": "no such file or folder",
        str(tmp_path / "empty.jsonl"): "the file is empty",
        str(tmp_path / "rows.xlsx"): "'.xlsx' cannot be read",
        str(tmp_path / "folder"): "not one saved by datasets",
        "nobody/nothing": "neither a local file or folder nor a dataset",
    }.items():
        with pytest.raises(DataError, match=message):
            open_source(name, DataOptions(train=name))


def test_mixed_formats_name_both(rows: Writer) -> None:
    path = rows(GOOD, GOOD, {"text": "a"})
    with pytest.raises(DataError, match=r"the first is messages, .*rows\.jsonl:3 is text"):
        look(path)


def test_ambiguous_format_names_the_row(rows: Writer) -> None:
    path = rows({"instruction": "a", "output": "b", "text": "c"})
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: its columns .* fit several formats: instruction and text"
    ):
        look(path)
    assert look(path, format="text").report.format == "text"


def test_unknown_format_names_columns_and_rename_helps(rows: Writer) -> None:
    path = rows({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"its columns \(question, answer\) fit no format"):
        look(path)
    prepared = look(path, rename={"question": "instruction", "answer": "output"})
    assert (prepared.report.format, prepared.report.train_rows) == ("instruction", 1)


def test_skip_bad_allows_so_many(rows: Writer) -> None:
    path = rows(GOOD, "{", GOOD, "{", GOOD)
    tok = family_tokenizer("chatml")
    with pytest.raises(DataError, match=r"2 of 5 rows cannot be used") as caught:
        prepare(DataOptions(train=str(path), isolate=False), tok, 100)
    assert f"{path}:2: not JSON" in str(caught.value) and f"{path}:4: not JSON" in str(caught.value)
    assert "data.skip_bad=2" in str(caught.value)
    with pytest.raises(DataError, match=r"skip_bad allows 1"):
        prepare(DataOptions(train=str(path), skip_bad=1, isolate=False), tok, 100)
    assert prepare(DataOptions(train=str(path), skip_bad=2, isolate=False), tok, 100).report.train_rows == 3


def test_first_twenty_bad_rows_and_a_count(rows: Writer) -> None:
    path = rows(GOOD, *["{"] * 30)
    with pytest.raises(DataError) as caught:
        prepare(DataOptions(train=str(path), isolate=False), family_tokenizer("chatml"), 100)
    assert str(caught.value).count("not JSON") == 20
    assert "and 10 more" in str(caught.value)


def test_no_template_says_what_to_do(rows: Writer) -> None:
    tok = tokenizer(FAMILIES["chatml"], None)
    with pytest.raises(DataError, match=r"has no chat template(.|\n)*data\.template"):
        prepare(DataOptions(train=str(rows(GOOD))), tok, 100)
    prepared = prepare(DataOptions(train=str(rows(GOOD)), template="chatml", isolate=False), tok, 100)
    assert prepared.report.template == "chatml"


def test_template_file(rows: Writer, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    options = {"train": str(rows(GOOD)), "template": str(file), "isolate": False}
    tok = family_tokenizer("chatml")
    with pytest.raises(DataError, match=r"own\.jinja: .*No such file"):
        prepare(DataOptions(**options), tok, 100)
    file.touch()
    with pytest.raises(DataError, match="the file is empty"):
        prepare(DataOptions(**options), tok, 100)
    file.write_text("{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}")
    prepared = prepare(DataOptions(**options), tok, 100)
    assert tok.decode(prepared.train[0]["input_ids"]) == "a<|im_end|>b<|im_end|>"
    file.write_text("{% for m in messages %}{{ m.content")
    with pytest.raises(DataError, match="the chat template raised TemplateSyntaxError"):
        prepare(DataOptions(**options), tok, 100)
