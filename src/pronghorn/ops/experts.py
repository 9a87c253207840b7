"""The experts of a mixture as one function: grouped products, adapters, a hand-derived backward.

The (token, choice) pairs are sorted by expert, each expert multiplies its own rows, and the results go back
to their tokens. With ``h = act(gate) * up`` and routing weight ``w``: ``out = sum over choices of w (h W_down
+ ...)``. Backward, with ``g = dy W_down^T + s (dy B) A``: ``dw = <g, h> + <dy, bias>``, ``dh = w g``; the
output of the down products is in neither, so it is not kept. Saved are gate and up, the choices, and x only
where an adapter of the first linear trains and no producer can rebuild it. No tensor has a dimension for all
experts but the weights and the gradients of the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pronghorn.ops.graph import Held, Node, flat_rows, graph_is_kept, is_fake, record, release, source_of
from pronghorn.ops.mlp import TORCH, GatedPieces, add_tile, equal_tiles
from pronghorn.ops.shapes import Activation, ExpertPart, MlpLayout

PARAMETERS = 4  # tensors of an ExpertPart
FIRST_PARAMETER = 4  # arguments of the function before them
# what torch's grouped products ask of strides
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class ExpertsForm:
    """What an expert computes between its linears, and by which pieces."""

    layout: MlpLayout
    activation: Activation
    pieces: GatedPieces | None = None
    """None: those of the device, or torch's"""

    def inner(self, outputs: Tensor) -> Tensor:
        """``act(gate) * up`` of the first linear's output."""
        return (self.pieces or TORCH).forward([outputs], self.layout, self.activation)

    def backward(self, dh: Tensor, outputs: Tensor, *, spent: bool) -> Tensor:
        """Gradient of the first linear's output, written over it where ``spent`` allows it."""
        return (self.pieces or TORCH).backward(dh, [outputs], self.layout, self.activation, spent)[0]


class _Settings(NamedTuple):
    """What the functions are told besides tensors."""

    form: ExpertsForm
    scales: tuple[float, float]
    needs_x: bool
    source: Node | None
    tile_rows: int | None

    @property
    def saves_x(self) -> bool:
        """Whether the input has to be saved."""
        return self.needs_x and self.source is None

    def input(self, rest: Sequence[Tensor]) -> Tensor | None:
        """x in backward: saved, rebuilt by the node that made it, or not needed."""
        if self.source is not None:
            return flat_rows(self.source.rebuild(self.source))
        return rest[0] if rest else None

    def tiles(self, rows: int) -> list[slice]:
        """Equal tiles of at most ``tile_rows`` rows."""
        return equal_tiles(rows, self.tile_rows)


def experts(
    x: Tensor,
    index: Tensor,
    routing: Tensor,
    first: ExpertPart,
    down: ExpertPart,
    form: ExpertsForm,
    tile_rows: int | None = None,
) -> Tensor:
    """``reference.experts``: ``x [T, hidden]``, ``index`` and ``routing [T, k]`` to ``[T, hidden]``.

    With ``tile_rows`` at most so many tokens at a time, and nothing kept but the input and the choices.
    """
    needs_x = first.a is not None or tile_rows is not None
    source = source_of(x) if needs_x else None
    settings = _Settings(form, (first.scale, down.scale), needs_x, source, tile_rows)
    function = _Experts if tile_rows is None else _Tiled
    out: Tensor = record(function, x, routing, index, settings, *first[:-1], *down[:-1])
    return out


