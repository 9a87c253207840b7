"""RMSNorm and LayerNorm: one program a row, statistics in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.shapes import NormForm
from pronghorn.ops.triton.launch import row_launch


@triton.jit
def norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, root_ptr, row_stride, columns, eps, offset,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, CENTERED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``norm_forward`` of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if CENTERED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / columns, 0.0)
    root = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / columns + eps)
    unit = wide * root
    if WEIGHT:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
        if EARLY:
            y = unit.to(x.dtype).to(tl.float32) * (weight + offset).to(tl.float32)
        else:
            y = unit * (weight.to(tl.float32) + offset)
        if BIAS:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    else:
        y = unit
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(root_ptr + row, root)


@triton.jit
def norm_backward_kernel(
    dy_ptr, x_ptr, root_ptr, weight_ptr, dx_ptr, dy_stride, row_stride, columns, offset,
    BLOCK: tl.constexpr, WEIGHT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """``norm_backward`` of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    wide = tl.load(x_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
    root = tl.load(root_ptr + row)
    if CENTERED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / columns, 0.0)
    unit = wide * root
    if WEIGHT:
        g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset
        g = tl.where(inside, g, 0.0)
    dx = g - unit * (tl.sum(g * unit, 0) / columns)
    if CENTERED:
        dx -= tl.sum(g, 0) / columns
    tl.store(dx_ptr + row * columns + column, (dx * root).to(dx_ptr.dtype.element_ty), mask=inside)


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor]:
    """See ``plain.norm_forward``; the last dimension of ``x`` is contiguous."""
    rows, columns = x.shape
    early_wide = form.cast == "early" and weight is not None
    dtype = torch.promote_types(x.dtype, weight.dtype) if early_wide and weight is not None else x.dtype
    y = torch.empty((rows, columns), dtype=dtype, device=x.device)
    root = torch.empty(rows, dtype=torch.float32, device=x.device)
    how = row_launch(columns)
    norm_forward_kernel[(rows,)](
        x, weight, bias, y, root, x.stride(0), columns, form.eps, form.offset,
        BLOCK=how.block[0], WEIGHT=weight is not None, BIAS=bias is not None,
        CENTERED=form.centered, EARLY=form.cast == "early", **how.options,
    )  # fmt: skip
    return y, root


def norm_backward(dy: Tensor, x: Tensor, root: Tensor, weight: Tensor | None, form: NormForm) -> Tensor:
    """See ``plain.norm_backward``."""
    rows, columns = x.shape
    dx = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    how = row_launch(columns)
    norm_backward_kernel[(rows,)](
        dy, x, root, weight, dx, dy.stride(0), x.stride(0), columns, form.offset,
        BLOCK=how.block[0], WEIGHT=weight is not None, CENTERED=form.centered,
        **how.options,
    )  # fmt: skip
    return dx
