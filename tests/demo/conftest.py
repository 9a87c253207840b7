"""The demo's scripts import each other by name, as they do when one of them is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "demo"
sys.path.insert(0, str(DEMO))


@pytest.fixture(scope="session")
def rows():
    """(train, held-out) rows of this Python."""
    import make_rows

    return make_rows.split(make_rows.all_rows())
