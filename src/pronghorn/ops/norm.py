"""RMSNorm and LayerNorm that save their input and one float32 per row, and can rebuild their output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.ops.graph import Held, record, release, saved
from pronghorn.ops.shapes import NormForm

Stats = tuple[Tensor, ...]


class NormPieces(NamedTuple):
    """How the arithmetic of a norm is done: by torch, or by the kernels of one kind of device."""

    forward: Callable[[Tensor, Tensor | None, Tensor | None, NormForm], tuple[Tensor, Stats]]
    """(x, weight, bias, form) to (y, what to keep: float32 ``[..., 1]`` each, the reciprocal root first)"""
    output: Callable[[Tensor, Stats, Tensor | None, Tensor | None, NormForm], Tensor]
    """y again, bit for bit"""
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]
    """(dy, x, stats, weight, bias, form, which are needed) to gradients of x, weight and bias"""


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm, pieces: NormPieces | None = None
) -> Tensor:
    """``reference.norm`` with a hand-derived backward: ``x [..., H]`` to the same shape."""
    out: Tensor = record(_Norm, x, weight, bias, form, pieces or TORCH)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm, pieces: NormPieces
    ) -> Tensor:
        y, stats = pieces.forward(x, weight, bias, form)
        ctx.save_for_backward(x, *stats)
        ctx.held, ctx.form, ctx.pieces = Held((weight, bias)), form, pieces
        ctx.unpacked, ctx.rebuild = None, _rebuild
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *stats = release(ctx)
        weight, bias = ctx.held.get()
        needs = ctx.needs_input_grad[:3]
        return *ctx.pieces.backward(dy, x, tuple(stats), weight, bias, ctx.form, needs), None, None


def _rebuild(node: Any) -> Tensor:
    """The norm's output again, bit for bit: the same expressions on the same values."""
    x, *stats = saved(node)
    out: Tensor = node.pieces.output(x, tuple(stats), *node.held.get(), node.form)
    return out


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> tuple[Tensor, Stats]:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True) if form.centered else None
    centered = wide if mean is None else wide - mean
    variance = centered.pow(2).mean(-1, keepdim=True) + form.eps
    scale = torch.rsqrt(variance) if form.root == "rsqrt" else torch.pow(variance, -0.5)
    stats = (scale,) if mean is None else (scale, mean)
    return _weigh(centered, scale, weight, bias, form, x.dtype), stats


def _output(x: Tensor, stats: Stats, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    scale, *rest = stats
    wide = x.float()
    return _weigh(wide - rest[0] if rest else wide, scale, weight, bias, form, x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Stats,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward of ``NormPieces`` by torch."""
    scale, *rest = stats
    unit = (x.float() - rest[0] if rest else x.float()) * scale
    wide = dy.float()
    dx = dweight = dbias = None
    if weight is not None and needs[1]:
        dweight = (wide * unit).sum_to_size(weight.shape).to(weight.dtype)
    if bias is not None and needs[2]:
        dbias = wide.sum_to_size(bias.shape).to(bias.dtype)
    if needs[0]:
        g = wide if weight is None else wide * (weight.float() + form.offset)
        share = (g * unit).mean(-1, keepdim=True)
        if form.centered:
            g = g - g.mean(-1, keepdim=True)
        dx = (g - unit.mul_(share)).mul_(scale).to(x.dtype)
    return dx, dweight, dbias


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


TORCH = NormPieces(_forward, _output, backward)