class Groups:
    """The rows of every (token, choice) pair, sorted by expert."""

    def __init__(self, index: Tensor, count: int, *, native: bool) -> None:
        """``index [T, k]`` of ``count`` experts; ``native``: torch's own grouped products may be used."""
        self.choices = index.shape[1]
        self.count = count
        # stable: backward sorts again and must find the same order
        self.expert, self.order = index.reshape(-1).sort(stable=True)
        self.token = self.order // self.choices
        every = torch.arange(count, device=index.device, dtype=index.dtype)
        self.ends = torch.searchsorted(self.expert, every, right=True).int()
        self.native = native
        self.spans = [] if native else self._spans()

    def _spans(self) -> list[tuple[int, slice]]:
        if is_fake(self.ends):  # as if every expert had as many rows
            ends = [len(self.order) * (e + 1) // self.count for e in range(self.count)]
        else:
            ends = self.ends.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]

    def combine(self, rows: Tensor) -> Tensor:
        """``[S, n]`` in this order, summed over the choices of each token: ``[T, n]``."""
        by_token = torch.empty_like(rows)
        by_token[self.order] = rows
        return by_token.view(-1, self.choices, rows.shape[1]).sum(1)

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Each row times the matrix of its expert: ``[S, n]``, ``[E, n, m]`` to ``[S, m]``."""
        if self.native:
            return functional.grouped_mm(rows, weight, offs=self.ends)
        out = rows.new_empty((rows.shape[0], weight.shape[2]))
        for e, span in self.spans:
            torch.mm(rows[span], weight[e], out=out[span])
        return out

    def add_product(self, out: Tensor, rows: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
        """``out += scale * product(rows, weight)``."""
        if self.native:
            return out.add_(self.product(rows, weight), alpha=scale)
        for e, span in self.spans:
            out[span].addmm_(rows[span], weight[e], alpha=scale)
        return out

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """``left^T right`` over the rows of each expert: ``[S, n]``, ``[S, m]`` to ``[E, n, m]``."""
        if self.native:
            return functional.grouped_mm(left.t(), right, offs=self.ends)
        out = left.new_zeros((self.count, left.shape[1], right.shape[1]))
        for e, span in self.spans:
            torch.mm(left[span].t(), right[span], out=out[e])
        return out


def groups_for(index: Tensor, parts: Sequence[ExpertPart], x: Tensor) -> Groups:
    """The groups of a routing; torch's grouped products where device, dtype and widths allow them."""
    widths = [n for p in parts for t in (p.weight, p.a) if t is not None for n in t.shape[1:]]
    native = (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and all(width * x.element_size() % ALIGNED_BYTES == 0 for width in widths)
    )
    return Groups(index, parts[0].weight.shape[0], native=native)


class _Adapter:
    """The two factors of a part in the dtype of the computation, as right-hand sides."""

    def __init__(self, part: ExpertPart, dtype: torch.dtype) -> None:
        assert part.a is not None and part.b is not None
        self.a = part.a.to(dtype).contiguous()  # [E, r, in]
        self.b = part.b.to(dtype).transpose(1, 2).contiguous()  # [E, r, out]
        self.scale = part.scale


def _adapter(part: ExpertPart, dtype: torch.dtype) -> _Adapter | None:
    return None if part.a is None else _Adapter(part, dtype)


def _forward(rows: Tensor, part: ExpertPart, groups: Groups) -> Tensor:
    """The linear of every row's expert, adapter included: ``[S, in]`` to ``[S, out]``."""
    y = groups.product(rows, part.weight)
    if part.bias is not None:
        y += part.bias[groups.expert]
    if (adapter := _adapter(part, rows.dtype)) is not None:
        small = groups.product(rows, adapter.a.transpose(1, 2))
        groups.add_product(y, small, adapter.b, adapter.scale)
    return y


def _backward(
    rows: Tensor | None,
    dy: Tensor,
    part: ExpertPart,
    groups: Groups,
    needs: Sequence[bool],
    weigh: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """(gradient of ``rows`` for an unweighed ``dy``, gradients of the part's tensors).

    ``weigh [S, 1]`` multiplies ``dy`` in the gradients of the tensors only: there the small factor takes it.
    ``rows`` may be None where the part has no adapter.
    """
    drows = groups.product(dy, part.weight.transpose(1, 2))
    dbias = da = db = None
    if part.bias is not None and needs[1]:
        weighed = dy if weigh is None else dy * weigh
        dbias = part.bias.new_zeros(part.bias.shape, dtype=torch.float32)
        dbias = dbias.index_add_(0, groups.expert, weighed.float()).to(part.bias.dtype)
    if (adapter := _adapter(part, dy.dtype)) is not None:
        assert rows is not None and part.a is not None and part.b is not None
        ds = groups.product(dy, adapter.b.transpose(1, 2)).mul_(adapter.scale)
        groups.add_product(drows, ds, adapter.a)
        if needs[3]:
            small = groups.product(rows, adapter.a.transpose(1, 2)).mul_(adapter.scale)
            db = groups.outer(dy, small if weigh is None else small.mul_(weigh)).to(part.b.dtype)
        if needs[2]:
            da = groups.outer(ds if weigh is None else ds.mul_(weigh), rows).to(part.a.dtype)
    return drows, [None, dbias, da, db]


def _run(
    x: Tensor, routing: Tensor, groups: Groups, parts: Sequence[ExpertPart], form: ExpertsForm
) -> tuple[Tensor, Tensor]:
    """(result ``[T, hidden]``, outputs of the first linears ``[S, ...]``)."""
    first, down = parts
    outputs = _forward(x[groups.token], first, groups)
    y = _forward(form.inner(outputs), down, groups)
    # in place where the dtypes agree; float32 routing weights make a float32 sum, as in the original
    weigh = routing.reshape(-1)[groups.order, None]
    y = y.mul_(weigh) if weigh.dtype == y.dtype else y * weigh
    return groups.combine(y).to(x.dtype), outputs


def _gradients(
    dout: Tensor,
    outputs: Tensor,
    x: Tensor | None,
    routing: Tensor,
    groups: Groups,
    parts: Sequence[ExpertPart],
    form: ExpertsForm,
    settings: tuple[Sequence[bool], bool],
) -> list[Tensor | None]:
    """Gradients of x, of the routing weights and of every tensor of the parts.

    ``settings``: which of them are wanted, and whether ``outputs`` may be overwritten.
    """
    (first, down), (needs, spent) = parts, settings
    cut = 2 + PARAMETERS
    dy = dout[groups.token]
    weigh = routing.reshape(-1)[groups.order, None]
    inner = form.inner(outputs)
    dinner, down_grads = _backward(inner, dy, down, groups, needs[cut:], weigh)
    drouting = _routing_grad(dy, dinner, inner, down, groups, routing) if needs[1] else None
    del dy, inner
    douter = form.backward(dinner.mul_(weigh), outputs, spent=spent)
    del dinner
    rows = None if x is None else x[groups.token]
    drows, first_grads = _backward(rows, douter, first, groups, needs[2:cut])
    dx = groups.combine(drows).to(dout.dtype) if needs[0] else None
    return [dx, drouting, *first_grads, *down_grads]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, routing: Tensor, index: Tensor, settings: _Settings, *flat: Tensor | None
    ) -> Tensor:
        parts = _parts(flat, settings.scales)
        groups = groups_for(index, parts, x)
        out, outputs = _run(x, routing, groups, parts, settings.form)
        ctx.save_for_backward(routing, index, outputs, *([x] if settings.saves_x else []))
        ctx.held, ctx.settings, ctx.unpacked = Held(flat), settings, None
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        settings, parts = ctx.settings, _parts(ctx.held.get(), ctx.settings.scales)
        routing, index, outputs, *rest = release(ctx)
        groups = groups_for(index, parts, outputs)
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[FIRST_PARAMETER:]]
        dx, drouting, *grads = _gradients(
            dout, outputs, settings.input(rest), routing, groups, parts, settings.form,
            (needs, not graph_is_kept()),
        )  # fmt: skip
        return (dx, drouting, None, None, *grads)


