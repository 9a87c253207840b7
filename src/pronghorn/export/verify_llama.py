"""llama.cpp: does it take a folder, and does it compute the same?

llama.cpp opens GGUF only, so the question is what becomes of the folder there. The exporter says what it
refuses, and writes the file for the deep check, each in a process of its own: no code is shared with it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pronghorn.export.verify_engine import Engine, engine_promises
from pronghorn.export.verify_folder import Folder, Row

LLAMA = Engine("llama.cpp", Path(__file__).with_name("verify_in_llama.py"), torch.float16)
# what holds the stored values without rounding them
_FORMATS = (("BF16", "gguf-bf16"), ("F16", "gguf-f16"))


def llama_promises(folder: Path, python: Path) -> tuple[Row, ...]:
    """Rows of the check by the llama.cpp of ``python``, for a model folder whose files are in order."""
    view = Folder(folder)
    if view.is_adapter:
        return (Row(LLAMA.opens, None, "an adapter is applied to its base: export it with gguf-lora"),)
    stored = {tensor.dtype for tensor in view.tensors.values() if len(tensor.shape) > 1}
    kind = next((name for dtype, name in _FORMATS if stored == {dtype}), "gguf-f32")
    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        made = Path(scratch) / "gguf"
        said = write_gguf(folder, made, kind)
        if said:
            return (Row(LLAMA.opens, False, said),)
        return engine_promises(view, LLAMA, python, made)


def write_gguf(folder: Path, target: Path, kind: str) -> str:
    """Have the exporter write a model folder as GGUF; what it said where it did not."""
    command = [sys.executable, "-m", "pronghorn.cli.main", "export", str(folder), str(target)]
    command += ["--format", kind]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return ""
    said = " ".join((done.stderr or done.stdout).split())
    return f"pronghorn export --format {kind}: {said[-400:]}"
