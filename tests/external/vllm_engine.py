"""Drives the real vLLM in its own environment beside .venv. A missing engine is a failure, never a skip."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
SCRIPT = Path(__file__).with_name("vllm_generate.py")
ENGINE_SECONDS = 180  # 10-30 s were measured for one start on two cores


def run(engines: list[dict[str, Any]], folder: Path) -> list[list[list[dict[str, Any]]]]:
    """Run a job of ``vllm_generate.py``; the answer is indexed [engine][plain, adapter 1, ...][prompt]."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: `make {PYTHON.parents[1].name}` builds the vLLM environment")
    job, out = folder / "job.json", folder / "answers.json"
    job.write_text(json.dumps(engines))
    finished = subprocess.run(
        [PYTHON, SCRIPT, job, out],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 + ENGINE_SECONDS * len(engines),
        check=False,
    )
    if not out.exists():
        pytest.fail(f"vLLM exited with code {finished.returncode}:\n{finished.stdout[-4000:]}")
    answers: list[list[list[dict[str, Any]]]] = json.loads(out.read_text())
    return answers
