"""The inspector: from files, lists and datasets; terminal, JSON and HTML; and the command."""

from __future__ import annotations

import html.parser
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.data.inspect import Inspection, inspect_data
from pronghorn.data.options import DataOptions
from pronghorn.errors import ConfigError, DataError
from tests import tiny
from tests.data.conftest import Writer
from tests.data.families import CHAT, FAMILIES, family_tokenizer

ROWS: list[dict[str, Any]] = [
    {"messages": CHAT},
    {
        "messages": [
            {"role": "user", "content": "<script>x</script> & 🎉"},
            {"role": "assistant", "content": "b"},
        ]
    },
    {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d" * 300}]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"))


def shown(inspection: Inspection) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(inspection)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_examples_say_what_trains_and_what_is_special() -> None:
    family = FAMILIES["llama-3"]
    inspection = inspect_data(ROWS[:1], family_tokenizer("llama-3"), isolate=False)
    (example,) = inspection.examples
    assert "".join(piece.text for piece in example.pieces) == family.rendered
    assert "".join(piece.text for piece in example.pieces if piece.trained) == family.trained
    assert [piece.text for piece in example.pieces if piece.special][:2] == [
        "<|begin_of_text|>",
        "<|start_header_id|>",
    ]
    assert example.trained == inspection.report.trained_tokens


def test_neighbouring_special_tokens_stay_apart() -> None:
    inspection = inspect_data([{"text": "<|im_start|><|im_start|>a"}], family_tokenizer("chatml"))
    assert [piece.text for piece in inspection.examples[0].pieces] == [
        "<|im_start|>",
        "<|im_start|>",
        "a",
        "<|im_end|>",
    ]


def test_lists_datasets_and_files_look_alike(rows: Writer) -> None:
    tok = family_tokenizer("chatml")
    data = datasets.Dataset.from_list([*ROWS, ROWS[0]]).select(range(3))
    seen = [inspect_data(each, tok, isolate=False, max_length=500) for each in (ROWS, data, rows(*ROWS))]
    assert seen[0].examples == seen[1].examples == seen[2].examples
    assert [inspection.report.rows_read for inspection in seen] == [3, 3, 3]
    other = inspect_data(data.select([0]), tok, isolate=False, max_length=500)
    assert other.report.rows_read == 1 and not other.report.cached


def test_examples_are_spread_and_cut() -> None:
    texts = [{"text": f"row {number} " + "x" * (3000 if number == 0 else 1)} for number in range(10)]
    inspection = inspect_data(texts, family_tokenizer("chatml"), max_length=5000, examples=3)
    assert [example.row for example in inspection.examples] == [1, 4, 7]
    assert inspection.examples[0].pieces[-1].text == " … and 1007 tokens more"


def test_terminal_shows_everything(rows: Writer) -> None:
    path = rows(*ROWS, "{")
    text = shown(inspect_data(path, family_tokenizer("chatml"), max_length=200, isolate=False))
    for part in (
        "4 read",
        f"{path}:4: not JSON",
        f"1 ({path}:3), losing",
        "over the limit",
        "special_text",
        "Four.",
    ):
        assert part in text
    assert "Be brief.<|im_end|>↵" in text


def test_options_twice_are_refused(rows: Writer) -> None:
    with pytest.raises(DataError, match="options are given twice"):
        inspect_data(DataOptions(train=str(rows(*ROWS))), family_tokenizer("chatml"), loss_on="all")


class _Outline(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_whole_escaped_and_alone(rows: Writer) -> None:
    path = rows(*ROWS, '{"messages": "<b>"}', name="<i>.jsonl")
    page = inspect_data(path, family_tokenizer("chatml"), max_length=200, isolate=False).html()
    outline = _Outline()
    outline.feed(page)
    assert outline.open == []
    assert not outline.tags & {"script", "i", "b", "link", "img"}
    assert "http" not in page
    for part in ("<script>x</script> & 🎉", "<i>.jsonl:4", "row 1: ", "Be brief.", "duplicates", "passed"):
        assert part in outline.text
    assert '<span class="t">Four.</span><span class="t s">&lt;|im_end|&gt;</span>' in page


def test_command_on_rows(rows: Writer, base: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run = CliRunner().invoke(
        app,
        ["inspect", str(rows(*ROWS)), "--model", str(base), "--json", "--html", str(page), "--examples", "1"],
    )
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout)
    assert values["report"]["train_rows"] == 3 and values["report"]["max_length"] == 256
    assert len(values["examples"]) == 1
    assert page.read_text().startswith("<!doctype html>")


def test_command_on_a_run(rows: Writer, base: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{name: {base}}}\ndata: {{train: {rows(*ROWS)}}}\noutput: {{folder: {tmp_path / 'r'}}}\n"
    )
    run = CliRunner().invoke(
        app, ["inspect", str(config), "data.loss_on=last_assistant", "--max-length", "100"]
    )
    assert run.exit_code == 0, run.output
    assert "(limit 100)" in run.output
    assert not (tmp_path / "r").exists()


def test_command_exits_like_training_would(rows: Writer, base: Path) -> None:
    run = CliRunner().invoke(app, ["inspect", str(rows(*ROWS, "{")), "--model", str(base), "--examples", "0"])
    assert isinstance(run.exception, DataError)
    assert "1 of 4 rows cannot be used" in str(run.exception)


def test_command_without_model(rows: Writer) -> None:
    run = CliRunner().invoke(app, ["inspect", str(rows(*ROWS))])
    assert isinstance(run.exception, ConfigError)
    assert "--model MODEL" in run.exception.fix
