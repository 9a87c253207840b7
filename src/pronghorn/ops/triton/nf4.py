"""NF4 weights decoded into a buffer: two elements a byte, one scale a block, scales themselves in 8 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.triton.launch import launch


@triton.jit
def nf4_kernel(packed_ptr, absmax_ptr, table_ptr, out_ptr, pairs, block, BLOCK: tl.constexpr):
    """``nf4_decode`` of one block of bytes."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    byte = tl.load(packed_ptr + pair, mask=inside, other=0).to(tl.int32)
    # both nibbles of a byte lie in one block: block is even
    scale = tl.load(absmax_ptr + (2 * pair) // block, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(table_ptr + (byte >> 4)) * scale
    low = tl.load(table_ptr + (byte & 15)) * scale
    out = tl.interleave(high, low)
    at = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=at // 2 < pairs)


@triton.jit
def absmax_kernel(codes_ptr, table_ptr, absmax_ptr, out_ptr, count, offset, block, BLOCK: tl.constexpr):
    """``absmax_decode`` of one block of scales."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax_ptr + at // block, mask=inside, other=0.0)
    tl.store(out_ptr + at, tl.load(table_ptr + code) * scale + offset, mask=inside)


def nf4_decode(packed: Tensor, absmax: Tensor, table: Tensor, block: int, out: Tensor) -> Tensor:
    """See ``plain.nf4_decode``; ``out [2 * packed.numel()]`` is filled."""
    how = launch("nf4", packed.device)
    grid = (triton.cdiv(packed.numel(), how.block[0]),)
    nf4_kernel[grid](packed, absmax, table, out, packed.numel(), block, BLOCK=how.block[0], **how.options)
    return out


def absmax_decode(codes: Tensor, table: Tensor, absmax: Tensor, offset: float, block: int) -> Tensor:
    """See ``plain.absmax_decode``."""
    out = torch.empty(codes.numel(), dtype=torch.float32, device=codes.device)
    how = launch("absmax", codes.device)
    grid = (triton.cdiv(codes.numel(), how.block[0]),)
    absmax_kernel[grid](
        codes, table, absmax, out, codes.numel(), offset, block, BLOCK=how.block[0], **how.options
    )
    return out
