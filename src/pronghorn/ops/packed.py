"""Weights in NF4 with double quantisation: what is held of them, and what it decodes to, in plain torch.

A weight is cut, row after row, into blocks of 64 values. Each value is one of 16 levels times the block's
largest magnitude; the magnitudes, less their mean, are 8-bit codes in blocks of 256. Source of the format:
arXiv 2305.14314 (QLoRA), section 3 and appendix E; of the 8-bit code: arXiv 1511.04561.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

BLOCK = 64
NESTED_BLOCK = 256
# a tile of work: 1 MiB of float32 stays in a core's second-level cache
TILE_ELEMENTS = 2**18
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Scales:
    """The double-quantised block magnitudes of one weight.

    ``codes``: uint8 ``[blocks]``; ``nested``: float32 ``[ceil(blocks / nested_block)]``; ``offset`` is added
    after decoding. ``nested`` None: ``codes`` are float32 magnitudes themselves (single quantisation).
    """

    codes: torch.Tensor
    nested: torch.Tensor | None
    offset: float
    block: int = BLOCK
    nested_block: int = NESTED_BLOCK
    nested_code: torch.Tensor | None = None

    def decode(self, first: int, last: int) -> torch.Tensor:
        """Magnitudes of blocks ``first`` to ``last``, float32."""
        if self.nested is None:
            return self.codes[first:last].float()
        places = torch.arange(first, last, device=self.codes.device) // self.nested_block
        return self.nested_table()[self.codes[first:last].int()] * self.nested[places] + self.offset

    def nested_table(self) -> torch.Tensor:
        """The 256 values of the 8-bit codes, float32."""
        return dynamic_code(self.codes.device) if self.nested_code is None else self.nested_code


@dataclass(frozen=True)
class Packed:
    """A weight in NF4: ``data`` uint8 ``[ceil(elements / 2), 1]``, two values a byte, the first one high.

    ``shape`` and ``dtype`` are those of the decoded weight.
    """

    data: torch.Tensor
    scales: Scales
    shape: tuple[int, ...]
    dtype: torch.dtype


def decode(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that ``packed`` stands for, in its dtype; written into ``out`` (contiguous) if given.

    Equal to ``levels[code] * magnitude`` in float32, rounded once.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.data.device)
    if tuple(out.shape) != packed.shape or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}, the packed weight {list(packed.shape)}")
    flat, step = out.view(-1), max(1, TILE_ELEMENTS // packed.scales.block)
    blocks = packed.scales.codes.numel()
    for first in range(0, blocks, step):
        last = min(blocks, first + step)
        begin, end = first * packed.scales.block, min(flat.numel(), last * packed.scales.block)
        piece = packed.data.view(-1)[begin // 2 : (end + 1) // 2]
        flat[begin:end] = _unpack(piece, packed.scales.decode(first, last), packed.scales.block)[
            : end - begin
        ]
    return out


def decode_span(codes: torch.Tensor, scales: Scales, begin: int, end: int) -> torch.Tensor:
    """Elements ``begin`` to ``end`` of the flattened weight, float32.

    Args:
        codes: the packed bytes of all blocks that these elements touch.
        scales: the weight's scales.
        begin, end: positions in the flattened weight.
    """
    first, last = begin // scales.block, -(-end // scales.block)
    values = _unpack(codes, scales.decode(first, last), scales.block)
    start = begin - first * scales.block
    return values[start : start + end - begin]


@lru_cache
def levels(device: torch.device) -> torch.Tensor:
    """The 16 levels, float32."""
    return torch.tensor(_LEVELS, dtype=torch.float32, device=device)


@lru_cache
def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 values of the 8-bit code, ascending: in seven decades, midpoints of 2^i equal steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += means + [-one for one in means]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@lru_cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values of every byte: float32 [256, 2]."""
    table = levels(device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


def _unpack(codes: torch.Tensor, magnitudes: torch.Tensor, block: int) -> torch.Tensor:
    values = _pairs(codes.device).index_select(0, codes.int()).view(-1)
    missing = magnitudes.numel() * block - values.numel()
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(-1, block).mul_(magnitudes.view(-1, 1)).view(-1)
