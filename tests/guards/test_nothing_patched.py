"""Every function and class of torch, transformers, peft and trl is the same object before and after us."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.guards import fingerprint
from tests.guards.source import ROOT


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("road")
    written = folder / "report.json"
    command = [sys.executable, "-m", "tests.guards.fingerprint", folder, written]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found: dict[str, Any] = json.loads(written.read_text())
    return found


def test_importing_every_module_changes_nothing(report: dict[str, Any]) -> None:
    assert report["after_import"] == []


def test_load_train_and_merge_change_nothing(report: dict[str, Any]) -> None:
    assert report["after_use"] == []


def test_enough_is_watched(report: dict[str, Any]) -> None:
    assert report["watched"] > 500_000  # 860 000 on the pinned stack


@pytest.mark.parametrize(
    ("owner", "name"),
    [(torch, "matmul"), (torch.nn, "Linear"), (torch.nn.Linear, "forward"), (torch.Tensor, "backward")],
)
def test_the_look_sees_a_replacement(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.watched()
    assert fingerprint.changes(before) == []
    monkeypatch.setattr(owner, name, lambda *_: None)
    assert any(changed.endswith(f".{name}") for changed in fingerprint.changes(before))


def test_the_look_sees_a_changed_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.watched()
    monkeypatch.setattr(torch.nn.functional.softmax, "__defaults__", (0, 3, None))
    assert "torch.nn.functional.softmax.__defaults__" in fingerprint.changes(before)
