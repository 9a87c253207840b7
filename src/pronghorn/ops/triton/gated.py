"""SwiGLU, GEGLU and their like: forward, and a backward that may write where it has read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.shapes import Activation
from pronghorn.ops.triton.launch import launch

# activation -> number the kernels know it by
KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4}


@triton.jit
def _activate(e, KIND: tl.constexpr):
    """(act(e), act'(e)) in float32.

    With decay = exp(-x), 1 - sigmoid(x) is decay * sigmoid(x), which does not cancel; exp(80) is finite.
    """
    if KIND == 0:
        decay = tl.exp(tl.minimum(-e, 80.0))
        s = 1.0 / (1.0 + decay)
        f = e * s
        slope = s + e * s * (decay * s)
    elif KIND == 1:
        # GELU's tanh form (arXiv 1606.08415) with (1 + tanh(u)) / 2 = sigmoid(2u), which does not cancel;
        # u = sqrt(2/pi) (e + 0.044715 e^3)
        decay = tl.exp(tl.minimum(-1.5957691216057308 * e * (1.0 + 0.044715 * e * e), 80.0))
        s = 1.0 / (1.0 + decay)
        f = e * s
        slope = s + e * s * (decay * s) * 1.5957691216057308 * (1.0 + 0.134145 * e * e)
    elif KIND == 2:
        cdf = 0.5 * (1.0 + tl.erf(e * 0.7071067811865476))
        f = e * cdf
        slope = cdf + e * 0.3989422804014327 * tl.exp(-0.5 * e * e)
    else:
        positive = tl.where(e > 0, e, 0.0)
        f = positive if KIND == 3 else positive * positive
        slope = tl.where(e > 0, 1.0, 0.0) if KIND == 3 else 2.0 * positive
    return f, slope


@triton.jit
def gated_forward_kernel(
    gate_ptr, up_ptr, h_ptr, columns, blocks, gate_stride, up_stride, h_stride,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``gated_forward`` of one block of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    e = tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    f, _slope = _activate(e, KIND)
    tl.store(h_ptr + row * h_stride + at, (f * u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, columns, blocks, dh_stride, stride, dstride,
    BLOCK: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``gated_backward`` of one block of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    d = tl.load(dh_ptr + row * dh_stride + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(gate_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    f, slope = _activate(e, KIND)
    tl.store(dup_ptr + row * dstride + at, (d * f).to(dup_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr + row * dstride + at, (d * u * slope).to(dgate_ptr.dtype.element_ty), mask=inside)


def _rows_and_columns(*tensors: Tensor) -> tuple[int, int]:
    """One long row where the rows of every tensor follow one another, else their shape."""
    rows, columns = tensors[0].shape
    return (1, rows * columns) if all(t.is_contiguous() for t in tensors) else (rows, columns)


def gated_forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See ``plain.gated_forward``; ``[N, I]`` each, the last dimension contiguous."""
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, columns = _rows_and_columns(gate, up, h)
    how = launch("gated_forward", gate.device)
    blocks = triton.cdiv(columns, how.block[0])
    gated_forward_kernel[(rows * blocks,)](
        gate, up, h, columns, blocks, gate.stride(0), up.stride(0), h.stride(0),
        BLOCK=how.block[0], KIND=KINDS[activation], **how.options,
    )  # fmt: skip
    return h


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: Activation
) -> None:
    """See ``plain.gated_backward``; ``gate`` and ``up`` share a row stride, ``dgate`` and ``dup`` too.

    ``dgate`` may be ``gate`` and ``dup`` may be ``up``: every element is read before it is written.
    """
    assert gate.stride() == up.stride() and dgate.stride() == dup.stride()
    rows, columns = _rows_and_columns(dh, gate, up, dgate, dup)
    how = launch("gated_backward", gate.device)
    blocks = triton.cdiv(columns, how.block[0])
    gated_backward_kernel[(rows * blocks,)](
        dh, gate, up, dgate, dup, columns, blocks, dh.stride(0), gate.stride(0), dgate.stride(0),
        BLOCK=how.block[0], KIND=KINDS[activation], **how.options,
    )  # fmt: skip
