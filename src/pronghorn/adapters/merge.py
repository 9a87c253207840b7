"""THE merge: W + s*B*A in float32, rounded once to the stored dtype, on tiles of rows.

The order of operations is PEFT's (product, times scaling, plus weight), so that the result has the same bits
as PEFT's merge of a float32 model. Only the factors of the tile at hand are in memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch

from pronghorn.adapters.files import LoraPair
from pronghorn.weights.reader import read_columns, read_rows, read_tensor
from pronghorn.weights.scratch import Scratch
from pronghorn.weights.shards import Shard, TensorEntry

# 2 MiB of float32: where measured, a quarter faster than half of it, and a fifth than twice as much
TILE_ELEMENTS = 2**19
# whole factors kept between tiles; beyond this the oldest are read again
CACHE_BYTES = 48 * 2**20


class FactorCache:
    """Whole factors of an adapter in float32, the least recently used dropped; safe for threads.

    ``scratch``: where each thread computes the tile at hand.
    """

    def __init__(self, shard: Shard, limit_bytes: int = CACHE_BYTES) -> None:
        self.shard = shard
        self.scratch = Scratch()
        self._limit = limit_bytes
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, entry: TensorEntry) -> torch.Tensor:
        """The tensor in float32."""
        with self._lock:
            if entry.name not in self._held:
                self._held[entry.name] = read_tensor(self.shard, entry).float()
                while len(self._held) > 1 and sum(one.nbytes for one in self._held.values()) > self._limit:
                    self._held.popitem(last=False)
            self._held.move_to_end(entry.name)
            return self._held[entry.name]


@dataclass(frozen=True)
class Update:
    """A ``LoraPair`` applied to one file tensor (seen as a matrix ``[rows, columns]``).

    ``transposed``: the weight is stored [in, out]. A stacked pair updates ``experts`` experts; the tensor
    is that of ``expert``, or holds all of them one below the other where that is None. ``offset`` is the
    tensor's first output row within the pair's outputs (gate and up share one pair).
    """

    pair: LoraPair
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    offset: int = 0

    def delta(self, cache: FactorCache, first: int, last: int, columns: int) -> torch.Tensor:
        """s*B*A for rows ``first`` to ``last``: ``[last - first, columns]``, good until the next call."""
        if self.pair.stacked:
            return self._stacked(cache, first, last, columns)
        if self.transposed:
            a = read_columns(cache.shard, self.pair.a, first, last).float()
            return (cache.get(self.pair.b) @ a).T * self.pair.scaling
        b = read_rows(cache.shard, self.pair.b, first, last).float()
        product = cache.scratch.take("delta", (last - first, columns), torch.float32)
        return torch.mm(b, cache.get(self.pair.a), out=product).mul_(self.pair.scaling)

    def _stacked(self, cache: FactorCache, first: int, last: int, columns: int) -> torch.Tensor:
        a, b = self.pair.a, cache.get(self.pair.b)
        rank = a.shape[0] // self.experts
        per_expert = a.shape[1] if self.transposed else b.shape[0]
        pieces = []
        while first < last:
            expert = first // per_expert if self.expert is None else self.expert
            start = first % per_expert if self.expert is None else first + self.offset
            stop = min(start + last - first, per_expert)
            a_expert = read_rows(cache.shard, a, expert * rank, (expert + 1) * rank).float()
            b_expert = b.reshape(b.shape[0], rank, self.experts)[:, :, expert]
            if self.transposed:
                pieces.append((b_expert.contiguous() @ a_expert[:, start:stop]).T)
            else:
                pieces.append(b_expert[start:stop].contiguous() @ a_expert)
            first += stop - start
        return torch.cat(pieces).mul_(self.pair.scaling)


def merge_rows(
    weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor | None = None
) -> torch.Tensor:
    """``weight + delta`` in float32 ``[rows, columns]``; with DoRA, rows scaled to norms ``magnitude``.

    The float32 ``delta`` is consumed. Source of the DoRA formula: arXiv 2402.09353, equation 5.
    """
    merged = delta.add_(weight) if delta.is_contiguous() else delta + weight.float()
    if magnitude is None:
        return merged
    norm: torch.Tensor = torch.linalg.norm(merged, dim=1)
    return (magnitude.float() / norm).view(-1, 1) * merged


def tiles(rows: int, columns: int) -> list[tuple[int, int]]:
    """Ranges of rows of about ``TILE_ELEMENTS``; a short rest goes to the tile before it.

    Products of 1 to 3 rows take other code paths with another order of additions, hence other last bits.
    """
    size = max(16, TILE_ELEMENTS // max(1, columns) // 16 * 16)
    starts = list(range(0, max(1, rows - 15), size))
    return list(zip(starts, [*starts[1:], rows], strict=True))
