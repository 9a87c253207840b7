"""Rotary embedding of queries and keys in one launch, any pairing, any position ids."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pronghorn.ops.shapes import RopeForm
from pronghorn.ops.triton.launch import launch


@triton.jit
def _turn(
    x_ptr, y_ptr, head0, heads, base, head_stride, out_base, out_head_stride, cos0, sin0, cos1, sin1,
    width, dim,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, DIM: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, PAIRS)
    head = head0 + tl.arange(0, HEADS)
    p0 = pair if HALVES else pair + pair
    p1 = pair + width // 2 if HALVES else pair + pair + 1
    inside = (head < heads)[:, None] & (pair < width // 2)[None, :]
    source = x_ptr + base + head[:, None] * head_stride
    target = y_ptr + out_base + head[:, None] * out_head_stride
    x0 = tl.load(source + p0[None, :], mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(source + p1[None, :], mask=inside, other=0.0).to(tl.float32)
    y0 = x0 * cos0[None, :] - x1 * sin0[None, :]
    y1 = x1 * cos1[None, :] + x0 * sin1[None, :]
    tl.store(target + p0[None, :], y0.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(target + p1[None, :], y1.to(y_ptr.dtype.element_ty), mask=inside)
    if DIM > 2 * PAIRS or width < dim:  # what does not turn passes through
        rest = tl.arange(0, DIM)
        passing = (head < heads)[:, None] & ((rest >= width) & (rest < dim))[None, :]
        tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=passing), mask=passing)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, tokens, q_heads, k_heads, width, dim,
    q_batch, q_head, q_token, k_batch, k_head, k_token, table_batch, table_token,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, DIM: tl.constexpr,
    HALVES: tl.constexpr, HALF_TABLE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """``rope`` of one token and one block of heads, of q or of k."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    inside = pair < width // 2
    p0 = pair if HALVES else pair + pair
    p1 = pair + width // 2 if HALVES else pair + pair + 1
    table = batch * table_batch + token * table_token
    cos0 = tl.load(cos_ptr + table + (pair if HALF_TABLE else p0), mask=inside, other=0.0).to(tl.float32)
    sin0 = tl.load(sin_ptr + table + (pair if HALF_TABLE else p0), mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cos_ptr + table + (pair if HALF_TABLE else p1), mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + table + (pair if HALF_TABLE else p1), mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:  # the transpose of each pair's 2x2 matrix
        swap = sin0
        sin0 = -sin1
        sin1 = -swap
    q_blocks = tl.cdiv(q_heads, HEADS)
    block = tl.program_id(1).to(tl.int64)
    # outputs are [batch, token, head, dim] in memory
    if block < q_blocks:
        _turn(
            q_ptr, q_out_ptr, block * HEADS, q_heads, batch * q_batch + token * q_token, q_head,
            (batch * tokens + token) * q_heads * dim, dim, cos0, sin0, cos1, sin1, width, dim,
            HEADS, PAIRS, DIM, HALVES,
        )  # fmt: skip
    else:
        _turn(
            k_ptr, k_out_ptr, (block - q_blocks) * HEADS, k_heads, batch * k_batch + token * k_token, k_head,
            (batch * tokens + token) * k_heads * dim, dim, cos0, sin0, cos1, sin1, width, dim,
            HEADS, PAIRS, DIM, HALVES,
        )  # fmt: skip


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, form: RopeForm, *, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """``plain.rope`` of ``q [B, Hq, T, D]`` and ``k [B, Hk, T, D]`` at once; last dimensions contiguous."""
    batch, q_heads, tokens, dim = q.shape
    k_heads = k.shape[1]
    width = cos.shape[-1] * 2 if form.half_table and form.pairs == "halves" else cos.shape[-1]
    q_out = torch.empty((batch, tokens, q_heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)
    k_out = torch.empty((batch, tokens, k_heads, dim), dtype=k.dtype, device=k.device).transpose(1, 2)
    how = launch("rope", q.device)
    heads = how.block[0]
    grid = (batch * tokens, triton.cdiv(q_heads, heads) + triton.cdiv(k_heads, heads))
    rope_kernel[grid](
        q, k, q_out, k_out, cos, sin, tokens, q_heads, k_heads, width, dim,
        q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1),
        HEADS=heads, PAIRS=triton.next_power_of_2(width // 2), DIM=triton.next_power_of_2(dim),
        HALVES=form.pairs == "halves", HALF_TABLE=form.half_table, BACKWARD=backward, **how.options,
    )  # fmt: skip
    return q_out, k_out
