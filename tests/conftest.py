"""Set before any test module imports torch or a Hugging Face library."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile

import pytest

# Offline, and blind to the caches and the token of whoever runs the tests.
_HOME = tempfile.mkdtemp(prefix="pronghorn-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["HF_HOME"] = _HOME
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny models gain nothing from threads, and sums are in the same order on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hide accelerators from every run that does not ask for ``-m gpu``. Here, not in pytest_configure: conftest
# files of folders named on the command line come before it, and Triton's interpreter is chosen at its import.
_MARKS = sys.argv[sys.argv.index("-m") + 1] if "-m" in sys.argv[:-1] else ""
if "gpu" not in _MARKS.replace("not gpu", ""):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Each test draws the same numbers, whatever ran before it; tests that need no torch do not import it."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
