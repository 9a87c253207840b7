"""What each kernel computes, as plain PyTorch with the same signature. Slow and obvious: the tests' truth."""

from __future__ import annotations

import torch
from torch import Tensor

from pronghorn.ops import reference
from pronghorn.ops.shapes import Activation, NormForm, RopeForm


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor]:
    """``x [N, H]`` to (normed ``[N, H]``, float32 reciprocal root ``[N]``)."""
    wide = x.float()
    centered = wide - wide.mean(-1, keepdim=True) if form.centered else wide
    return reference.norm(x, weight, bias, form), torch.rsqrt(centered.pow(2).mean(-1) + form.eps)


def norm_backward(dy: Tensor, x: Tensor, root: Tensor, weight: Tensor | None, form: NormForm) -> Tensor:
    """Gradient of the normed rows with respect to ``x``; all ``[N, H]``, ``root [N]`` from the forward."""
    wide = x.float()
    unit = (wide - wide.mean(-1, keepdim=True) if form.centered else wide) * root[:, None]
    g = dy.float() if weight is None else dy.float() * (weight.float() + form.offset)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    if form.centered:
        dx = dx - g.mean(-1, keepdim=True)
    return (dx * root[:, None]).to(x.dtype)


def gated_forward(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """``act(gate) * up``, elementwise; computed in float32, rounded once."""
    return (reference.activate(gate.float(), activation) * up.float()).to(gate.dtype)


def gated_backward(
    dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: Activation
) -> None:
    """Writes the gradients of ``gate`` and ``up`` to ``dgate`` and ``dup``, which may be the same tensors."""
    with torch.enable_grad():
        e = gate.detach().float().clone().requires_grad_()
        f = reference.activate(e, activation)
    (slope,) = torch.autograd.grad(f.sum(), e)
    d, u = dh.float(), up.float().clone()
    dup.copy_(d * f.detach())
    dgate.copy_(d * u * slope)


def rope(x: Tensor, cos: Tensor, sin: Tensor, form: RopeForm, *, backward: bool = False) -> Tensor:
    """Rotary embedding of ``x [B, H, T, D]`` with ``cos``, ``sin`` ``[B or 1, T, W]``; the rest of D passes.

    Pair i turns: ``y0 = x0 * cos[c0] - x1 * sin[c0]``, ``y1 = x1 * cos[c1] + x0 * sin[c1]``.
    """
    width = cos.shape[-1] * (2 if form.half_table else 1) if form.pairs == "halves" else cos.shape[-1]
    pairs = torch.arange(width // 2, device=x.device)
    halves = form.pairs == "halves"
    p0, p1 = (pairs, pairs + width // 2) if halves else (2 * pairs, 2 * pairs + 1)
    c0, c1 = (pairs, pairs) if form.half_table else (p0, p1)
    table_cos, table_sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    x0, x1 = x[..., p0].float(), x[..., p1].float()
    out = x.clone()
    if backward:
        out[..., p0] = (x0 * table_cos[..., c0] + x1 * table_sin[..., c1]).to(x.dtype)
        out[..., p1] = (x1 * table_cos[..., c1] - x0 * table_sin[..., c0]).to(x.dtype)
    else:
        out[..., p0] = (x0 * table_cos[..., c0] - x1 * table_sin[..., c0]).to(x.dtype)
        out[..., p1] = (x1 * table_cos[..., c1] + x0 * table_sin[..., c1]).to(x.dtype)
    return out


def cross_entropy_(
    logits: Tensor, labels: Tensor, *, scale: float = 1.0, softcap: float = 0.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """(loss, logsumexp) of each row, float32 ``[N]``; ``logits [N, V]`` becomes each row's gradient.

    Ignored rows: loss 0, gradient 0. ``z = scale * logits``; where softcap is not 0, ``softcap * tanh(z /
    softcap)`` of that.
    """
    with torch.enable_grad():
        leaf = logits.detach().float().clone().requires_grad_()
        z = leaf * scale
        z = softcap * torch.tanh(z / softcap) if softcap else z
        logsum = torch.logsumexp(z, dim=-1)
        counted = labels != ignore_index
        target = z.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        loss = torch.where(counted, logsum - target, 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    logits.copy_(gradient)
    return loss.detach(), logsum.detach()


def nf4_decode(packed: Tensor, absmax: Tensor, table: Tensor, block: int, out: Tensor) -> Tensor:
    """uint8 ``packed [n/2]``, high nibble first; float32 ``absmax [n/block]``, ``table [16]``; to ``out``."""
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten().long()
    return out.copy_(table[codes] * absmax.repeat_interleave(block)[: codes.numel()])


def absmax_decode(codes: Tensor, table: Tensor, absmax: Tensor, offset: float, block: int) -> Tensor:
    """Double quantisation's scales: ``codes`` uint8 ``[n]``, ``table [256]``, ``absmax [n/block]`` to float32
    ``[n]``.
    """
    return table[codes.long()] * absmax.repeat_interleave(block)[: codes.numel()] + offset


def lora_add_(y: Tensor, xa: Tensor, b: Tensor, scale: float) -> None:
    """``y [N, out] += scale * xa [N, r] @ b [out, r].T``, summed in float32, rounded once."""
    y.copy_(y.float() + scale * (xa.float() @ b.float().T))


def round_bf16(x: Tensor) -> Tensor:
    """float32 to bfloat16, to nearest, ties to even, NaN kept."""
    return x.to(torch.bfloat16)
