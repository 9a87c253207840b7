"""Layer inputs kept in host memory between forward and backward.

On CUDA the copies run on a stream of their own, into pinned memory and back. Backward asks for the inputs in
the reverse order of the forward: when one is asked for, the copy of the one before it is started, so that it
arrives while the layer in between is recomputed. Elsewhere a tensor is copied when it is packed and when it
is asked for.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class Moved:
    """One tensor in host memory, and the one that was moved before it."""

    def __init__(self, device: torch.device, host: Tensor, before: Moved | None) -> None:
        self.device = device
        self.host = host
        # weak: what the graph has dropped is not kept for its neighbour
        self.before = None if before is None else weakref.ref(before)
        self.coming: tuple[Tensor, Any] | None = None
        """the copy on the device and the event that says it is there"""


class Offload:
    """The pack and unpack of ``saved_tensors_hooks`` for all layers of one model."""

    def __init__(self) -> None:
        self.last: weakref.ref[Moved] | None = None
        self.streams: dict[torch.device, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin with nothing moved."""
        return {"last": None, "streams": {}}

    def to_host(self, t: Tensor) -> Moved:
        """Copy ``t`` to host memory, in order behind what made it."""
        before = None if self.last is None else self.last()
        moved = Moved(t.device, self._copy_out(t), before)
        self.last = weakref.ref(moved)
        return moved

    def from_host(self, moved: Moved) -> Tensor:
        """The tensor on its device again; the copy of its neighbour is under way when this returns."""
        if moved.coming is None:
            self.fetch(moved)
        back = self._take(moved)
        neighbour = None if moved.before is None else moved.before()
        if neighbour is not None and neighbour.device.type == "cuda" and neighbour.coming is None:
            self.fetch(neighbour)
        return back

    def fetch(self, moved: Moved) -> None:
        """Start the copy to the device."""
        if moved.device.type != "cuda":
            moved.coming = (moved.host.to(moved.device), None)
            return
        stream = self._stream(moved.device)
        with torch.cuda.stream(stream):
            there = moved.host.to(moved.device, non_blocking=True)
            moved.coming = (there, stream.record_event())

    def _take(self, moved: Moved) -> Tensor:
        assert moved.coming is not None
        (there, arrived), moved.coming = moved.coming, None
        if arrived is not None:
            current = torch.cuda.current_stream(moved.device)
            current.wait_event(arrived)
            there.record_stream(current)
        return there

    def _copy_out(self, t: Tensor) -> Tensor:
        if t.device.type != "cuda":
            return torch.empty(t.shape, dtype=t.dtype, device="cpu").copy_(t)
        stream = self._stream(t.device)
        stream.wait_stream(torch.cuda.current_stream(t.device))
        host = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
        with torch.cuda.stream(stream):
            host.copy_(t, non_blocking=True)
        t.record_stream(stream)
        return host

    def _stream(self, device: torch.device) -> Any:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self.streams[device]
