"""One loss and one gradient however a step is cut: whole runs against float64, as in benchmarks/parity.py."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from benchmarks import parity
from pronghorn.training.config import parse_config
from pronghorn.training.material import gather
from pronghorn.training.progress import Narrator
from tests import tiny
from tests.training.conftest import write_rows


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_cut_is_the_token_mean_of_the_step(
    family: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = tiny.write_base(tmp_path / "base", family, dtype=torch.float32)
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    path = write_rows(tmp_path / "rows.jsonl", count)
    config = parse_config(parity.configuration(adapter, path, tmp_path / "unused", parity.CUTS[0]))
    rows = datasets.Dataset.from_list(gather(config, Narrator(quiet=True)).rows.to_list())
    truth = parity.row_by_row(base, adapter, rows, torch.float64)
    single = parity.row_by_row(base, adapter, rows, torch.float32)
    norm = truth.gradient.norm()
    bound = 2 * float((single.gradient - truth.gradient).norm() / norm)  # rounding itself, x2
    assert bound < 1e-5
    cuts = [cut for cut in parity.CUTS if cut[3] == count]
    assert cuts
    for number, cut in enumerate(cuts):
        found = parity.ours(base, adapter, path, rows, cut, tmp_path / f"run-{number}")
        assert found.loss == pytest.approx(truth.loss, rel=5e-7), cut
        assert found.evaluation == pytest.approx(truth.loss, rel=5e-7), cut
        assert float((found.gradient - truth.gradient).norm() / norm) <= bound, cut
