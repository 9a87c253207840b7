"""What the README tells a person to type works as it is written there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.first_run import README, blocks, commands
from tests import tiny
from tests.guards.source import ROOT

DOCUMENTS = (README, ROOT / "CONTRIBUTING.md")
TEXT = README.read_text(encoding="utf-8")


def test_the_first_command_comes_early() -> None:
    assert TEXT.splitlines().index("```bash") < 15


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_of_a_kind_that_is_checked(document: Path) -> None:
    kinds = ("make ", "pip install ", "python3 -m venv ", "pronghorn ")
    found = commands(document.read_text(encoding="utf-8"))
    assert found
    assert [line for line in found if not line.startswith(kinds)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_named_exists(document: Path) -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


def test_the_install_commands_use_the_pinned_files() -> None:
    pins = (ROOT / "constraints.txt").read_text()
    (torch,) = re.findall(r"pip install (torch==\S+)", TEXT)
    assert f"{torch}\n" in pins
    assert "pip install --constraint constraints.txt --editable ." in TEXT


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|benchmarks|docs|scripts|src)/[\w./-]*)`|\]\(([\w./-]+)\)", text)
    assert named
    assert [name for pair in named for name in pair if name and not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows and run.yaml as the README shows them."""
    folder = tmp_path_factory.mktemp("own")
    tiny.write_base(folder / "my-model", max_position_embeddings=512)
    rows, settings = blocks(TEXT, "json")[0], blocks(TEXT, "yaml")[0]
    (folder / "rows.jsonl").write_text(rows * 12)
    (folder / "run.yaml").write_text(settings)
    return folder


def test_the_commands_run(own_folder: Path) -> None:
    typed = [line for line in commands(TEXT) if line.startswith("pronghorn ")]
    assert [line.split()[1] for line in typed] == ["train", "export", "verify", "chat"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in typed:
        finished = subprocess.run(
            command,
            shell=True,
            cwd=own_folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}"
    assert (own_folder / "merged" / "first" / "config.json").is_file()


def test_the_notebook_block_runs(own_folder: Path) -> None:
    (program,) = blocks(TEXT, "python")
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=own_folder, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    assert (own_folder / "my-adapter" / "adapter_config.json").is_file()
    assert (own_folder / "my-merged" / "config.json").is_file()
