"""The same tests on the device there is; without one, in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import sys

import pytest
import torch

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]  # Triton is made for Linux only


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a device these are its tests: `pytest -m gpu` takes them too."""
    here = str(__file__).removesuffix("conftest.py")
    for item in items:
        if torch.cuda.is_available() and str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
