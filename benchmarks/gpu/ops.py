"""Each op by itself: its time against that in which the device can move its bytes or do its products."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pronghorn.ops import select
from pronghorn.ops.shapes import LoraPart, NormForm, RopeForm

# inputs rotate among copies of at least this many bytes together, so that no cache holds them
ROTATED_BYTES = 256 * 2**20
FORM = NormForm(eps=1e-5)


@dataclass(frozen=True)
class Op:
    """``make`` gives fresh inputs, ``run`` uses them; bytes are each input and output once."""

    name: str
    by: str
    make: Callable[[], Any]
    run: Callable[..., Any]
    bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Of the ops: one layer of a model, and its head."""

    tokens: int
    hidden: int
    inner: int
    vocabulary: int
    rank: int = 16


LARGE = Sizes(8192, 4096, 14336, 128256)
SMALL = Sizes(32, 64, 96, 512, 4)


def timed(make: Callable[[], Any], run: Callable[..., Any], device: str, *, rounds: int = 20) -> float:
    """Median seconds of one call, over inputs that rotate."""
    first = make()
    size = sum(t.nbytes for t in first if isinstance(t, Tensor))
    copies = [
        first,
        *(make() for _ in range(min(8, ROTATED_BYTES // max(size, 1)) if device != "cpu" else 1)),
    ]
    for inputs in copies:
        run(*inputs)
    if device == "cpu":
        marks = [time.perf_counter()]
        for inputs in copies:
            run(*inputs)
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for index in range(rounds):
        run(*copies[index % len(copies)])
        events[index + 1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairwise(events)) / 1e3


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches: a large copy (read plus written) and a large product."""
    side, count = (8192, 2**31) if device != "cpu" else (256, 2**20)
    source = torch.randn(side, side, device=device).to(dtype)
    product = timed(lambda: (source, source.t().contiguous()), torch.mm, device)
    bytes_ = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    copy = timed(lambda: (bytes_, torch.empty_like(bytes_)), lambda a, b: b.copy_(a), device)
    return {"matrix_tflops": 2 * side**3 / product / 1e12, "copy_gbs": 2 * count / copy / 1e9}


def table(device: str, dtype: torch.dtype, limits: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each op and each way to do it here."""
    kernels = device != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    backends: tuple[select.Backend, ...] = ("torch", "triton") if kernels else ("torch",)
    rows = []
    for op in _ops(SMALL if device == "cpu" else LARGE, device, dtype, backends):
        seconds = timed(op.make, op.run, device)
        memory = op.bytes / limits["copy_gbs"] / 1e9
        arithmetic = op.flops / limits["matrix_tflops"] / 1e12
        rows.append(
            {"op": op.name, "by": op.by, "us": seconds * 1e6, "floor_us": max(memory, arithmetic) * 1e6,
             "bound": "bytes" if memory >= arithmetic else "products"}
        )  # fmt: skip
    return rows


def _ops(sizes: Sizes, device: str, dtype: torch.dtype, backends: tuple[select.Backend, ...]) -> Iterator[Op]:
    def randn(*shape: int, grad: bool = False, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)

    n, h, i, v, r = sizes.tokens, sizes.hidden, sizes.inner, sizes.vocabulary, sizes.rank
    e = dtype.itemsize

    def norm(x: Tensor, w: Tensor, by: select.Backend) -> Tensor:
        return select.norm(x, w, None, FORM, using=by)

    def mlp(x: Tensor, g: LoraPart, u: LoraPart, d: LoraPart, dy: Tensor, by: select.Backend) -> Any:
        y = select.mlp(x, [g, u], d, "gated", "silu", using=by)
        return torch.autograd.grad(y, [x, g.a, u.a, d.a, g.b, u.b, d.b], dy)

    def loss(x: Tensor, w: Tensor, labels: Tensor, by: select.Backend) -> Any:
        return torch.autograd.grad(select.linear_cross_entropy(x, w, None, labels, using=by), x)

    def mlp_inputs() -> tuple[Any, ...]:
        parts = (_part(randn, i, h, r), _part(randn, i, h, r), _part(randn, h, i, r))
        return randn(n, h, grad=True), *parts, randn(n, h)

    def loss_inputs() -> tuple[Tensor, ...]:
        labels = torch.randint(0, v, (n,), device=device)
        return randn(n, h, grad=True), randn(v, h, scale=h**-0.5), labels

    for by in backends:
        yield Op(
            "norm, forward",
            by,
            lambda: (randn(n, h, grad=True), randn(h)),
            partial(norm, by=by),
            2 * n * h * e,
        )
        yield Op(
            "norm, forward and backward", by, lambda: (randn(n, h, grad=True), randn(h), randn(n, h)),
            lambda x, w, dy, by=by: torch.autograd.grad(norm(x, w, by), x, dy), 5 * n * h * e,
        )  # fmt: skip
        yield Op(
            "MLP, forward and backward", by, mlp_inputs, partial(mlp, by=by),
            (2 * 3 * h * i + 4 * n * h + 10 * n * i) * e, (4.0 * h * i + 6.0 * r * (h + i)) * 3 * n,
        )  # fmt: skip
        yield Op(
            "loss, frozen head", by, loss_inputs, partial(loss, by=by),
            (2 * v * h + 2 * n * h) * e, 4.0 * n * v * h,
        )  # fmt: skip
    yield from _adapter_ops(sizes, randn, "triton" in backends)
    if "triton" in backends:
        yield from _kernel_ops(sizes, randn, device)


def _kernel_ops(sizes: Sizes, randn: Callable[..., Tensor], device: str) -> Iterator[Op]:
    """Single kernels: what a tuned launch would change."""
    from pronghorn.ops.triton import cross_entropy, gated, nf4, rope

    n, i, v, e = sizes.tokens, sizes.inner, sizes.vocabulary, randn(1).itemsize
    heads, width, block, rows = sizes.hidden // 16, 16, 64, min(n, 1024)
    if sizes.hidden >= 4096:
        heads, width = sizes.hidden // 128, 128

    def gated_backward(dh: Tensor, gate: Tensor, up: Tensor) -> None:
        gated.gated_backward(dh, gate, up, gate, up, "silu")

    def rope_inputs() -> tuple[Any, ...]:
        q, k = randn(1, n, heads, width).transpose(1, 2), randn(1, n, heads // 4, width).transpose(1, 2)
        return q, k, randn(1, n, width), randn(1, n, width), RopeForm()

    def packed() -> tuple[Any, ...]:
        count = sizes.hidden * i
        codes = torch.randint(0, 255, (count // 2,), dtype=torch.uint8, device=device)
        scales = torch.rand(count // block, device=device)
        out = torch.empty(count, dtype=torch.bfloat16, device=device)
        return codes, scales, torch.rand(16, device=device), block, out

    def tile() -> tuple[Tensor, Tensor]:
        return randn(rows, v), torch.randint(0, v, (rows,), device=device)

    kernel = partial(Op, by="triton")
    yield kernel(
        name="gated, forward", make=lambda: (randn(n, i), randn(n, i)),
        run=lambda gate, up: gated.gated_forward(gate, up, "silu"), bytes=3 * n * i * e,
    )  # fmt: skip
    yield kernel(
        name="gated, backward", make=lambda: tuple(randn(n, i) for _ in range(3)),
        run=gated_backward, bytes=5 * n * i * e,
    )  # fmt: skip
    yield kernel(
        name="rope of q and k", make=rope_inputs, run=rope.rope,
        bytes=(2.5 * n * heads + 2 * n) * width * e,
    )  # fmt: skip
    yield kernel(
        name="cross entropy of a tile", make=tile, run=cross_entropy.cross_entropy_, bytes=2 * rows * v * e
    )
    yield kernel(
        name="nf4 decode", make=packed, run=nf4.nf4_decode,
        bytes=sizes.hidden * i * (0.5 + 4 / block + 2),
    )  # fmt: skip


def _part(randn: Callable[..., Tensor], out: int, width: int, rank: int) -> LoraPart:
    a, b = randn(rank, width, grad=True, scale=width**-0.5), randn(out, rank, grad=True, scale=0.02)
    return LoraPart(randn(out, width, scale=width**-0.5), None, a, b, 2.0)


def _adapter_ops(sizes: Sizes, randn: Callable[..., Tensor], kernels: bool) -> Iterator[Op]:
    """Three ways to add the adapter to the base product: which of them pays is for a device to say."""
    n, h, i, r = sizes.tokens, sizes.hidden, sizes.inner, sizes.rank
    dtype_bytes = randn(1).itemsize

    def make() -> tuple[Tensor, ...]:
        return randn(n, h), randn(i, h, scale=h**-0.5), randn(n, r), randn(i, r)

    def base_first(x: Tensor, w: Tensor, xa: Tensor, b: Tensor) -> Tensor:
        return (x @ w.t()).addmm_(xa, b.t(), alpha=2.0)

    def adapter_first(x: Tensor, w: Tensor, xa: Tensor, b: Tensor) -> Tensor:
        return torch.mm(xa * 2.0, b.t()).addmm_(x, w.t())

    ways: list[tuple[str, Callable[..., Any]]] = [
        ("base, then addmm_", base_first),
        ("adapter, then addmm_", adapter_first),
    ]
    if kernels:
        from pronghorn.ops.triton import lora

        def kernel(x: Tensor, w: Tensor, xa: Tensor, b: Tensor) -> Tensor:
            y = x @ w.t()
            lora.lora_add_(y, xa, b, 2.0)
            return y

        ways.append(("base, then lora_add_", kernel))
    moved = (n * h + i * h + n * r + i * r + n * i) * dtype_bytes
    for by, run in ways:
        yield Op("adapted linear, forward", by, make, run, moved, 2.0 * n * i * (h + r))
