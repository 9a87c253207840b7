"""NF4 in the layout of bitsandbytes: encode a weight, name its tensors; ``ops.packed`` decodes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from math import prod

import torch

from pronghorn.ops.packed import (
    BLOCK,
    NESTED_BLOCK,
    TILE_ELEMENTS,
    Packed,
    Scales,
    decode_span,
    dynamic_code,
    levels,
)

# what a packed weight's tensors are called, after the name of the weight
STATE = ".quant_state.bitsandbytes__nf4"
ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE = ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"
PARTS = (ABSMAX, CODE, NESTED_ABSMAX, NESTED_CODE, STATE)

# the JSON beside a weight is padded with spaces, so that a header can be written before weights are encoded
_STATE_BYTES = 256
# cells of [-1, 1] in the table that finds a level: at most one bound lies in a cell
_CELLS = 4096

Span = Callable[[int, int], torch.Tensor]
"""Gives elements ``first`` to ``last`` of a flattened weight: ``[last - first]``."""


def encode(weight: torch.Tensor) -> Packed:
    """Quantise a weight ``[out, in]`` (float16, bfloat16 or float32) to NF4 with double quantisation."""
    flat = weight.reshape(-1)
    blocks = -(-flat.numel() // BLOCK)
    magnitudes = torch.empty(blocks, device=weight.device)
    data = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=weight.device)
    for first in range(0, blocks, TILE_ELEMENTS // BLOCK):
        last = min(blocks, first + TILE_ELEMENTS // BLOCK)
        piece = flat[first * BLOCK : last * BLOCK]
        magnitudes[first:last] = _magnitudes(piece)
        _pack(piece, magnitudes[first:last], data.view(-1)[first * BLOCK // 2 :])
    return Packed(data, _encode_scales(magnitudes), tuple(weight.shape), weight.dtype)


def stored_tensors(packed: Packed, name: str) -> dict[str, torch.Tensor]:
    """The tensors that bitsandbytes stores for a weight called ``name``."""
    return {name: packed.data, **companions(packed.scales, packed.shape, packed.dtype, name)}


def companions(
    scales: Scales, shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> dict[str, torch.Tensor]:
    """The tensors beside the codes of a weight called ``name``, which decodes to ``shape`` and ``dtype``."""
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": scales.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    found = {name + ABSMAX: scales.codes, name + CODE: levels(scales.codes.device).clone()}
    if scales.nested is not None:
        found |= {name + NESTED_ABSMAX: scales.nested, name + NESTED_CODE: scales.nested_table().clone()}
        state |= {
            "nested_blocksize": scales.nested_block,
            "nested_dtype": "float32",
            "nested_offset": scales.offset,
        }
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    found[name + STATE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return found


def scales_of(span: Span, elements: int) -> Scales:
    """The scales that ``encode`` would give a weight that is read in spans."""
    starts = range(0, elements, TILE_ELEMENTS)
    found = [_magnitudes(span(first, min(elements, first + TILE_ELEMENTS))) for first in starts]
    return _encode_scales(torch.cat(found))


def codes_of(span: Span, elements: int) -> Iterator[torch.Tensor]:
    """The codes that ``encode`` would give a weight that is read in spans, one after the other: uint8."""
    for first in range(0, elements, TILE_ELEMENTS):
        yield _codes(span(first, min(elements, first + TILE_ELEMENTS)))


def requantised(span: Span, elements: int, scales: Scales, begin: int, end: int) -> torch.Tensor:
    """Elements ``begin`` to ``end`` of a flattened weight after encoding and decoding: float32."""
    first, last = begin // BLOCK * BLOCK, min(elements, -(-end // BLOCK) * BLOCK)
    return decode_span(_codes(span(first, last)), scales, begin, end)


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


def _magnitudes(flat: torch.Tensor) -> torch.Tensor:
    rest = flat.numel() % BLOCK
    whole = flat[: flat.numel() - rest].view(-1, BLOCK)
    found = whole.abs().amax(dim=1).float()
    return torch.cat([found, flat[-rest:].abs().max().float().view(1)]) if rest else found


def _codes(flat: torch.Tensor) -> torch.Tensor:
    codes = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=flat.device)
    _pack(flat, _magnitudes(flat), codes)
    return codes


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
