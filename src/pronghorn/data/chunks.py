"""Rows of a run cut into pieces that do not depend on who works on them: what a worker is given, what a
killed run
has finished, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pronghorn.data.rows import BadRow, Line, Row, Source, text_size

ROWS = 10_000  # of a chunk, a second's work
BYTES = 8 << 20  # of text in a chunk, unless a single row has more
Part = Literal["train", "eval"]


@dataclass(frozen=True)
class Chunk:
    """Neighbouring rows of one source. ``number`` counts through all chunks of the run, ``file`` its
    sources."""

    number: int
    part: Part
    file: int
    name: str
    first: bool  # of its source
    items: list[Line | Row | BadRow]
    size: int  # bytes of text, about

    @property
    def shard(self) -> str:
        """Name of the file that its rows go to."""
        return f"{self.part}-{self.number:06d}"

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows, parsed."""
        for item in self.items:
            yield item.parse(self.name) if isinstance(item, Line) else item


def chunks(train: Sequence[Source], held: Sequence[Source]) -> Iterator[Chunk]:
    """All rows, those to train on first, in order. A source without rows gives one chunk all the same."""
    number = 0
    parts: list[tuple[Part, Source]] = [("train", each) for each in train]
    parts += [("eval", each) for each in held]
    for file, (part, source) in enumerate(parts):
        first = True
        for items, size in _pieces(source):
            yield Chunk(number, part, file, source.name, first, items, size)
            number += 1
            first = False


def _pieces(source: Source) -> Iterator[tuple[list[Line | Row | BadRow], int]]:
    items: list[Line | Row | BadRow] = []
    size, given = 0, False
    for item in source.unparsed():
        items.append(item)
        size += (
            len(item.text) + 1
            if isinstance(item, Line)
            else text_size(item.value)
            if isinstance(item, Row)
            else 0
        )
        if len(items) >= ROWS or size >= BYTES:
            yield items, size
            items, size, given = [], 0, True
    if items or not given:
        yield items, size
