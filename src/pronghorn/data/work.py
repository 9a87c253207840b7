"""Rows of all parts of a run, streamed through one encoder into Arrow files and counted in one tally."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from pronghorn.data.formats import Chat, RowError, Sample, to_sample
from pronghorn.data.layout import refuse_mixed, renamed
from pronghorn.data.options import Format
from pronghorn.data.rows import BadRow, Row, Source
from pronghorn.data.store import ArrowFile
from pronghorn.data.tally import PartTally, Tally, row_hash
from pronghorn.data.templates import ChatTemplate
from pronghorn.data.tokens import EncodedRow, Encoder

BATCH = 1000  # rows rendered and tokenised at once: 0.5 MB of ids at 90 tokens a row
AHEAD = 2  # batches encoded ahead, one rendered while the other is tokenised
SERVED_ALIKE = 100  # conversations also encoded as a server would

_Batch = list[tuple[Row, Sample]]
_Results = list[list[EncodedRow] | RowError]


@contextmanager
def _imports_left_alone() -> Iterator[None]:
    """Keep the garbage collector from walking all imported modules again and again: 158 us a row, not 193."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Work:
    """Rows of all parts through one encoder into files, counted in one tally."""

    def __init__(self, layout: Format, encoder: Encoder, template: ChatTemplate | None) -> None:
        self.layout = layout
        self.encoder = encoder
        self.options = encoder.options
        self.template = template
        self.tally = Tally()
        self.served = 0

    def write(self, path: Path, sources: list[Source]) -> PartTally:
        """Write all usable rows to ``path``."""
        part = PartTally()
        with ArrowFile(path) as file, _imports_left_alone():
            for source in sources:
                self.tally.names.append(source.name)
                for batch, results in self._encoded(self._samples(source)):
                    kept = self._kept(batch, results)
                    file.write([row.input_ids for _, row in kept], [row.labels for _, row in kept])
                    part.hashes.extend(row_hash(row.input_ids) for _, row in kept)
                    part.numbers.extend(number for number, _ in kept)
                    part.files.extend([len(self.tally.names) - 1] * len(kept))
        return part

    def _samples(self, source: Source) -> Iterator[tuple[Row, Sample]]:
        """Every row that says what to train on; the others are counted as bad."""
        for row in source.read():
            self.tally.rows_read += 1
            if isinstance(row, BadRow):
                self.tally.add_bad(row)
                continue
            row = renamed(row, self.options)
            if self.options.format == "auto":
                refuse_mixed(row, self.layout)
            try:
                yield row, to_sample(row, self.layout, self.options.system)
            except RowError as error:
                self.tally.add_bad(row.bad(error.field, error.reason))

    def _encoded(self, samples: Iterator[tuple[Row, Sample]]) -> Iterator[tuple[_Batch, _Results]]:
        """Batches with their rows, in order; while one is used the next two are being encoded.

        Threads are enough: the renderer is another process, and the Rust tokenizer frees Python's lock.
        """
        waiting: deque[tuple[_Batch, Future[_Results]]] = deque()
        with ThreadPoolExecutor(AHEAD) as pool:
            while batch := list(islice(samples, BATCH)):
                waiting.append((batch, pool.submit(self.encoder.encode, [sample for _, sample in batch])))
                if len(waiting) > AHEAD:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()

    def _kept(self, batch: _Batch, results: _Results) -> list[tuple[int, EncodedRow]]:
        """The rows to write, each with its number; all others are counted."""
        kept: list[tuple[int, EncodedRow]] = []
        drop_long = self.options.too_long == "drop"
        for (row, sample), result in zip(batch, results, strict=True):
            if isinstance(result, RowError):
                self.tally.add_bad(row.bad(result.field, result.reason))
                continue
            if isinstance(sample, Chat) and self.served < SERVED_ALIKE:
                self._compare_serving(row, sample, result)
            kept += [
                (row.number, each) for each in result if self.tally.keeps(each, row, drop_long=drop_long)
            ]
        return kept

    def _compare_serving(self, row: Row, chat: Chat, encoded: list[EncodedRow]) -> None:
        """Flag the row if a server, which calls apply_chat_template, would see other ids."""
        if self.template is None or "rewritten" in encoded[0].flags:
            return
        self.served += 1
        if self.template.ids(chat.messages, chat.tools)[: self.encoder.max_length] != encoded[0].input_ids:
            self.tally.flagged["serving"].add(f"{row.file}:{row.number}")
