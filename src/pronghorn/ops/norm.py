"""RMSNorm and LayerNorm that save their input and one float32 per row, and can rebuild their output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pronghorn.ops.graph import Held, record, release, saved
from pronghorn.ops.shapes import NormForm


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """``reference.norm`` with a hand-derived backward: ``x [..., H]`` to the same shape."""
    out: Tensor = record(_Norm, x, weight, bias, form)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
        wide = x.float()
        mean = wide.mean(-1, keepdim=True) if form.centered else None
        centered = wide if mean is None else wide - mean
        variance = centered.pow(2).mean(-1, keepdim=True) + form.eps
        scale = torch.rsqrt(variance) if form.root == "rsqrt" else torch.pow(variance, -0.5)
        ctx.save_for_backward(x, scale, *([] if mean is None else [mean]))
        ctx.held, ctx.form, ctx.unpacked, ctx.rebuild = Held((weight, bias)), form, None, _rebuild
        return _weigh(centered, scale, weight, bias, form, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *rest = release(ctx)
        weight, bias = ctx.held.get()
        unit = (x.float() - rest[0] if rest else x.float()) * scale
        wide = dy.float()
        dx = dweight = dbias = None
        if weight is not None and ctx.needs_input_grad[1]:
            dweight = (wide * unit).sum_to_size(weight.shape).to(weight.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            dbias = wide.sum_to_size(bias.shape).to(bias.dtype)
        if ctx.needs_input_grad[0]:
            g = wide if weight is None else wide * (weight.float() + ctx.form.offset)
            share = (g * unit).mean(-1, keepdim=True)
            if ctx.form.centered:
                g = g - g.mean(-1, keepdim=True)
            dx = (g - unit.mul_(share)).mul_(scale).to(x.dtype)
        return dx, dweight, dbias, None


def _weigh(
    centered: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
    dtype: torch.dtype,
) -> Tensor:
    unit = centered * scale
    if weight is None:
        return unit.to(dtype)
    if form.cast == "early":
        y = (weight + form.offset if form.offset else weight) * unit.to(dtype)
        return y if bias is None else y + bias
    y = unit.mul_(weight.float() + form.offset)
    return (y if bias is None else y.add_(bias.float())).to(dtype)


def _rebuild(node: Any) -> Tensor:
    """The norm's output again, bit for bit: the same expressions on the same values."""
    x, scale, *rest = saved(node)
    weight, bias = node.held.get()
    wide = x.float()
    return _weigh(wide - rest[0] if rest else wide, scale, weight, bias, node.form, x.dtype)
