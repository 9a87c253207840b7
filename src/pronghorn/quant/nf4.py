"""NF4 with double quantisation, the layout of bitsandbytes, in plain torch: encode and decode.

A weight is cut, row after row, into blocks of 64 values. Each value becomes the nearest of 16 levels times
the block's largest magnitude; the magnitudes, less their mean, are stored as 8-bit codes in blocks of 256.
Source of the format: arXiv 2305.14314 (QLoRA), section 3 and appendix E; of the 8-bit code: arXiv
1511.04561.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

BLOCK = 64
NESTED_BLOCK = 256
# what a packed weight's tensors are called, after the name of the weight
STATE = ".quant_state.bitsandbytes__nf4"
ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE = ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"
PARTS = (ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, STATE)

# the JSON beside a weight is padded with spaces, so that a header can be written before weights are encoded
_STATE_BYTES = 256
# a tile of work: 1 MiB of float32 stays in a core's second-level cache
_TILE_ELEMENTS = 2**18
# cells of [-1, 1] in the table that finds a level: at most one bound lies in a cell
_CELLS = 4096
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip

Span = Callable[[int, int], torch.Tensor]
"""Gives elements ``first`` to ``last`` of a flattened weight: ``[last - first]``."""


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
        code = dynamic_code(self.codes.device) if self.nested_code is None else self.nested_code
        places = torch.arange(first, last, device=self.codes.device) // self.nested_block
        return code[self.codes[first:last].int()] * self.nested[places] + self.offset


@dataclass(frozen=True)
class Packed:
    """A weight in NF4: ``data`` uint8 ``[ceil(elements / 2), 1]``, two values a byte, the first one high.

    ``shape`` and ``dtype`` are those of the decoded weight.
    """

    data: torch.Tensor
    scales: Scales
    shape: tuple[int, ...]
    dtype: torch.dtype

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors that bitsandbytes stores for a weight called ``name``."""
        device, scales = self.data.device, self.scales
        state: dict[str, object] = {
            "quant_type": "nf4",
            "blocksize": scales.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        found = {name: self.data, name + ABSMAX: scales.codes, name + CODE: levels(device).clone()}
        if scales.nested is not None:
            code = dynamic_code(device) if scales.nested_code is None else scales.nested_code
            found |= {name + NESTED_ABSMAX: scales.nested, name + NESTED_CODE: code.clone()}
            state |= {
                "nested_blocksize": scales.nested_block,
                "nested_dtype": "float32",
                "nested_offset": scales.offset,
            }
        text = json.dumps(state).encode().ljust(_STATE_BYTES)
        found[name + STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return found


def encode(weight: torch.Tensor) -> Packed:
    """Quantise a weight ``[out, in]`` (float16, bfloat16 or float32) to NF4 with double quantisation."""
    flat = weight.reshape(-1)
    blocks = -(-flat.numel() // BLOCK)
    magnitudes = torch.empty(blocks, device=weight.device)
    data = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    for first in range(0, blocks, _TILE_ELEMENTS // BLOCK):
        last = min(blocks, first + _TILE_ELEMENTS // BLOCK)
        piece = flat[first * BLOCK : last * BLOCK]
        magnitudes[first:last] = _magnitudes(piece)
        _pack(piece, magnitudes[first:last], data.view(-1)[first * BLOCK // 2 :])
    return Packed(data, _encode_scales(magnitudes), tuple(weight.shape), weight.dtype)


def decode(packed: Packed, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight that ``packed`` stands for, in its dtype; written into ``out`` (contiguous) if given.

    Equal to ``levels[code] * magnitude`` in float32, rounded once.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.data.device)
    if tuple(out.shape) != packed.shape or not out.is_contiguous():
        raise ValueError(f"out is {list(out.shape)}, the packed weight {list(packed.shape)}")
    flat, step = out.view(-1), max(1, _TILE_ELEMENTS // packed.scales.block)
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


def scales_of(span: Span, elements: int) -> Scales:
    """The scales that ``encode`` would give a weight that is read in spans."""
    starts = range(0, elements, _TILE_ELEMENTS)
    found = [_magnitudes(span(first, min(elements, first + _TILE_ELEMENTS))) for first in starts]
    return _encode_scales(torch.cat(found))


def requantised(span: Span, elements: int, scales: Scales, begin: int, end: int) -> torch.Tensor:
    """Elements ``begin`` to ``end`` of a flattened weight after encoding and decoding: float32."""
    first, last = begin // BLOCK * BLOCK, min(elements, -(-end // BLOCK) * BLOCK)
    flat = span(first, last)
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    _pack(flat, _magnitudes(flat), codes)
    return decode_span(codes, scales, begin, end)


def blank_tensors(name: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The tensors that a weight of this shape is stored as, without values."""
    elements = prod(shape)
    blocks = -(-elements // BLOCK)
    return {
        name: torch.empty((elements + 1) // 2, 1, dtype=torch.uint8, device="meta"),
        name + ABSMAX: torch.empty(blocks, dtype=torch.uint8, device="meta"),
        name + CODE: torch.empty(16, device="meta"),
        name + NESTED_ABSMAX: torch.empty(-(-blocks // NESTED_BLOCK), device="meta"),
        name + NESTED_CODE: torch.empty(256, device="meta"),
        name + STATE: torch.empty(_STATE_BYTES, dtype=torch.uint8, device="meta"),
    }


def parse_state(raw: bytes) -> Mapping[str, object]:
    """The JSON that bitsandbytes stores as bytes beside a packed weight.

    Raises:
        ValueError: it is not a JSON object.
    """
    parsed = json.loads(raw.decode("utf-8"))
    if not isinstance(parsed, dict):
        raise ValueError(f"a {type(parsed).__name__}, not an object")
    return parsed


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
def _bounds(device: torch.device) -> torch.Tensor:
    table = levels(device)
    return (table[:-1] + table[1:]) / 2


@lru_cache
def _cells(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each cell: the bounds below it (uint8), and the next one, which may lie in it (float32)."""
    bounds = _bounds(device)
    # starts moved down by more than the rounding of the cell's number
    starts = torch.arange(_CELLS + 1, device=device) * (2.0 / _CELLS) - 1.0 - 1e-6
    below = torch.bucketize(starts, bounds)
    beyond = torch.full((1,), torch.inf, device=device)
    return below.to(torch.uint8), torch.cat([bounds, beyond])[below]


def _nearest(scaled: torch.Tensor) -> torch.Tensor:
    """The index of the nearest level, a tie to the lower: as torch.bucketize finds it, 4 times as fast."""
    below, bound = _cells(scaled.device)
    places = ((scaled + 1.0) * (_CELLS / 2)).to(torch.int32)
    return below.index_select(0, places) + (scaled > bound.index_select(0, places))


@lru_cache
def _pairs(device: torch.device) -> torch.Tensor:
    """The two values of every byte: float32 [256, 2]."""
    table = levels(device)
    return torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)


def _magnitudes(flat: torch.Tensor) -> torch.Tensor:
    rest = flat.numel() % BLOCK
    whole = flat[: flat.numel() - rest].view(-1, BLOCK)
    found = whole.abs().amax(dim=1).float()
    return torch.cat([found, flat[-rest:].abs().max().float().view(1)]) if rest else found


def _pack(flat: torch.Tensor, magnitudes: torch.Tensor, out: torch.Tensor) -> None:
    """Write the codes of ``flat`` (whole blocks, the last may be short) to ``out``, two a byte."""
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % BLOCK)).view(-1, BLOCK).float()
    if not bool(torch.isfinite(magnitudes).all()):
        raise ValueError("a weight to be quantised holds NaN or infinity")
    inverse = 1.0 / magnitudes.clamp(min=1e-38)
    scaled = (
        padded.mul_(inverse.view(-1, 1))
        if padded.data_ptr() != flat.data_ptr()
        else padded * inverse.view(-1, 1)
    )
    codes = _nearest(scaled.view(-1)).view(-1, 2)
    out[: (count + 1) // 2] = ((codes[:, 0] << 4) | codes[:, 1])[: (count + 1) // 2]


def _unpack(codes: torch.Tensor, magnitudes: torch.Tensor, block: int) -> torch.Tensor:
    values = _pairs(codes.device).index_select(0, codes.int()).view(-1)
    missing = magnitudes.numel() * block - values.numel()
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(-1, block).mul_(magnitudes.view(-1, 1)).view(-1)


def _encode_scales(magnitudes: torch.Tensor) -> Scales:
    # the mean in double precision: the same whatever the number of threads
    offset = float(magnitudes.double().mean().float())
    rest = magnitudes - offset
    nested = torch.nn.functional.pad(rest, (0, -rest.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    largest = nested.abs().amax(dim=1)
    code = dynamic_code(magnitudes.device)
    scaled = nested * (1.0 / largest.clamp(min=1e-38)).view(-1, 1)
    codes = torch.bucketize(scaled.clamp_(-1, 1).view(-1), (code[:-1] + code[1:]) / 2, out_int32=True)
    return Scales(codes.to(torch.uint8)[: rest.numel()].clone(), largest, offset)
