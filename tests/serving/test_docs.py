"""The commands of docs/serving.md run as they are written there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scripts.first_run import ROOT, commands
from tests import multimodal, tiny

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_commands_run(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tiny.write_adapter(tmp_path / "helper", base, use_rslora=True))
    images = tmp_path / "images"
    multimodal.write_adapter(images / "helper", multimodal.write_base(images / "base"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    elsewhere = (needs_llama_cpp, needs_llm_compressor, needs_hub)
    typed = [line for line in commands(TEXT) if not any(needs(line) for needs in elsewhere)]
    assert {line.split()[1] for line in typed} == {"export", "serve", "doctor", "verify"}
    for command in typed:
        assert command.startswith("pronghorn ")
        folder = images if "--text-only" in command else tmp_path
        done = subprocess.run(
            command, shell=True, cwd=folder, env={**os.environ, "PATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if "export" in command:
            assert ("llama-server -m" if "gguf" in command else "vllm serve") in done.stdout


def needs_llama_cpp(command: str) -> bool:
    """Run by tests/external/test_llama_docs.py, where llama.cpp is."""
    return "--llama-python" in command


def needs_hub(command: str) -> bool:
    """Run by tests/serving/test_push.py, where a stand-in for the hub is."""
    return "push" in command


def needs_llm_compressor(command: str) -> bool:
    """Run by tests/external/test_calibrated.py, where llm-compressor is."""
    return "--calibrate-python" in command
