"""Adapted linears of one input with a hand-derived backward.

For each part: ``y = x W^T + bias + s (x A^T) B^T``. Backward, with ``dS = s dy B``:
``dx = dy W + dS A``, ``dA = dS^T x``, ``dB = s dy^T (x A^T)``, ``dbias = sum dy``. W is frozen.

The input is saved once for all parts, or not at all when its producer can rebuild it; the A products of all
parts are one product, and so are their dA. Adapters are cast to the dtype of ``x`` for the product and never
kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.ops.buffer import PackedWeight, dense
from pronghorn.ops.graph import Held, Node, flat_rows, like_input, record, release, source_of
from pronghorn.ops.shapes import LoraPart

PARAMETERS = 4  # tensors of a LoraPart


class Fixed(NamedTuple):
    """What of a LoraPart is no tensor: autograd functions take it beside the tensors."""

    scale: float
    packed: PackedWeight | None


def lora_linears(x: Tensor, parts: Sequence[LoraPart]) -> tuple[Tensor, ...]:
    """``reference.lora_linears``: ``x [..., in]`` to one ``[..., out_i]`` per part, reading ``x`` once."""
    out: tuple[Tensor, ...] = record(_Linears, x, source_of(x), fixed(parts), *flatten(parts))
    return out


def flatten(parts: Sequence[LoraPart]) -> list[Tensor | None]:
    """The tensors of the parts in order: weight (or its codes), bias, a, b, weight, bias, ..."""
    return [tensor for p in parts for tensor in (_codes(p.weight), p.bias, p.a, p.b)]


def fixed(parts: Sequence[LoraPart]) -> tuple[Fixed, ...]:
    """What :func:`flatten` leaves out, a tuple for each part."""
    return tuple(Fixed(p.scale, None if isinstance(p.weight, Tensor) else p.weight) for p in parts)


def _codes(weight: Tensor | PackedWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.packed.data


def unflatten(tensors: Sequence[Tensor | None], rest: Sequence[Fixed]) -> list[LoraPart]:
    """The inverse of :func:`flatten` and :func:`fixed`."""
    parts = []
    for index, (scale, packed) in enumerate(rest):
        weight, bias, a, b = tensors[index * PARAMETERS : (index + 1) * PARAMETERS]
        assert weight is not None
        parts.append(LoraPart(packed or weight, bias, a, b, scale))
    return parts


def shrink(x: Tensor, parts: Sequence[LoraPart]) -> Tensor | None:
    """``x [rows, in]`` times the A of every part, side by side: ``[rows, sum of ranks]``."""
    stacked = stack_a(parts, x.dtype)
    return None if stacked is None else x @ stacked.t()


def stack_a(parts: Sequence[LoraPart], dtype: torch.dtype) -> Tensor | None:
    """The A matrices of the parts above one another, ``[sum of ranks, in]``."""
    matrices = [part.a.to(dtype) for part in parts if part.a is not None]
    return None if not matrices else matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def apply_parts(x: Tensor, small: Tensor | None, parts: Sequence[LoraPart]) -> list[Tensor]:
    """The outputs of the parts for ``x [rows, in]``, given ``small = shrink(x, parts)``."""
    outputs, start = [], 0
    for part in parts:
        y = torch.nn.functional.linear(x, dense(part.weight, x.dtype), part.bias)
        if part.a is not None and part.b is not None:
            assert small is not None
            rank = part.a.shape[0]
            y.addmm_(small[:, start : start + rank], part.b.to(x.dtype).t(), alpha=part.scale)
            start += rank
        outputs.append(y)
    return outputs


def backward_parts(
    x: Tensor | None,
    small: Tensor | None,
    grads: Sequence[Tensor | None],
    parts: Sequence[LoraPart],
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx, gradients in the order of :func:`flatten`) from the gradients of the outputs, everything as rows.

    ``needs[0]`` says whether dx is wanted, ``needs[1:]`` the same for each tensor of the parts; what nobody
    wants is not computed. ``x`` and ``small`` may be None when no adapter trains.
    """
    flat: list[Tensor | None] = []
    dx: Tensor | None = None
    start = 0
    for index, (part, dy) in enumerate(zip(parts, grads, strict=True)):
        _, need_bias, need_a, need_b = needs[1 + index * PARAMETERS : 1 + (index + 1) * PARAMETERS]
        rank = 0 if part.a is None else part.a.shape[0]
        dbias = ds = db = None
        if dy is not None:
            if needs[0]:
                weight = dense(part.weight, dy.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if part.bias is not None and need_bias:
                dbias = dy.sum(0).to(part.bias.dtype)
            if part.a is not None and part.b is not None:
                ds = (dy @ part.b.to(dy.dtype)).mul_(part.scale)
                if need_b:
                    assert small is not None
                    db = (dy.t() @ small[:, start : start + rank]).mul_(part.scale).to(part.b.dtype)
                if dx is not None:
                    dx.addmm_(ds, part.a.to(dy.dtype))
        flat += [None, dbias, ds if need_a else None, db]
        start += rank
    _finish_da(x, flat, parts)
    return dx, flat


def _finish_da(x: Tensor | None, flat: list[Tensor | None], parts: Sequence[LoraPart]) -> None:
    """Turn each dS left in the place of a dA into ``dS^T x``, in one product that reads ``x`` once."""
    places = [(i, ds) for i in range(2, len(flat), PARAMETERS) if (ds := flat[i]) is not None]
    if not places:
        return
    assert x is not None
    product, start = torch.cat([ds for _, ds in places], dim=1).t() @ x, 0
    for i, ds in places:
        a = parts[i // PARAMETERS].a
        assert a is not None
        flat[i] = product[start : start + ds.shape[1]].to(a.dtype)
        start += ds.shape[1]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Node | None, rest: tuple[Fixed, ...], *flat: Tensor | None
    ) -> Any:
        parts = unflatten(flat, rest)
        rows = flat_rows(x)
        small = shrink(rows, parts)
        if source is None:
            ctx.save_for_backward(*([x] if small is None else [x, small]))
        ctx.source, ctx.held, ctx.fixed, ctx.shape, ctx.unpacked = source, Held(flat), rest, x.shape, None
        ctx.set_materialize_grads(False)
        return tuple(like_input(y, x.shape) for y in apply_parts(rows, small, parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        parts = unflatten(ctx.held.get(), ctx.fixed)
        x, small = load_input(ctx, parts)
        rows = [None if dy is None else flat_rows(dy) for dy in grads]
        dx, flat = backward_parts(x, small, rows, parts, needed(ctx))
        return (None if dx is None else dx.view(ctx.shape), None, None, *flat)


def needed(ctx: Any, before: int = 3) -> list[bool]:
    """Whether x, then each parameter, wants a gradient; ``before`` arguments precede the parameters."""
    return [ctx.needs_input_grad[0], *ctx.needs_input_grad[before:]]


def load_input(ctx: Any, parts: Sequence[LoraPart]) -> tuple[Tensor | None, Tensor | None]:
    """(x as rows, x times the A matrices) in backward: saved, or rebuilt by the node that made x."""
    if ctx.source is None:
        x, *rest = release(ctx)
        return flat_rows(x), rest[0] if rest else None
    if all(part.a is None for part in parts):
        return None, None
    rows = flat_rows(ctx.source.rebuild(ctx.source))
    return rows, shrink(rows, parts)
