"""llama.cpp's own quantiser, in a process of its own: it may live in another environment, and it may abort.

This file is also the program that runs there, so it imports nothing of ours when it is started by its path:
``python gguf_engine.py SOURCE TARGET Q4_K_M THREADS``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def quantiser(python: Path | None) -> str:
    """The interpreter that has llama_cpp: ``python``, or this one.

    Raises:
        MissingDependencyError: none has it; what to install, and what to take instead.
    """
    from pronghorn.errors import MissingDependencyError

    if python is None and find_spec("llama_cpp") is not None:
        return sys.executable
    if python is not None:
        asked = subprocess.run(
            [str(python), "-c", "import llama_cpp"], capture_output=True, text=True, check=False
        ) if python.is_file() else None  # fmt: skip
        if asked is not None and asked.returncode == 0:
            return str(python)
    raise MissingDependencyError(
        f"this GGUF format is made by llama.cpp's own quantiser, and {python or 'this environment'} has no "
        "llama_cpp",
        fix="pip install llama-cpp-python (it compiles llama.cpp, about 3 minutes on 2 cores), name an "
        "interpreter that has it (--llama-python PATH), or use gguf-q8_0, which needs neither",
    )


def quantise(python: str, source: Path, target: Path, kind: str) -> None:
    """Write ``target`` from the 16-bit ``source`` as ``kind``, such as "q4_k_m".

    Raises:
        ExportError: llama.cpp refused, with the last it said.
    """
    from pronghorn.errors import ExportError

    command = [python, __file__, str(source), str(target), kind.upper(), str(os.cpu_count() or 1)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not target.is_file():
        said = (done.stderr + done.stdout).strip().splitlines()[-3:]
        raise ExportError(
            f"llama.cpp's quantiser failed with code {done.returncode}: {' / '.join(said) or 'no message'}",
            fix="use gguf-q8_0, or another version of llama-cpp-python",
        )


def main(source: str, target: str, kind: str, threads: str) -> int:
    """Quantise one file; 0 when it is written."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = int(threads)
    return int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))


if __name__ == "__main__":
    sys.path[:] = sys.path[1:]  # this folder: its names are not meant for other libraries
    sys.exit(main(*sys.argv[1:]))
