"""Drives the real llama.cpp in an environment of its own. A missing engine is a failure, never a skip."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
SCRIPT = Path(__file__).with_name("llama_run.py")


@dataclass(frozen=True)
class Answer:
    """llama.cpp on one file: logits [tokens, vocabulary] of each row, and the rest of ``llama_run.py``."""

    logits: list[torch.Tensor]
    said: dict[str, Any]


def require() -> Path:
    """The interpreter with llama_cpp."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: `make {PYTHON.parents[1].name}` builds llama.cpp there")
    return PYTHON


def run(jobs: list[dict[str, Any]], folder: Path) -> list[Answer]:
    """Run jobs of ``llama_run.py`` in one process."""
    job, out = folder / "llama-job.json", folder / "llama-answers.npz"
    job.write_text(json.dumps(jobs))
    finished = subprocess.run(
        [require(), SCRIPT, job, out],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    with np.load(out) as found:
        return [
            Answer(
                [torch.from_numpy(found[f"logits-{i}-{j}"]) for j in range(len(jobs[i]["rows"]))],
                json.loads(str(found[f"said-{i}"])),
            )
            for i in range(len(jobs))
        ]
