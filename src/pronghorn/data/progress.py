"""How far the rows of a run are, said every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]
EVERY_SECONDS = 5.0  # small files are done before anything is said


class Progress:
    """Counts rows, and says how many there were so far.

    Args:
        size: bytes of all rows, if they can be told beforehand.
        workers: processes at work.
        say: where lines go.
    """

    def __init__(self, size: int | None, workers: int, say: Say | None) -> None:
        self.size = size
        self.workers = workers
        self.say = say
        self.rows = 0
        self.read = 0
        self._start = self._last = time.monotonic()

    def add(self, rows: int, size: int) -> None:
        """``rows`` more are done, of ``size`` bytes."""
        self.rows += rows
        self.read += size
        now = time.monotonic()
        if self.say is not None and now - self._last >= EVERY_SECONDS:
            self._last = now
            self.say(self.line(now - self._start))

    def line(self, seconds: float) -> str:
        """The state after so many seconds."""
        share = f" ({min(self.read / self.size, 1):.0%})" if self.size else ""
        by = f", {self.workers} workers" if self.workers else ""
        return f"tokenised {self.rows:,} rows{share}, {self.rows / seconds:,.0f} a second{by}"
