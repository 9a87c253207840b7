"""LoRA MLPs, gated or not, with a hand-derived backward, in two forms.

Kept: the first linears' outputs are saved, nothing else (x comes from the norm before, h is rebuilt). The
down projection saves nothing, so a recompute of the layer stops before its product: no gradient needs its
output. Tiled: nothing but the input is kept, forward and backward run over tiles of rows and their peak does
not grow with the number of tokens; the gate and up products run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pronghorn.ops.graph import (
    Held,
    Node,
    flat_rows,
    graph_is_kept,
    like_input,
    record,
    release,
    saved,
    source_of,
)
from pronghorn.ops.lora import (
    Fixed,
    apply_parts,
    backward_parts,
    fixed,
    flatten,
    lora_linears,
    needed,
    shrink,
    unflatten,
)
from pronghorn.ops.reference import activate, split
from pronghorn.ops.shapes import Activation, LoraPart, MlpLayout


class GatedPieces(NamedTuple):
    """How the arithmetic between the linears is done: by torch, or by the kernels of one kind of device."""

    forward: Callable[[Sequence[Tensor], MlpLayout, Activation], Tensor]
    """(outputs of the first linears, layout, activation) to ``act(gate) * up``, everything as rows"""
    backward: Callable[[Tensor, Sequence[Tensor], MlpLayout, Activation, bool], list[Tensor]]
    """(its gradient, the outputs, layout, activation, whether the outputs may be overwritten) to the
    gradients of the outputs"""


class _Form(NamedTuple):
    """What an MLP computes between its linears, and by which pieces."""

    layout: MlpLayout
    activation: Activation
    pieces: GatedPieces

    def inner(self, outputs: Sequence[Tensor]) -> Tensor:
        """``act(gate) * up`` of the first linears' outputs."""
        return self.pieces.forward(outputs, self.layout, self.activation)

    def backward(self, dh: Tensor, outputs: Sequence[Tensor], *, spent: bool) -> list[Tensor]:
        """Gradients of the outputs, written over them where ``spent`` allows it."""
        return self.pieces.backward(dh, outputs, self.layout, self.activation, spent)


def mlp(
    x: Tensor,
    first: Sequence[LoraPart],
    down: LoraPart,
    layout: MlpLayout,
    activation: Activation,
    pieces: GatedPieces | None = None,
) -> Tensor:
    """``reference.mlp`` in the kept form: ``x [..., hidden]`` to ``[..., hidden]``."""
    form = _Form(layout, activation, pieces or TORCH)
    inner = record(_Inner, x, source_of(x), fixed(first), form, *flatten(first))
    return lora_linears(inner, [down])[0]


def tiled_mlp(
    x: Tensor,
    first: Sequence[LoraPart],
    down: LoraPart,
    layout: MlpLayout,
    activation: Activation,
    tile_rows: int | None = None,
    pieces: GatedPieces | None = None,
) -> Tensor:
    """``reference.mlp`` in the tiled form; at most ``tile_rows`` tokens at a time, over batch and sequence
    together.
    """
    form = _Form(layout, activation, pieces or TORCH)
    parts = [*first, down]
    out: Tensor = record(_Tiled, x, source_of(x), fixed(parts), form, tile_rows, *flatten(parts))
    return out


def _gate_up(outputs: Sequence[Tensor], layout: MlpLayout, activation: Activation) -> Tensor:
    gate, up = split(outputs, layout)
    inner = activate(gate, activation)
    return inner if up is None else inner.mul_(up)


def _inner_backward(
    dh: Tensor, outputs: Sequence[Tensor], layout: MlpLayout, kind: Activation, spent: bool
) -> list[Tensor]:
    gate, up = split(outputs, layout)
    if up is None:
        return [activation_backward(dh, gate, kind)]
    dup = activate(gate, kind).mul_(dh)
    dgate = activation_backward(dh * up, gate, kind)
    if layout == "gated":
        return [dgate, dup]
    return [torch.cat((dgate, dup) if layout == "gate_up" else (dup, dgate), dim=-1)]


def activation_backward(dy: Tensor, x: Tensor, kind: Activation) -> Tensor:
    """``dy * activate'(x)``."""
    if kind == "silu":
        silu: Tensor = torch.ops.aten.silu_backward(dy, x)
        return silu
    if kind == "relu":
        return dy * (x > 0)
    if kind == "relu2":
        return dy * (2 * x.clamp(min=0))
    gelu: Tensor = torch.ops.aten.gelu_backward(dy, x, approximate="tanh" if kind == "gelu_tanh" else "none")
    return gelu


TORCH = GatedPieces(_gate_up, _inner_backward)


