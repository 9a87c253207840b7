"""docs/data.md names exactly the formats, checks and templates there are, and its code runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.data.checks import PREFERENCE_CHECKS, PROMPT_CHECKS, ROW_CHECKS
from pronghorn.data.inspect import inspect_data
from pronghorn.data.options import FORMATS
from pronghorn.data.templates import library
from scripts.first_run import README, blocks, commands
from tests import tiny
from tests.data.families import FAMILIES, tokenizer
from tests.guards.source import ROOT

DOCUMENT = ROOT / "docs" / "data.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
ASK = {"role": "user", "content": "a"}


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    tiny.write_base(folder / "my-model", max_position_embeddings=512)
    rows, preferences = blocks(README.read_text(encoding="utf-8"), "json")[0], blocks(TEXT, "json")[0]
    (folder / "rows.jsonl").write_text(rows)
    (folder / "preferences.jsonl").write_text(preferences)
    (folder / "run.yaml").write_text(blocks(README.read_text(encoding="utf-8"), "yaml")[0])
    return folder


def test_formats() -> None:
    assert re.findall(r"^\| `(\w+)` \|", section("Formats"), re.MULTILINE) == [
        "messages", "conversations", "instruction", "prompt_completion", "text", "preference", "prompt_only"
    ]  # fmt: skip
    assert set(re.findall(r"^\| `(\w+)` \|", section("Formats"), re.MULTILINE)) == set(FORMATS)


def test_checks() -> None:
    named = dict(re.findall(r"^\| `(\w+)` \| (stops|warns) \|", section("Checks"), re.MULTILINE))
    there = {**ROW_CHECKS, **PREFERENCE_CHECKS, **PROMPT_CHECKS}
    stops = {name: stops for name, (stops, _) in there.items()}
    tok = tokenizer(FAMILIES["chatml"], "{{ messages[0].content }}")
    rows = ({"messages": [ASK, {**ASK, "role": "assistant"}]}, {"prompt": "a", "completion": "b"})
    for row in rows:
        stops.update({one.name: one.stops for one in inspect_data([row], tok, isolate=False).report.checks})
    assert {name: kind == "stops" for name, kind in named.items()} == stops


def test_templates() -> None:
    assert {name for name in re.findall(r"`([\w.-]+)`", section("Templates")) if name in library()} == set(
        library()
    )


def test_links() -> None:
    named = re.findall(r"\]\(([\w./-]+)\)|`((?:scripts|docs)/[\w./-]+)`", TEXT)
    assert len(named) >= 4
    for beside, below in named:
        assert (DOCUMENT.parent / beside).exists() if beside else (ROOT / below).exists()
    for picture in re.findall(r"\(([\w-]+\.png)\)", TEXT):
        assert (DOCUMENT.parent / picture).stat().st_size < 200_000


def test_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for command in commands(TEXT):
        run = CliRunner().invoke(app, command.split()[1:])
        assert run.exit_code == 0, f"{command}: {run.output}"
    assert (folder / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("number", range(len(blocks(TEXT, "python"))))
def test_python_runs(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program = folder / f"block_{number}.py"
    program.write_text(blocks(TEXT, "python")[number].replace("max_steps=2", "max_steps=1, use_cpu=True"))
    runpy.run_path(str(program))
