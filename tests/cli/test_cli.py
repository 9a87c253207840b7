"""The command line: fast help, errors as messages and exit codes, and each verb end to end."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pronghorn import __version__, errors
from pronghorn.cli import main as cli
from pronghorn.cli.tables import byte_bar
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("cli") / "base", "llama", dtype=torch.float16)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return tiny.write_adapter(base.parent / "adapter", base)


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in this process; the exit code."""
    monkeypatch.setattr(sys, "argv", ["pronghorn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['pronghorn', sys.argv[1]]\n"
        "from pronghorn.cli.main import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)))"
    )
    for flag, expected in (("--help", "verify"), ("--version", __version__)):
        done = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"


def test_every_verb_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        assert run(verb, "--help", monkeypatch=monkeypatch) == 0
        assert verb in capsys.readouterr().out


def test_a_fault_of_the_disk_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", "a" * 300, monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == f"error: File name too long: {'a' * 300}\n"


def test_rows_beside_a_whole_model_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    options = ("--deep", "--against", base, "--rows", rows)
    assert run("verify", base, *options, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert f"{base} is a whole model: nothing was trained on rows" in told and "leave out --rows" in told


def _tree(kind: type[errors.PronghornError]) -> list[type[errors.PronghornError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in _tree(child))]


@pytest.mark.parametrize("kind", _tree(errors.PronghornError))
def test_every_error_becomes_a_message_and_its_exit_code(
    kind: type[errors.PronghornError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind("the thing is 3, the rule says 2", fix="write 2")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == kind.exit_code
    assert capsys.readouterr().err == "error: the thing is 3, the rule says 2\n  fix: write 2\n"


def test_verify_prints_a_table_or_json(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", base, monkeypatch=monkeypatch) == 0
    assert "special token ids" in capsys.readouterr().out
    folder = shutil.copytree(base, tmp_path / "folder")
    (folder / "model.safetensors").write_bytes(b"old")
    assert run("verify", folder, "--json", monkeypatch=monkeypatch) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False
    assert "breaks a promise: no stale weight file: model.safetensors" in said.err
    assert run("verify", tmp_path / "nowhere", monkeypatch=monkeypatch) == 2


def test_unverified_exits_non_zero_unless_allowed(
    adapter: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost = shutil.copytree(adapter, tmp_path / "adapter")
    config = lost / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "gone/away"}))
    arguments = ("verify", lost, "--deep")
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    assert "not verified" in capsys.readouterr().err
    assert run(*arguments, "--allow-unverified", monkeypatch=monkeypatch) == 0


def test_export_verifies_and_chat_answers(
    adapter: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "merged"
    assert run("export", adapter, target, "--format", "merged_16bit", monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr()
    assert shown.err == ""  # no bar without a terminal
    assert "logits equal base + adapter" in shown.out
    assert "elements changed" in shown.out
    assert run("export", adapter, target, monkeypatch=monkeypatch) != 0
    assert "overwrite" in capsys.readouterr().err
    assert run("export", adapter, target, "--overwrite", "--no-verify", monkeypatch=monkeypatch) == 0
    assert run("export", adapter, tmp_path / "x", "--format", "gguf", monkeypatch=monkeypatch) == 2
    assert "merged_16bit" in capsys.readouterr().err
    answers = []
    for folder in (target, adapter):
        arguments = ("chat", folder, "--prompt", "Hello", "--max-new-tokens", "8", "--system", "Be brief.")
        assert run(*arguments, monkeypatch=monkeypatch) == 0
        said = capsys.readouterr()
        answers.append(said.out)
        assert said.err == ""  # no bar, no warning of a library
    assert answers[0].strip()
    assert answers[0] == answers[1]


def test_an_export_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with byte_bar("writing", "verifying") as move:
        move(1000, 2000)
        move(2000, 2000)
    assert "writing" in terminal.getvalue() and "verifying" in terminal.getvalue()
    assert "2.0/2.0 kB" in terminal.getvalue()


def test_interactive_chat_ends_with_an_empty_line(base: Path) -> None:
    command = [sys.executable, "-m", "pronghorn.cli.main", "chat", str(base), "--max-new-tokens", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input="Hello\nAnd you?\n\n", capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 3