class _Inner(torch.autograd.Function):
    """``act(gate(x)) * up(x)``; saves the linears' outputs and, unless its producer rebuilds it, x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Node | None,
        rest: tuple[Fixed, ...],
        form: _Form,
        *flat: Tensor | None,
    ) -> Tensor:
        parts = unflatten(flat, rest)
        rows = flat_rows(x)
        small = shrink(rows, parts)
        outputs = apply_parts(rows, small, parts)
        ctx.count = len(outputs)
        ctx.save_for_backward(*outputs, *([x] if source is None else []))
        ctx.source, ctx.held, ctx.fixed, ctx.shape = source, Held(flat), rest, x.shape
        ctx.form, ctx.unpacked, ctx.rebuild = form, None, _rebuild_inner
        inner = form.inner(outputs)
        return like_input(inner, x.shape)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        parts = unflatten(ctx.held.get(), ctx.fixed)
        tensors = release(ctx)
        outputs, spent = tensors[: ctx.count], not graph_is_kept()
        grads = ctx.form.backward(flat_rows(dh), outputs, spent=spent)
        rows = small = None
        if any(part.a is not None for part in parts):
            x = tensors[ctx.count] if ctx.source is None else ctx.source.rebuild(ctx.source)
            rows = flat_rows(x)
            small = shrink(rows, parts)
        dx, flat = backward_parts(rows, small, grads, parts, needed(ctx, before=4))
        return (None if dx is None else dx.view(ctx.shape), None, None, None, *flat)


def _rebuild_inner(node: Any) -> Tensor:
    inner: Tensor = node.form.inner(saved(node)[: node.count])
    return inner


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: Node | None,
        rest: tuple[Fixed, ...],
        form: _Form,
        tile_rows: int | None,
        *flat: Tensor | None,
    ) -> Tensor:
        parts = unflatten(flat, rest)
        rows = flat_rows(x)
        out = rows.new_empty((rows.shape[0], parts[-1].weight.shape[0]))
        for tile in equal_tiles(rows.shape[0], tile_rows):
            inner = form.inner(_first(rows[tile], parts))
            out[tile] = apply_parts(inner, shrink(inner, parts[-1:]), parts[-1:])[0]
        if source is None:
            ctx.save_for_backward(x)
        ctx.source, ctx.held, ctx.fixed, ctx.shape = source, Held(flat), rest, x.shape
        ctx.form, ctx.tile_rows, ctx.unpacked = form, tile_rows, None
        return like_input(out, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        parts = unflatten(ctx.held.get(), ctx.fixed)
        rows = flat_rows(release(ctx)[0] if ctx.source is None else ctx.source.rebuild(ctx.source))
        dy, needs = flat_rows(dy), needed(ctx, before=5)
        dx = torch.empty_like(rows) if needs[0] else None
        total: list[Tensor | None] = [None] * (len(needs) - 1)
        for tile in equal_tiles(rows.shape[0], ctx.tile_rows):
            dx_tile, new = _tile_backward(rows[tile], dy[tile], parts, ctx.form, needs)
            if dx is not None and dx_tile is not None:
                dx[tile] = dx_tile
            total = [add_tile(*pair) for pair in zip(total, new, strict=True)]
        grads = [
            g if g is None or p is None else g.to(p.dtype) for g, p in zip(total, flatten(parts), strict=True)
        ]
        return (None if dx is None else dx.view(ctx.shape), None, None, None, None, *grads)


def _first(x: Tensor, parts: Sequence[LoraPart]) -> list[Tensor]:
    return apply_parts(x, shrink(x, parts[:-1]), parts[:-1])


def _tile_backward(
    x: Tensor,
    dy: Tensor,
    parts: Sequence[LoraPart],
    form: _Form,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """One tile of the backward: gate and up again, then down, activation, gate and up backwards."""
    first, down = parts[:-1], parts[-1:]
    small = shrink(x, first)
    outputs = apply_parts(x, small, first)
    inner = form.inner(outputs)
    cut = len(needs) - 4  # the down projection's four tensors come last
    dh, down_grads = backward_parts(inner, shrink(inner, down), [dy], down, [True, *needs[cut:]])
    assert dh is not None
    outer = form.backward(dh, outputs, spent=True)
    dx, first_grads = backward_parts(x, small, outer, first, needs[:cut])
    return dx, first_grads + down_grads


def equal_tiles(rows: int, tile_rows: int | None) -> list[slice]:
    """Equal tiles of at most ``tile_rows`` rows: no tile carries the remainder of the others."""
    count = 1 if tile_rows is None else max(1, -(-rows // tile_rows))
    size = max(1, -(-rows // count))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def add_tile(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    """``total + new`` in float32: the rounding of a bfloat16 sum would grow with the number of tiles."""
    return total if new is None else new.float() if total is None else total.add_(new)
