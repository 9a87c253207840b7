"""The judgement of benchmarks/curve.py, and that its committed result is within its bound."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import curve
from pronghorn.training.run import RunResult


def run(*losses: float) -> RunResult:
    return RunResult(Path(), Path(), len(losses), losses, {"eval_loss": losses[-1]})


def test_a_curve_that_moves_more_than_rounding_does_is_refused() -> None:
    plain = run(5.0, 4.0, 3.0)
    rounded = [run(5.0, 4.0 + 4e-6, 3.0), run(5.0, 4.0, 3.0 + 6e-6)]
    text, within = curve.table(plain, run(5.0, 4.0, 3.0 + 15e-6), rounded)
    assert within and "5.0e-06 by acceleration, 2.0e-06 by one rounding (2.50 times" in text
    assert not curve.table(plain, run(5.0, 4.0, 3.0 + 20e-6), rounded)[1]


def test_the_committed_result_is_within_the_bound() -> None:
    found = re.search(r"\(([\d.]+) times; the bound is ([\d.]+)\)", curve.RESULTS.read_text())
    assert found is not None and float(found[1]) <= float(found[2]) == curve.BOUND
