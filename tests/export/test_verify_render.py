"""Chat templates of foreign folders: rendered as transformers renders them, and never for long."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.errors import ExportError
from pronghorn.export import verify_render
from pronghorn.export.gguf_ollama import find_pieces
from pronghorn.export.verify import check_files
from pronghorn.export.verify_engines import MEANING
from pronghorn.export.verify_folder import Folder
from pronghorn.export.verify_model import CHAT, chat_ids
from pronghorn.export.verify_render import EndlessError, RenderError, UnrenderedError, rendered
from pronghorn.export.verify_tokens import template_parses
from tests import tiny

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILLS = "{% set n = namespace(t='x') %}{% for a in range(50) %}{% set n.t = n.t + n.t %}{% endfor %}"
POWER = "{% set n = namespace(t=9) %}{% for a in range(50) %}{% set n.t = n.t ** n.t %}{% endfor %}"
WRITES = "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}"
RICH = (
    "{{ bos_token }}{% if tools is none and documents is none %}{% for m in messages %}\n"
    "    {% generation %}<|{{ m.role }}|>{{ m | tojson }}{{ ['<é>'] | tojson(indent=1) }}\n"
    "{% endgeneration %}\n"
    "{% if loop.first %}{% continue %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", ["own", RICH, "{{ raise_exception('no tools') }}"])
def test_the_same_text_as_in_transformers(template: str) -> None:
    tokenizer = tiny.tokenizer()
    if template != "own":
        tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template(list(CHAT), add_generation_prompt=True, tokenize=False)
    except Exception as error:
        with pytest.raises(RenderError, match=str(error)):
            chat_ids(tokenizer)
        return
    assert chat_ids(tokenizer) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "seconds", "told"),
    [
        (LOOP, 0.5, "did not finish within 0.5 s of computing"),
        (POWER, 0.5, "did not finish within 0.5 s of computing"),
        (FILLS, 60.0, "more than 1 GiB"),
        (WRITES, 60.0, "wrote more than 1,048,576 characters"),
    ],
    ids=["loops", "computes", "fills the memory", "writes on"],
)
def test_a_template_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, template: str, seconds: float, told: str
) -> None:
    monkeypatch.setattr(verify_render, "SECONDS", seconds)
    with pytest.raises(EndlessError, match=told):
        rendered(template, CHAT, {}, prompt=False)


def test_a_folder_whose_template_loops_is_told_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verify_render, "SECONDS", 0.5)
    folder = shutil.copytree(tiny.write_base(tmp_path / "base", "llama"), tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(LOOP)
    report = check_files(folder, None)
    failure = report.first_failure
    assert failure is not None
    assert "does not render a short chat: it did not finish within 0.5 s of computing" in failure.detail
    assert {report.engine(name).outcome for name in ("transformers 5", "vllm")} == {"endless chat"}
    assert MEANING["endless chat"] in str(report)


def python_that(folder: Path, first: str) -> str:
    """An interpreter that does something else first."""
    (folder / "python").write_text(f'#!/bin/sh\n{first}\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    return str(folder / "python")


def test_time_is_that_of_computing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(verify_render, "SECONDS", 1.0)
    monkeypatch.setattr(sys, "executable", python_that(tmp_path, "sleep 2"))
    assert rendered("late {{ messages|length }}", CHAT, {}, prompt=False) == f"late {len(CHAT)}"
    monkeypatch.setattr(verify_render, "WAIT_SECONDS", 1.0)
    with pytest.raises(EndlessError, match=r"did not finish within 1 s$"):
        rendered("later {{ messages|length }}", CHAT, {}, prompt=False)


def test_a_process_that_fails_says_nothing_about_the_template(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = tiny.tokenizer()
    folder = tiny.write_base(tmp_path / "base", "llama")
    template = "{{ messages[0].content }} fails"
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(sys, "executable", python_that(tmp_path, "echo first >&2; echo no room >&2; exit 3"))
    with pytest.raises(UnrenderedError, match=r"ended with code 3: no room$"):
        rendered(template, CHAT, {}, prompt=False)
    row = template_parses(Folder(folder))
    assert (row.ok, row.faults) == (None, ())
    assert row.detail == "the chat template could not be rendered: its process ended with code 3: no room"
    with pytest.raises(ExportError, match="could not be rendered: its process ended with code 3") as caught:
        find_pieces(tokenizer, template)
    assert "make room" in caught.value.fix


def test_a_lower_limit_on_memory_is_kept() -> None:
    program = (
        "import runpy\n"
        f"made = runpy.run_path({verify_render.__file__!r}, run_name='render')\n"
        f"print(made['rendered']('{{{{ messages|length }}}} turns', [{{}}, {{}}], {{}}, prompt=False))\n"
        f"try:\n    made['rendered']({FILLS!r}, [], {{}}, prompt=False)\n"
        "except made['EndlessError'] as error:\n    print(error)\n"
    )
    shell = ["sh", "-c", 'ulimit -v 900000 && exec "$0" -c "$1"', sys.executable, program]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.stdout == "2 turns\nit took more than 0.86 GiB\n", done.stderr
