"""One tiny base and a few rows for all training tests, and a run.yaml as a mapping."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.training.run import RunResult, train
from tests import tiny

WORDS = ("class", "return", "import", "torch", "tensor", "self", "value", "error", "name", "type", "none")
MakeConfig = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama", "llama", dtype=torch.float32)


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """``count`` prompt/completion rows of ragged length."""
    chooser = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(chooser.choices(WORDS, k=chooser.randint(low, high)))

    rows = [{"prompt": text(2, 9), "completion": " " + text(2, 7)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (19 rows: the last batch is partial) and eval.jsonl (7 rows)."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", 19)
    write_rows(folder / "eval.jsonl", 7, seed=1)
    return folder


def config_of(base: Path, rows: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """8 steps, 2 epochs with a partial last batch, dropout 0.1, accumulation 2, evaluation each 3."""
    config: dict[str, Any] = {
        "model": {"name": str(base)},
        "data": {"train": str(rows / "train.jsonl"), "eval": str(rows / "eval.jsonl"), "cache": False},
        "lora": {"r": 4, "dropout": 0.1},
        # the plan has tests of its own; a tiny run fits
        "training": {
            "epochs": 2,
            "batch_size": 3,
            "gradient_accumulation": 2,
            "learning_rate": 0.01,
            "over_budget": "skip",
        },
        "eval": {"every_steps": 3},
        "checkpoints": {"every_steps": 4},
        "logging": {"progress": "none"},
        "output": {"folder": str(folder)},
    }
    for key, value in sections.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


@pytest.fixture
def make_config(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeConfig:
    """``make_config("name", training={...})``: that configuration with changes, in a folder of that name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def make(name: str = "run", **sections: Any) -> dict[str, Any]:
        return config_of(base, rows, tmp_path / name, **sections)

    return make


@pytest.fixture(scope="session")
def straight(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The uninterrupted run of the unchanged configuration; not to be written to."""
    return train(config_of(base, rows, tmp_path_factory.mktemp("straight") / "run"))
