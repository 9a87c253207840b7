"""Bins of whole rows: every row once, none split, nothing over the budget, the same bins every time."""

from __future__ import annotations

import random
import tracemalloc
from array import array
from pathlib import Path
from typing import Any

import datasets
import pytest
from pydantic import ValidationError

from pronghorn.data.inspect import inspect_data
from pronghorn.data.options import DataOptions
from pronghorn.data.packing import best_fit, write_bins
from pronghorn.data.prepare import prepare
from pronghorn.data.report import DataReport
from pronghorn.errors import DataError
from tests.data.conftest import Writer
from tests.data.families import family_tokenizer
from tests.data.test_prepare import ask, run, shown


def lengths_of(count: int, longest: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, longest + 1), k=count)


@pytest.mark.parametrize(("count", "longest", "budget"), [(1, 8, 8), (500, 64, 64), (500, 64, 257)])
def test_every_row_is_in_one_bin_and_no_bin_is_over_the_budget(count: int, longest: int, budget: int) -> None:
    lengths = lengths_of(count, longest)
    bins = best_fit(lengths, budget, seed=0)
    assert sorted(row for members in bins for row in members) == list(range(count))
    assert max(sum(lengths[row] for row in members) for members in bins) <= budget
    needed = -(-sum(lengths) // budget)
    assert len(bins) <= 11 / 9 * needed + 4


def test_each_row_goes_where_it_leaves_least_room() -> None:
    bins = best_fit([3, 60, 42, 55], 100, seed=0)
    assert [[*members] for members in bins] == [[1], [3, 2, 0]]  # first fit: [1, 0], [3, 2]
    assert best_fit([], 10, seed=0) == []


def test_the_seed_alone_decides_among_equal_rows() -> None:
    lengths = lengths_of(200, 20)
    first = best_fit(lengths, 64, seed=1)
    assert best_fit(lengths, 64, seed=1) == first
    other = best_fit(lengths, 64, seed=2)
    assert other != first
    sizes = [[lengths[row] for row in members] for members in first]
    assert [[lengths[row] for row in members] for members in other] == sizes


def test_the_plan_of_bins_takes_few_bytes_a_row() -> None:
    """25; lists of Python's numbers take 60."""
    lengths = array("i", lengths_of(20_000, 200))
    tracemalloc.start()
    best_fit(lengths, 2048, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / len(lengths) < 40


def test_written_bins_hold_the_rows_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronghorn.data.packing._TOKENS_AT_ONCE", 100)  # several batches
    values = [[100 * index + at for at in range(length)] for index, length in enumerate(lengths_of(60, 30))]
    rows = datasets.Dataset.from_list(
        [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in values]
    ).select(range(3, 60))  # as after rows were set aside for evaluation
    packing = write_bins(rows, tmp_path / "bins.arrow", 40, seed=0)
    found = []
    for row in datasets.Dataset.from_file(str(tmp_path / "bins.arrow")):
        assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["labels"]) <= 40
        start = 0
        for length in row["lengths"]:
            found.append(row["input_ids"][start : start + length])
            assert row["labels"][start : start + length] == [-100, *found[-1][1:]]
            start += length
    assert sorted(found) == sorted(values[3:])
    assert packing.tokens == sum(map(len, found)) and packing.rows == 57
    assert packing.filled == packing.tokens / (packing.bins * 40)
    assert f"{packing.bins} bins of 40 tokens" in str(packing)


def test_prepared_rows_come_with_their_bins(rows: Writer) -> None:
    path = rows(*[ask(number, "y" * (number % 7 + 1)) for number in range(40)])
    plain = run(path, limit=60, eval_fraction=0.2)
    packed = run(path, limit=60, eval_fraction=0.2, packing=True)
    assert plain.bins is None and plain.report.packing is None
    assert packed.train["input_ids"] == plain.train["input_ids"]
    assert packed.eval is not None and plain.eval is not None
    assert packed.eval["input_ids"] == plain.eval["input_ids"]
    bins, report = packed.bins, packed.report
    assert bins is not None and report.packing is not None
    assert sum(map(len, bins["lengths"])) == report.train_rows == report.packing.rows
    assert sorted(t for ids in bins["input_ids"] for t in ids) == sorted(
        t for ids in plain.train["input_ids"] for t in ids
    )
    assert "packed" in shown(report) and f"{report.packing.filled:.1%} filled" in shown(report)
    assert DataReport.from_dict(report.as_dict()) == report
    again = run(path, limit=60, eval_fraction=0.2, packing=True)
    assert again.report.cached and again.bins is not None and again.bins["lengths"] == bins["lengths"]
    fresh = run(path, limit=60, eval_fraction=0.2, packing=True, cache=False)
    assert fresh.report.packing == report.packing and fresh.bins is not None
    assert fresh.bins["input_ids"] == bins["input_ids"]
    wide = run(path, limit=60, eval_fraction=0.2, packing=True, pack_tokens=200).report.packing
    assert wide is not None and wide.bin_tokens == 200 and wide.bins < report.packing.bins


def test_the_inspector_shows_how_full_the_bins_are(rows: Writer) -> None:
    path = rows(*[ask(number) for number in range(9)])
    options = DataOptions(train=(str(path),), packing=True, isolate=False)
    found = inspect_data(options, family_tokenizer("chatml"), max_length=100)
    packing = found.report.packing
    assert packing is not None and str(packing) in found.html()
    assert found.as_dict()["report"]["packing"]["filled"] == packing.filled
    assert len(found.examples) == 5 and found.examples[0].tokens < 100  # rows, not bins


def test_no_rows_make_no_bins(rows: Writer) -> None:
    with pytest.raises(DataError, match="no row to train on"):
        run(rows(""), packing=True, format="messages")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"packing": True, "pack_tokens": 99}, r"pack_tokens is 99, but a row may have 100 tokens"),
        ({"pack_tokens": 200}, "no effect without packing"),
    ],
)
def test_budgets_that_cannot_work_are_refused(rows: Writer, options: dict[str, Any], said: str) -> None:
    with pytest.raises((DataError, ValidationError), match=said):
        prepare(
            DataOptions(train=(str(rows(ask(1))),), isolate=False, **options),
            family_tokenizer("chatml"),
            100,
        )
