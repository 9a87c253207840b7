"""Offsets beyond 31 bits: rows so far apart in one buffer that a 32-bit product would wrap.

The buffer is address space, of which only the touched pages become memory. That flat kernels widen their
program's number, too, is checked on the compiled code by the gate: no 32-bit product is in it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest
import torch

from pronghorn.ops.shapes import NormForm, RopeForm
from pronghorn.ops.triton import cross_entropy, gated, lora, norm, plain, rope
from tests.ops.triton.canary import DEVICE, randn

STRIDE = 2**30 + 64  # elements: row 2 begins behind 2^31
WIDTH = 40
FORM = NormForm(eps=1e-6)


@pytest.fixture(scope="module")
def space() -> Iterator[torch.Tensor]:
    """2 * STRIDE float16 elements and a little more: 4 GiB of addresses."""
    count = 2 * STRIDE + 4096
    if DEVICE.type == "cuda":
        yield torch.empty(count, dtype=torch.float16, device=DEVICE)
        return
    pages = mmap.mmap(-1, 2 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield torch.frombuffer(pages, dtype=torch.float16)


def far(space: torch.Tensor, near: torch.Tensor, start: int = 0) -> torch.Tensor:
    """The three rows of ``near`` in ``space``, 2^30 elements apart."""
    rows = space.as_strided((3, near.shape[1]), (STRIDE, 1), start)
    rows.copy_(near)
    return rows


def three(seed: int) -> torch.Tensor:
    return randn(3, WIDTH, dtype=torch.float16, seed=seed)


def test_norm(space: torch.Tensor) -> None:
    x, dy, w = three(1), three(2), randn(WIDTH, dtype=torch.float16, seed=3)
    y, root = norm.norm_forward(far(space, x), w, None, FORM)
    assert torch.equal(y, norm.norm_forward(x, w, None, FORM)[0])
    dx = norm.norm_backward(far(space, dy, 100), far(space, x), root, w, FORM)
    assert torch.equal(dx, norm.norm_backward(dy, x, root, w, FORM))


def test_gated(space: torch.Tensor) -> None:
    dh, gate, up = (three(seed) for seed in (1, 2, 3))
    far_dh, far_gate, far_up = (far(space, t, at) for t, at in ((dh, 0), (gate, 100), (up, 200)))
    assert torch.equal(gated.gated_forward(far_gate, far_up, "silu"), gated.gated_forward(gate, up, "silu"))
    gated.gated_backward(far_dh, far_gate, far_up, far_gate, far_up, "silu")
    gated.gated_backward(dh, gate, up, gate, up, "silu")
    assert torch.equal(far_gate, gate) and torch.equal(far_up, up)


def test_cross_entropy(space: torch.Tensor) -> None:
    logits = three(1)
    distant, labels = far(space, logits), torch.tensor([3, -100, 39], device=DEVICE)
    assert torch.equal(
        cross_entropy.cross_entropy_(distant, labels)[0], cross_entropy.cross_entropy_(logits, labels)[0]
    )
    assert torch.equal(distant, logits)


def test_lora_add(space: torch.Tensor) -> None:
    y, xa, b = three(1), three(2)[:, :16].contiguous(), three(3)[:, :16].contiguous()
    b = torch.cat([b] * 14)[:WIDTH]
    distant = far(space, y)
    lora.lora_add_(distant, far(space, xa, 100), b, 0.5)
    plain.lora_add_(y, xa, b, 0.5)
    torch.testing.assert_close(distant, y)


def test_rope(space: torch.Tensor) -> None:
    q = three(1).view(1, 3, 1, WIDTH).transpose(1, 2)  # [B, H, T, D]
    cos, sin = (randn(1, 3, WIDTH, dtype=torch.float16, seed=seed) for seed in (2, 3))
    distant = far(space, three(1)).as_strided((1, 1, 3, WIDTH), (0, 0, STRIDE, 1))
    out = rope.rope(distant, distant, cos, sin, RopeForm())
    for made, near in zip(out, rope.rope(q, q, cos, sin, RopeForm()), strict=True):
        assert torch.equal(made, near)
