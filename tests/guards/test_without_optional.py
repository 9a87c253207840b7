"""Loading, attaching and saving work where the libraries of training and of the command line are missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import tiny
from tests.guards.source import ROOT

OPTIONAL = ("trl", "datasets", "typer", "rich", "bitsandbytes")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.guards.without_optional", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_load_attach_and_save_without_the_optional_libraries(tmp_path: Path) -> None:
    tiny.write_base(tmp_path / "base")
    finished = run(tmp_path, *OPTIONAL)
    assert finished.returncode == 0, finished.stderr[-4000:]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4


def test_the_finder_hides_what_it_is_told_to(tmp_path: Path) -> None:
    finished = run(tmp_path, "transformers")
    assert finished.returncode != 0
    assert "No module named 'transformers'" in finished.stderr
