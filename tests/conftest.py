"""Set before any test module imports torch or a Hugging Face library."""

from __future__ import annotations

import atexit
import os
import shutil
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


def pytest_configure(config: pytest.Config) -> None:
    """Hide the accelerators from every run that does not ask for ``-m gpu``."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # kernels then run in Triton's interpreter, which has to be chosen before anything imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
