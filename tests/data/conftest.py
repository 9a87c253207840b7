from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

Writer = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds rows that another one tokenised."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows(tmp_path: Path) -> Writer:
    """``rows(row, row, name="x.jsonl")`` writes a file of JSON lines; text is written as it is."""

    def write(*values: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
