"""The low-rank half of an adapted linear, added to the base product where it lies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.triton.launch import launch


@triton.jit
def lora_add_kernel(
    y_ptr, xa_ptr, b_ptr, rows, columns, rank, y_stride, xa_stride, b_stride, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """``lora_add_`` of one tile of y."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    xa = tl.load(
        xa_ptr + row[:, None] * xa_stride + r[None, :],
        mask=(row < rows)[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    b = tl.load(
        b_ptr + column[None, :] * b_stride + r[:, None],
        mask=(column < columns)[None, :] & (r < rank)[:, None],
        other=0.0,
    )
    at = y_ptr + row[:, None] * y_stride + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    y = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y += scale * tl.dot(xa, b, input_precision="ieee")
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


def lora_add_(y: Tensor, xa: Tensor, b: Tensor, scale: float) -> None:
    """See ``plain.lora_add_``; rows contiguous, ``xa`` and ``b`` of one dtype."""
    rows, columns = y.shape
    how = launch("lora_add", y.device)
    height, width = how.block
    grid = (triton.cdiv(rows, height), triton.cdiv(columns, width))
    lora_add_kernel[grid](
        y, xa, b, rows, columns, xa.shape[1], y.stride(0), xa.stride(0), b.stride(0), scale,
        ROWS=height, COLUMNS=width, RANK=max(16, triton.next_power_of_2(xa.shape[1])),
        **how.options,
    )  # fmt: skip
