"""One chunk of rows through the encoder into an Arrow file, with an account of what became of each row."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from pronghorn.data.chunks import Chunk
from pronghorn.data.formats import Chat, RowError, Sample, to_sample
from pronghorn.data.isolated import IsolatedTemplate
from pronghorn.data.layout import usable
from pronghorn.data.options import DataOptions, Format
from pronghorn.data.rows import Row
from pronghorn.data.store import ArrowFile, keep_shard
from pronghorn.data.tally import PartTally, Tally
from pronghorn.data.templates import ChatTemplate, Renderer
from pronghorn.data.tokens import EncodedRow, Encoder

BATCH = 1000  # rows rendered and tokenised at once: 0.5 MB of ids at 90 tokens a row
AHEAD = 2  # batches encoded ahead, one rendered while the other is tokenised
SERVED_ALIKE = 100  # conversations of each source also encoded as a server would

_Batch = list[tuple[Row, Sample]]
_Results = list[list[EncodedRow] | RowError]


@dataclass(frozen=True)
class Job:
    """How the rows of a run become tokens: all a worker needs besides them."""

    tokenizer: Any
    template: ChatTemplate | None
    layout: Format
    options: DataOptions
    max_length: int


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
    """Works on chunks, one after the other; a context manager.

    Args:
        job: what is done with the rows.
        folder: where shards go.
        ahead: batches encoded in threads while others are counted and written; 0 for a process among several.
    """

    def __init__(self, job: Job, folder: Path, *, ahead: int = AHEAD) -> None:
        self.job = job
        self.folder = folder
        self.ahead = ahead
        self.options = job.options

    def __enter__(self) -> Work:
        self._stack = ExitStack()
        self._stack.enter_context(_imports_left_alone())
        template, self._isolated = self.job.template, None
        renderer: Renderer | None = template
        if template is not None and template.plain and self.options.isolate:
            renderer = self._isolated = self._stack.enter_context(IsolatedTemplate(template))
        self.encoder = Encoder(self.job.tokenizer, renderer, self.options, self.job.max_length)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def do(self, chunk: Chunk) -> None:
        """Write the shard of a chunk."""
        self.tally, part, self.served = Tally(), PartTally(), 0 if chunk.first else SERVED_ALIKE
        if self._isolated is not None:
            self._isolated.stops = 0  # counted by chunk, so that it does not matter who works on which
        with ArrowFile(self.folder / f"{chunk.shard}.arrow") as file:
            for batch, results in self._encoded(self._samples(chunk)):
                kept = self._kept(batch, results)
                part.hashes.extend(file.write([row for _, row in kept]))
                part.numbers.extend([number for number, _ in kept])
                part.files.extend([chunk.file] * len(kept))
        keep_shard(self.folder, chunk.shard, self.tally, part)

    def _samples(self, chunk: Chunk) -> Iterator[tuple[Row, Sample]]:
        layout, system = self.job.layout, self.options.system
        return usable(
            chunk.rows(), layout, self.options, self.tally, lambda row: to_sample(row, layout, system)
        )

    def _encoded(self, samples: Iterator[tuple[Row, Sample]]) -> Iterator[tuple[_Batch, _Results]]:
        """Batches with their rows, in order; while one is used the next are being encoded.

        Threads are enough: the renderer is another process, and the Rust tokenizer frees Python's lock.
        """
        if not self.ahead:
            while batch := list(islice(samples, BATCH)):
                yield batch, self.encoder.encode([sample for _, sample in batch])
            return
        waiting: deque[tuple[_Batch, Future[_Results]]] = deque()
        with ThreadPoolExecutor(self.ahead) as pool:
            while batch := list(islice(samples, BATCH)):
                waiting.append((batch, pool.submit(self.encoder.encode, [sample for _, sample in batch])))
                if len(waiting) > self.ahead:
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
            if self.served < SERVED_ALIKE and isinstance(sample, Chat):
                self._compare_serving(row, sample, result)
            kept += [
                (row.number, each) for each in result if self.tally.keeps(each, row, drop_long=drop_long)
            ]
        return kept

    def _compare_serving(self, row: Row, chat: Chat, encoded: list[EncodedRow]) -> None:
        """Flag the row if a server, which calls apply_chat_template, would see other ids."""
        template = self.job.template
        if template is None or "rewritten" in encoded[0].flags:
            return
        self.served += 1
        if template.ids(chat.messages, chat.tools)[: self.encoder.max_length] != encoded[0].input_ids:
            self.tally.flagged["serving"].add(f"{row.file}:{row.number}")
