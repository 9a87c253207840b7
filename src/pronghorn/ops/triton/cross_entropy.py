"""Cross entropy of a tile of logits, its gradient in their place: one program a row, two passes over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.triton.launch import launch


@triton.jit
def _cap(z, cap):
    """(cap * tanh(z / cap), its derivative 1 - tanh^2)."""
    x = z / cap
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay) * tl.where(x < 0, -1.0, 1.0)
    # below 0.25 the quotient cancels; the series to x^9 is off by less than 1e-8 there
    square = x * x
    near = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    t = tl.where(tl.abs(x) < 0.25, x * near, far)
    slope = tl.where(tl.abs(x) < 0.25, 1.0 - t * t, 4.0 * decay / ((1.0 + decay) * (1.0 + decay)))
    return cap * t, slope


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, loss_ptr, logsum_ptr, row_stride, columns, scale, cap, ignore_index,
    BLOCK: tl.constexpr, CAP: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """``cross_entropy_`` of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * row_stride
    label = tl.load(labels_ptr + row)
    top = -float("inf")
    total = 0.0
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < columns, other=0.0).to(tl.float32) * scale
        if CAP:
            z, _slope = _cap(z, cap)
        z = tl.where(column < columns, z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
        top = new_top
    counted = label != ignore_index
    target = tl.load(start + tl.where(counted, label, 0)).to(tl.float32) * scale
    if CAP:
        target, _slope = _cap(target, cap)
    # the difference of the two large numbers first: it is exact where logsumexp would round
    tl.store(loss_ptr + row, tl.where(counted, (top - target) + tl.log(total), 0.0))
    tl.store(logsum_ptr + row, top + tl.log(total))
    for first in range(0, columns if GRAD else 0, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z = tl.load(start + column, mask=column < columns, other=0.0).to(tl.float32) * scale
        slope = scale
        if CAP:
            z, capped = _cap(z, cap)
            slope = capped * scale
        g = (tl.exp(z - top) / total - tl.where(column == label, 1.0, 0.0)) * slope
        g = tl.where(counted, g, 0.0)
        tl.store(start + column, g.to(logits_ptr.dtype.element_ty), mask=column < columns)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    need_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """See ``plain.cross_entropy_``; rows contiguous. Without ``need_grad`` the logits stay as they are."""
    rows, columns = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    logsum = torch.empty_like(loss)
    how = launch("cross_entropy", logits.device)
    cross_entropy_kernel[(rows,)](
        logits, labels, loss, logsum, logits.stride(0), columns, scale, softcap, ignore_index,
        BLOCK=min(how.block[0], triton.next_power_of_2(columns)), CAP=bool(softcap), GRAD=need_grad,
        **how.options,
    )  # fmt: skip
    return loss, logsum
