"""Every kernel beside its plain twin: odd sizes, float32 and float16, canaries around each buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pronghorn.ops.shapes import NormForm, RopeForm
from pronghorn.ops.triton import bf16, cross_entropy, gated, lora, nf4, norm, plain, rope
from tests.ops.triton.canary import DEVICE, Guarded, close_to_truth, randn

# the interpreter's bfloat16 is wrong (silently), so bfloat16 runs on a device only
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
FORMS = [
    NormForm(eps=1e-6),
    NormForm(eps=1e-6, offset=1.0, cast="late"),
    NormForm(eps=1e-5, cast="late"),
    NormForm(eps=1e-5, centered=True, cast="late"),
]


def twice(run: Callable[..., torch.Tensor], *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain function in the tensors' own dtype, and in float64 as the truth."""
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]
    return run(*tensors), run(*wide)


def wide_norm(
    x: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None, form: NormForm
) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True) if form.centered else x
    unit = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + form.eps)
    y = unit if w is None else unit * (w + form.offset)
    return y if b is None else y + b


@pytest.mark.parametrize("form", FORMS, ids=["rms", "one_plus", "late", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 63), (3, 507), (1, 1024)])
def test_norm(form: NormForm, dtype: torch.dtype, size: tuple[int, int]) -> None:
    x, dy = Guarded(randn(*size, dtype=dtype, seed=1, scale=3)), Guarded(randn(*size, dtype=dtype, seed=2))
    w = Guarded(randn(size[1], dtype=dtype, seed=3))
    b = Guarded(randn(size[1], dtype=dtype, seed=4)) if form.centered else None
    bias = None if b is None else b.tensor
    y, root = norm.norm_forward(x.tensor, w.tensor, bias, form)
    plain_y, plain_root = plain.norm_forward(x.tensor, w.tensor, bias, form)
    wide = [None if t is None else t.double() for t in (x.tensor, w.tensor, bias)]
    close_to_truth(y, plain_y, wide_norm(*wide, form))
    torch.testing.assert_close(root, plain_root, rtol=2e-6, atol=0)

    leaf = x.tensor.double().requires_grad_()
    (truth,) = torch.autograd.grad(wide_norm(leaf, wide[1], wide[2], form), leaf, dy.tensor.double())
    dx = norm.norm_backward(dy.tensor, x.tensor, root, w.tensor, form)
    close_to_truth(dx, plain.norm_backward(dy.tensor, x.tensor, plain_root, w.tensor, form), truth)
    for guarded in filter(None, (x, dy, w, b)):
        guarded.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_without_weight(dtype: torch.dtype) -> None:
    x = randn(4, 77, dtype=dtype)
    y, _ = norm.norm_forward(x, None, None, FORMS[0])
    close_to_truth(
        y, plain.norm_forward(x, None, None, FORMS[0])[0], wide_norm(x.double(), None, None, FORMS[0])
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,columns", [(1, 1), (3, 63), (2, 1025)])
@pytest.mark.parametrize("in_place", [True, False])
def test_gated(activation: Any, dtype: torch.dtype, rows: int, columns: int, in_place: bool) -> None:
    # the gaps between guarded rows make these strided; plain tensors below are one long row
    tensors = [Guarded(randn(rows, columns, dtype=dtype, seed=i, scale=4)) for i in range(3)]
    dh, gate, up = (t.tensor for t in tensors)
    truth_h = plain.reference.activate(gate.double(), activation) * up.double()
    expected = plain.gated_forward(gate, up, activation)
    for a, b in ((gate, up), (gate.contiguous(), up.contiguous())):
        close_to_truth(gated.gated_forward(a, b, activation), expected, truth_h)

    leaves = [gate.double().requires_grad_(), up.double().requires_grad_()]
    out = plain.reference.activate(leaves[0], activation) * leaves[1]
    truths = torch.autograd.grad(out, leaves, dh.double())
    twins = [torch.empty_like(gate), torch.empty_like(up)]
    plain.gated_backward(dh, gate, up, *twins, activation)
    apart = torch.full((2, rows, columns + 5), float("nan"), device=DEVICE, dtype=dtype)[..., :columns]
    made = [gate, up] if in_place else list(apart)
    gated.gated_backward(dh, gate, up, *made, activation)
    for fast, twin, truth in zip(made, twins, truths, strict=True):
        close_to_truth(fast, twin, truth)
    for guarded in tensors:
        guarded.check()


ROPES = [
    RopeForm(),
    RopeForm(half_table=True),
    RopeForm(pairs="interleaved"),
    RopeForm(pairs="interleaved", half_table=True),
]


@pytest.mark.parametrize("form", ROPES, ids=["neox", "half_width", "interleaved", "repeat"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim,width,heads", [(16, 16, (5, 1)), (24, 12, (4, 2)), (10, 10, (9, 3))])
def test_rope(form: RopeForm, dtype: torch.dtype, dim: int, width: int, heads: tuple[int, int]) -> None:
    tokens, batch = 7, 2
    q = Guarded(randn(batch, tokens, heads[0], dim, dtype=dtype, seed=1))
    k = Guarded(randn(batch, tokens, heads[1], dim, dtype=dtype, seed=2))
    # [B, H, T, D] views with the gaps of the guarded buffers in their strides
    q_view = q.rows.unflatten(0, (batch, tokens, heads[0])).transpose(1, 2)
    k_view = k.rows.unflatten(0, (batch, tokens, heads[1])).transpose(1, 2)
    entries = width // 2 if form.half_table and form.pairs == "halves" else width
    positions = torch.tensor([[0, 1, 2, 0, 1, 5, 900], [3, 4, 5, 6, 0, 1, 2]], device=DEVICE)
    angles = positions[..., None] * randn(entries, seed=3).abs()
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for backward in (False, True):
        outs = rope.rope(q_view, k_view, cos, sin, form, backward=backward)
        for x, out in zip((q_view, k_view), outs, strict=True):
            twin, truth = (
                plain.rope(x, cos, sin, form, backward=backward),
                _wide_rope(x, cos, sin, form, backward),
            )
            close_to_truth(out, twin, truth)
    q.check()
    k.check()


def _wide_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: RopeForm, backward: bool
) -> torch.Tensor:
    """Forward and its transpose (by autograd) in float64."""
    leaf = x.double().requires_grad_()
    width = cos.shape[-1] * (2 if form.half_table and form.pairs == "halves" else 1)
    turned, kept = leaf[..., :width], leaf[..., width:]
    pairs = turned.unflatten(-1, (2, width // 2) if form.pairs == "halves" else (width // 2, 2))
    axis = -2 if form.pairs == "halves" else -1
    x0, x1 = pairs.select(axis, 0), pairs.select(axis, 1)
    half = torch.arange(width // 2, device=x.device)
    if form.half_table:
        c0 = c1 = half
    elif form.pairs == "halves":
        c0, c1 = half, half + width // 2
    else:
        c0, c1 = 2 * half, 2 * half + 1
    c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
    y0, y1 = x0 * c[..., c0] - x1 * s[..., c0], x1 * c[..., c1] + x0 * s[..., c1]
    y = torch.cat((torch.stack((y0, y1), axis).flatten(-2), kept), dim=-1)
    if not backward:
        return y.detach()
    (gradient,) = torch.autograd.grad(y, leaf, x.double())
    return gradient


@pytest.mark.parametrize("softcap,scale", [(0.0, 1.0), (0.0, 0.25), (5.0, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(4, 63), (3, 507), (2, 9001)])
def test_cross_entropy(softcap: float, scale: float, dtype: torch.dtype, size: tuple[int, int]) -> None:
    logits = Guarded(randn(*size, dtype=dtype, scale=6))
    labels = torch.arange(size[0], device=DEVICE) * 17 % size[1]
    labels[1] = -100
    twin = logits.tensor.clone()
    loss, logsum = plain.cross_entropy_(twin, labels, softcap=softcap, scale=scale)
    leaf = logits.tensor.double().requires_grad_()
    z = leaf * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    truth = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    (gradient,) = torch.autograd.grad(truth.sum(), leaf)
    fast_loss, fast_logsum = cross_entropy.cross_entropy_(logits.tensor, labels, softcap=softcap, scale=scale)
    close_to_truth(fast_loss, loss, truth.detach())
    close_to_truth(fast_logsum, logsum, torch.logsumexp(z, -1).detach())
    close_to_truth(logits.tensor, twin, gradient)
    assert fast_loss[1] == 0 and (logits.tensor[1] == 0).all()
    logits.check()


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], device=DEVICE)
    loss, _ = cross_entropy.cross_entropy_(logits, torch.tensor([1, 2], device=DEVICE))
    torch.testing.assert_close(loss.cpu(), torch.tensor([6e4, 1.0986123]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count,block", [(128, 64), (4096 + 64, 64), (70, 10)])
def test_nf4(dtype: torch.dtype, count: int, block: int) -> None:
    packed = torch.randint(
        0, 256, (count // 2,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    packed = packed.to(DEVICE)
    absmax, table = randn(-(-count // block), seed=2).abs(), randn(16, seed=3)
    ours, twin = (torch.full((count,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    assert nf4.nf4_decode(packed, absmax, table, block, ours) is ours
    assert torch.equal(ours, plain.nf4_decode(packed, absmax, table, block, twin))


def test_absmax() -> None:
    codes = torch.randint(0, 256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(
        DEVICE
    )
    table, absmax = randn(256, seed=2), randn(4, seed=3).abs()
    fast, twin = (f(codes, table, absmax, 0.25, 256) for f in (nf4.absmax_decode, plain.absmax_decode))
    # the compiler may fuse the product and the sum: one rounding fewer
    torch.testing.assert_close(fast, twin, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,columns,rank", [(1, 63, 4), (65, 130, 16), (3, 507, 33)])
def test_lora_add(dtype: torch.dtype, rows: int, columns: int, rank: int) -> None:
    y, xa = Guarded(randn(rows, columns, dtype=dtype)), Guarded(randn(rows, rank, dtype=dtype, seed=1))
    b = Guarded(randn(columns, rank, dtype=dtype, seed=2))
    truth = y.tensor.double() + 0.7 * xa.tensor.double() @ b.tensor.double().T
    twin = y.tensor.clone()
    plain.lora_add_(twin, xa.tensor, b.tensor, 0.7)
    lora.lora_add_(y.tensor, xa.tensor, b.tensor, 0.7)
    close_to_truth(y.tensor, twin, truth)
    for guarded in (y, xa, b):
        guarded.check()


def test_round_bf16_is_exact() -> None:
    edges = torch.tensor(
        [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -1.00390625, 3.4e38, -3.4e38, float("inf"), -float("inf"),
         float("nan"), 1e-40, -1e-45, 65504.0]
    )  # fmt: skip
    x = torch.cat((edges, randn(5000, scale=1e3).cpu(), randn(977, scale=1e-30).cpu())).to(DEVICE)
    fast, twin = bf16.round_bf16(x), plain.round_bf16(x)
    assert torch.equal(fast.isnan(), twin.isnan())
    kept = ~twin.isnan()
    assert torch.equal(fast[kept].view(torch.int16), twin[kept].view(torch.int16))
