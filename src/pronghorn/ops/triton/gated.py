"""SwiGLU and GEGLU: forward, and a backward that turns the three tensors it reads into the three it makes."""

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

    With decay = exp(-x), 1 - sigmoid(x) is decay * sigmoid(x), which does not cancel; at 80 exp is still finite.
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
def gated_forward_kernel(gate_ptr, up_ptr, h_ptr, count, BLOCK: tl.constexpr, KIND: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    e = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    f, _slope = _activate(e, KIND)
    tl.store(h_ptr + at, (f * u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_backward_kernel(dh_ptr, gate_ptr, up_ptr, count, BLOCK: tl.constexpr, KIND: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    e = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    f, slope = _activate(e, KIND)
    tl.store(dh_ptr + at, (f * u).to(dh_ptr.dtype.element_ty), mask=inside)
    tl.store(up_ptr + at, (d * f).to(up_ptr.dtype.element_ty), mask=inside)
    tl.store(gate_ptr + at, (d * u * slope).to(gate_ptr.dtype.element_ty), mask=inside)


def gated_forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """See ``plain.gated_forward``; both inputs contiguous and of one shape."""
    h = torch.empty_like(gate)
    how = launch("gated_forward", gate.device)
    grid = (triton.cdiv(gate.numel(), how.block[0]),)
    gated_forward_kernel[grid](
        gate, up, h, gate.numel(), BLOCK=how.block[0], KIND=KINDS[activation], num_warps=how.warps
    )
    return h


def gated_backward_(dh: Tensor, gate: Tensor, up: Tensor, activation: Activation) -> None:
    """See ``plain.gated_backward_``; all three contiguous and of one shape."""
    how = launch("gated_backward", gate.device)
    grid = (triton.cdiv(gate.numel(), how.block[0]),)
    gated_backward_kernel[grid](
        dh, gate, up, gate.numel(), BLOCK=how.block[0], KIND=KINDS[activation], num_warps=how.warps
    )
