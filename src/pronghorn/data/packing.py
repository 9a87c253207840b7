"""Whole rows, never split, into bins of a token budget: forward passes with next to no padding."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("input_ids", _IDS), ("labels", _IDS), ("lengths", _IDS)])
_TOKENS_AT_ONCE = 1 << 20  # tokens gathered before they are written: 8 MB of ids and labels


@dataclass(frozen=True)
class Packing:
    """How well rows fill their bins.

    ``filled`` is tokens over the room of all bins; ``layout_hash`` names which row lies where.
    """

    rows: int
    bins: int
    bin_tokens: int
    tokens: int
    filled: float
    layout_hash: str

    def __str__(self) -> str:
        mean = self.rows / max(self.bins, 1)
        return f"{self.bins} bins of {self.bin_tokens} tokens, {self.filled:.1%} filled, {mean:.1f} rows each"


def best_fit(lengths: Sequence[int], budget: int, seed: int) -> list[array[int]]:
    """Put rows, longest first, each into the fullest bin that still has room for it.

    Best-fit decreasing uses at most 11/9 of the bins that are needed, plus 4 (Johnson 1973). Rows of equal
    length come in an order drawn from ``seed``, and nothing else is random.

    Args:
        lengths: tokens of each row, none above ``budget``.
        budget: tokens of one bin.
        seed: chooses among rows of equal length.

    Returns:
        The row indices of each bin.
    """
    drawn = array("I", range(len(lengths)))  # arrays: 4 bytes a row, where a list has 40
    random.Random(seed).shuffle(drawn)
    order = np.asarray(drawn)
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    bins: list[array[int]] = []
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # free tokens -> bins
    rooms = 0  # bit n: some bin has n tokens free; the lowest set bit at or above a length is the best fit
    for row in memoryview(order.data):
        length = lengths[row]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(row)
        else:
            room, chosen = budget, len(bins)
            bins.append(array("I", [row]))
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bins


def write_bins(rows: Any, path: Path, budget: int, seed: int) -> Packing:
    """Write one row per bin: input_ids and labels of its rows end to end, and their ``lengths``.

    Args:
        rows: a ``datasets.Dataset`` with input_ids and labels, none longer than ``budget``.
        path: the Arrow file to make.
        budget: tokens of one bin.
        seed: as in ``best_fit``.
    """
    arrow = rows.with_format("arrow")
    lengths = _lengths(arrow)
    bins = best_fit(lengths, budget, seed)
    digest = hashlib.sha256()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:
        step = max(1, _TOKENS_AT_ONCE // budget)
        for start in range(0, len(bins), step):
            batch = bins[start : start + step]
            digest.update(repr([[*members] for members in batch]).encode())
            writer.write_batch(_batch(arrow, batch, lengths))
    tokens = sum(lengths)
    filled = tokens / (len(bins) * budget) if bins else 0.0
    return Packing(len(lengths), len(bins), budget, tokens, filled, digest.hexdigest()[:16])


def _lengths(arrow: Any) -> array[int]:
    lengths = array("i")
    for table in arrow.select_columns(["input_ids"]).iter(10_000):
        lengths.frombytes(pc.list_value_length(table.column("input_ids")).to_numpy().tobytes())
    return lengths


def _batch(arrow: Any, bins: list[array[int]], lengths: array[int]) -> pa.RecordBatch:
    """Bins as Arrow lists: the rows' tokens keep their order, only the list boundaries move."""
    table = arrow[[row for members in bins for row in members]]
    sizes = [[lengths[row] for row in members] for members in bins]
    ends = [0]
    for members in sizes:
        ends.append(ends[-1] + sum(members))
    tokens = [
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), _flat(table.column(name)))
        for name in ("input_ids", "labels")
    ]
    return pa.record_batch([*tokens, pa.array(sizes, _IDS)], schema=_SCHEMA)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks().flatten()  # rows picked one by one are chunks of their own: 1 us, not 20
