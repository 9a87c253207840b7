"""Counts kept while rows stream past: a few bytes per row, and the first places of everything unusual."""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from pronghorn.data.report import SHOWN, Places
from pronghorn.data.rows import BadRow, Row
from pronghorn.data.tokens import EncodedRow

BINS = 16  # bars of the length histogram
TOTALS = ("rows_read", "bad", "tokens", "trained_tokens", "truncated_tokens")  # of a tally, what adds up


@dataclass
class Count:
    """How many rows, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count a row at ``place``."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(place)

    def merge(self, other: Count) -> None:
        """Count the rows of ``other`` as well, which lie behind these."""
        self.count += other.count
        self.first += other.first[: SHOWN - len(self.first)]

    def places(self) -> Places:
        """As it stands in a report."""
        return Places(self.count, tuple(self.first))


@dataclass
class PartTally:
    """The rows written of one part (train or eval), in order: a 64-bit hash and where each came from."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    files: array[int] = field(default_factory=lambda: array("H"))
    numbers: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, other: PartTally) -> None:
        """Append the rows of ``other``."""
        self.hashes.extend(other.hashes)
        self.files.extend(other.files)
        self.numbers.extend(other.numbers)


@dataclass
class Tally:
    """Everything counted over all parts."""

    names: list[str] = field(default_factory=list)  # of the sources
    rows_read: int = 0
    bad: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    longest: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated_tokens: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))
    dropped: Count = field(default_factory=Count)
    truncated: Count = field(default_factory=Count)
    flagged: defaultdict[str, Count] = field(default_factory=lambda: defaultdict(Count))

    def add_bad(self, row: BadRow) -> None:
        """Count a row that cannot be used."""
        self.bad += 1
        if len(self.bad_rows) < SHOWN:
            self.bad_rows.append(row)

    def merge(self, other: Tally) -> None:
        """Count all of ``other`` as well, whose rows lie behind these."""
        self.bad_rows += other.bad_rows[: SHOWN - len(self.bad_rows)]
        self.longest = max(self.longest, other.longest)
        self.lengths.extend(other.lengths)
        for name in TOTALS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.merge(other.dropped)
        self.truncated.merge(other.truncated)
        for name, count in other.flagged.items():
            self.flagged[name].merge(count)

    def keeps(self, encoded: EncodedRow, row: Row, *, drop_long: bool) -> bool:
        """Count an encoded row; False if it is not to be written."""
        place = f"{row.file}:{row.number}"
        cut = encoded.full_length - len(encoded.input_ids)
        trained = encoded.trained
        self.longest = max(self.longest, encoded.full_length)
        self.lengths.append(encoded.full_length)
        if trained == 0 and not cut:
            self.flagged["masked"].add(place)
            return False
        if trained == 0 or (cut and drop_long):
            self.dropped.add(place)
            return False
        if cut:
            self.truncated.add(place)
            self.truncated_tokens += cut
        for flag in encoded.flags:
            self.flagged[flag].add(place)
        self.tokens += len(encoded.input_ids)
        self.trained_tokens += trained
        return True

    def place(self, part: PartTally, index: int) -> str:
        """Where row ``index`` of a part came from."""
        return f"{self.names[part.files[index]]}:{part.numbers[index]}"

    def histogram(self) -> tuple[tuple[int, int], ...]:
        """``(lower bound in tokens, rows)`` of up to 16 bars of equal width."""
        if not self.lengths:
            return ()
        width = max(1, -(-(self.longest + 1) // BINS))
        counts = np.bincount(np.asarray(self.lengths) // width, minlength=self.longest // width + 1)
        return tuple((index * width, int(count)) for index, count in enumerate(counts))


def row_hash(input_ids: memoryview | Iterable[int]) -> int:
    """64 bits of BLAKE2 over the ids, 4 bytes each: 10 M different rows collide with a chance of 3e-6."""
    data = input_ids if isinstance(input_ids, memoryview) else array("i", input_ids)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
