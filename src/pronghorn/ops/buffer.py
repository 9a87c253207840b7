"""Room for the decoded weights of one layer, which all layers of a model use one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from pronghorn.ops.graph import is_fake
from pronghorn.ops.packed import Packed

# decoding without numbers is left out above this size: tile by tile it would take seconds
FEW = 2**18
Decode = Callable[[Packed, Tensor], Tensor]
"""Writes what a packed weight stands for to a contiguous tensor of its shape."""


@dataclass
class _Room:
    """The memory on one device, and which weights are in it: first element -> (end, codes, their version)."""

    memory: Tensor
    there: dict[int, tuple[int, Tensor, int]] = field(default_factory=dict)


class DecodeBuffer:
    """Each weight has its own offset within its layer, so the weights of one layer are there together.

    What is there is used again until another layer's weight is decoded over it: recompute and backward of a
    layer share one decode, and so do the tiles of an MLP. A weight whose codes have changed is decoded again.
    """

    def __init__(self, elements: int, decode: Decode) -> None:
        self.elements = elements
        self.decode = decode
        self.rooms: dict[torch.device, _Room] = {}

    def get(self, packed: Packed, offset: int, dtype: torch.dtype) -> Tensor:
        """The decoded weight: a view, valid until the next call."""
        room = self.rooms.get(packed.data.device)
        if room is None or room.memory.dtype != dtype:
            memory = torch.empty(self.elements, dtype=dtype, device=packed.data.device)
            room = self.rooms[packed.data.device] = _Room(memory)
        end = offset + prod(packed.shape)
        out = room.memory[offset:end].view(packed.shape)
        if not _is_there(room, offset, packed.data):
            room.there = {at: one for at, one in room.there.items() if at >= end or one[0] <= offset}
            if not is_fake(out) or out.numel() <= FEW:
                self.decode(packed, out)
            room.there[offset] = (end, packed.data, packed.data._version)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start empty."""
        return {"elements": self.elements, "decode": self.decode, "rooms": {}}


def _is_there(room: _Room, offset: int, codes: Tensor) -> bool:
    _, held, version = room.there.get(offset, (0, None, 0))
    return held is codes and version == codes._version


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A frozen 4-bit weight as a part of a product: decoded for it into its place of a shared buffer.

    ``dtype``: the only one its products are computed in; None: that of their input.
    """

    packed: Packed
    buffer: DecodeBuffer
    offset: int
    dtype: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return self.packed.shape

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.data.device


def dense(weight: Tensor | PackedWeight, dtype: torch.dtype) -> Tensor:
    """A weight for a product in ``dtype``; of a packed one a view, valid until the next one."""
    return weight if isinstance(weight, Tensor) else weight.buffer.get(weight.packed, weight.offset, dtype)
