"""Processes that work on chunks side by side, each a fresh interpreter: ``python -m pronghorn.data.crew``.

They are not forked, which threads of the tokenizer would not survive, and do not import the caller's
script again
as ``multiprocessing`` would, so a script needs no ``if __name__ == "__main__"``.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pronghorn.data.chunks import Chunk
from pronghorn.data.store import has_shard
from pronghorn.data.work import Job, Work
from pronghorn.errors import DataError

MOST = 8  # workers, if nobody says how many
WORTH = 8 << 20  # bytes of rows from which workers are worth their start, 2 s of a core each

_Process = subprocess.Popen[bytes]


def workers_for(wanted: int | None, size: int) -> int:
    """How many processes shall work on ``size`` bytes of rows; 0 is this one alone."""
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST) if cores > 1 and size >= WORTH else 0


def done(chunks: Iterable[Chunk], job: Job, folder: Path, workers: int) -> Iterator[Chunk]:
    """Write the shard of every chunk that has none yet.

    Yields:
        The chunks, in order, each when its shard is there.

    Raises:
        DataError: the first in the order of rows, whoever came upon it first.
    """
    if workers:
        with _Crew(job, folder, workers) as crew:
            yield from crew.done(chunks)
        return
    with Work(job, folder) as work:
        for chunk in chunks:
            if not has_shard(folder, chunk.shard):
                work.do(chunk)
            yield chunk


class _Crew:
    def __init__(self, job: Job, folder: Path, workers: int) -> None:
        self.start = pickle.dumps((job, str(folder)))
        self.folder = folder
        self.workers = workers
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        self._started: list[_Process] = []
        for _ in range(workers):
            self._idle.put(None)  # started when there is something to do
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenising")

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self._started):
            process.kill()
        self._pool.shutdown()
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # it ended with something unread
                    pipe.close()

    def done(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        waiting: deque[tuple[Chunk, Future[None]]] = deque()
        pending = iter(chunks)
        trouble: Exception | None = None
        while trouble is None:
            try:
                chunk = next(pending)
            except StopIteration:
                break
            except Exception as error:  # of the reader: rows before it are worked on first
                trouble = error
                break
            waiting.append((chunk, self._pool.submit(self._do, chunk)))
            if len(waiting) > self.workers + 1:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
        if trouble is not None:
            raise trouble

    def _do(self, chunk: Chunk) -> None:
        if has_shard(self.folder, chunk.shard):
            return
        process = self._idle.get()
        if process is None:
            process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(chunk, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer: tuple[str, str] | None = pickle.load(process.stdout)
        except (OSError, EOFError) as error:
            raise DataError(
                f"a process that tokenises ended (exit code {process.wait()}) in chunk {chunk.number}, "
                f"rows of {chunk.name}",
                fix="see the lines above; data.workers=0 works in this process, in less memory",
            ) from error
        finally:
            self._idle.put(process)  # one that ended fails the next chunk too
        if answer is not None:
            raise DataError(answer[0], fix=answer[1])

    def _start(self) -> _Process:
        # The tokenizer's own threads would only compete with the other workers.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "pronghorn.data.crew"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._started.append(process)
        assert process.stdin is not None
        process.stdin.write(self.start)
        return process


def _finished(chunk: Chunk, future: Future[None]) -> Chunk:
    future.result()
    return chunk


def _serve() -> None:
    """The other side: chunks in, ``None`` or a message and its fix out, until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    chunks = sys.stdin.buffer
    job, folder = pickle.load(chunks)
    with Work(job, Path(folder), ahead=0) as work:
        while (chunk := _next(chunks)) is not None:
            answer = None
            try:
                work.do(chunk)
            except DataError as error:
                answer = (error.message, error.fix)
            pickle.dump(answer, answers)
            answers.flush()


def _next(chunks: Any) -> Chunk | None:
    try:
        chunk: Chunk = pickle.load(chunks)
    except EOFError:
        return None
    return chunk


if __name__ == "__main__":
    _serve()
