"""What docs/serving.md says about llama.cpp runs as it is written there, in the environments it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.first_run import ROOT, blocks, commands
from tests import tiny
from tests.external import llama_engine
from tests.serving.test_docs import needs_llama_cpp

pytestmark = pytest.mark.external

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_commands_and_the_program_run(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tiny.write_adapter(tmp_path / "helper", base))
    environment = llama_engine.require().parents[1]
    (tmp_path / environment.name).symlink_to(environment)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = [line for line in commands(TEXT) if needs_llama_cpp(line)]
    assert own
    for command in [line for line in commands(TEXT) if "served/gguf" in line] + own:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (tmp_path / "served" / "q4" / "model-Q4_K_M.gguf").is_file()
    (program,) = [block for block in blocks(TEXT, "python") if "llama_cpp" in block]
    said = subprocess.run(
        [llama_engine.require(), "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.endswith("\n")