class _Tiled(torch.autograd.Function):
    """Keeps x and the choices; every tile runs again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, routing: Tensor, index: Tensor, settings: _Settings, *flat: Tensor | None
    ) -> Tensor:
        parts = _parts(flat, settings.scales)
        out = torch.empty_like(x)
        for tile in settings.tiles(x.shape[0]):
            groups = groups_for(index[tile], parts, x)
            out[tile] = _run(x[tile], routing[tile], groups, parts, settings.form)[0]
        ctx.save_for_backward(routing, index, *([x] if settings.saves_x else []))
        ctx.held, ctx.settings, ctx.unpacked = Held(flat), settings, None
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        settings, flat = ctx.settings, ctx.held.get()
        parts = _parts(flat, settings.scales)
        routing, index, *rest = release(ctx)
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[FIRST_PARAMETER:]]
        x = settings.input(rest)
        dx, drouting = torch.empty_like(dout), torch.empty_like(routing)
        total: list[Tensor | None] = [None] * len(flat)
        for tile in settings.tiles(dout.shape[0]):
            groups = groups_for(index[tile], parts, x)
            outputs = _forward(x[tile][groups.token], parts[0], groups)
            dx_tile, drouting_tile, *new = _gradients(
                dout[tile], outputs, x[tile], routing[tile], groups, parts, settings.form, (needs, True)
            )
            if dx_tile is not None:
                dx[tile] = dx_tile
            if drouting_tile is not None:
                drouting[tile] = drouting_tile
            total = [add_tile(*pair) for pair in zip(total, new, strict=True)]
        grads = [None if g is None or p is None else g.to(p.dtype) for g, p in zip(total, flat, strict=True)]
        return (dx if needs[0] else None, drouting if needs[1] else None, None, None, *grads)


def _parts(flat: Sequence[Tensor | None], scales: Sequence[float]) -> tuple[ExpertPart, ExpertPart]:
    first, first_bias, first_a, first_b, down, down_bias, down_a, down_b = flat
    assert first is not None and down is not None
    return (
        ExpertPart(first, first_bias, first_a, first_b, scales[0]),
        ExpertPart(down, down_bias, down_a, down_b, scales[1]),
    )


def _routing_grad(
    dy: Tensor, dinner: Tensor, inner: Tensor, down: ExpertPart, groups: Groups, routing: Tensor
) -> Tensor:
    """``<dy, output of the down product>`` of each pair, without that output."""
    pair = (dinner.float() * inner).sum(1)
    if down.bias is not None:
        pair += (dy.float() * down.bias[groups.expert]).sum(1)
    grad = torch.empty_like(pair)
    grad[groups.order] = pair
    return grad.view(routing.shape).to(routing.dtype)
