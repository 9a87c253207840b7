"""float32 to bfloat16 on the bits: to nearest, ties to even, the same on every chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.triton.launch import launch


@triton.jit
def bf16_kernel(bits_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """``round_bf16`` of int32 bits to int16 bits."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    bits = tl.load(bits_ptr + at, mask=inside, other=0)
    high = (bits >> 16) & 0xFFFF
    # adding 0x7FFF plus the last kept bit carries exactly when the rest is above half, or half and odd
    rounded = ((bits + 0x7FFF + (high & 1)) >> 16) & 0xFFFF
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    tl.store(out_ptr + at, tl.where(nan, high | 0x40, rounded).to(tl.int16), mask=inside)


def round_bf16(x: Tensor) -> Tensor:
    """See ``plain.round_bf16``; ``x`` float32 and contiguous."""
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    how = launch("bf16", x.device)
    grid = (triton.cdiv(x.numel(), how.block[0]),)
    bf16_kernel[grid](
        x.view(torch.int32), out.view(torch.int16), x.numel(), BLOCK=how.block[0], **how.options
    )
    return out
