"""Memory that a thread uses again for each tile, so that the kernel does not hand out and clear new pages."""

from __future__ import annotations

import threading
from math import prod

import torch


class Scratch(threading.local):
    """Buffers by role, of each thread its own."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with any content, good until this thread takes the same role again."""
        count = prod(shape) * dtype.itemsize
        if role not in self._held or len(self._held[role]) < count:
            self._held[role] = torch.empty(count, dtype=torch.uint8)
        return self._held[role][:count].view(dtype).view(shape)
