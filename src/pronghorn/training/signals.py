"""Ctrl+C and SIGTERM: the first asks the run to stop after its step, a second Ctrl+C stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pronghorn.errors import Preempted

_WATCHED = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """``with StopSignals() as stop:`` watches both signals in the main thread, then restores.

    Before ``in_loop`` is set there is no step to finish: the first signal raises Preempted where the program
    is. In another thread nothing is watched, because Python allows handlers in the main thread only.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.in_loop = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _WATCHED:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: the old handler was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if not self.in_loop:
            raise Preempted(
                f"stopped by {self.requested} before the first step", fix="run the same command again"
            )
