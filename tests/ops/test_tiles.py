"""The tiled forms: nothing grows with the number of tokens but the states themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pronghorn.ops import experts, mlp
from pronghorn.ops.experts import ExpertsForm
from pronghorn.ops.shapes import ExpertPart, LoraPart

HIDDEN, INNER, COUNT, RANK, TILE = 24, 160, 3, 4, 16


class Made(TorchDispatchMode):
    """Counts the tensors operations make, by (rows, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.dim() > 1:
                self.shapes[t.numel() // t.shape[-1], t.shape[-1]] += 1
        return out


def linear(inside: int, outside: int) -> LoraPart:
    a, b = torch.randn(RANK, inside).requires_grad_(), torch.randn(outside, RANK).requires_grad_()
    return LoraPart(torch.randn(outside, inside), None, a, b, 1.0)


def stack(inside: int, outside: int) -> ExpertPart:
    a = torch.randn(COUNT, RANK, inside).requires_grad_()
    b = torch.randn(COUNT, outside, RANK).requires_grad_()
    return ExpertPart(torch.randn(COUNT, inside, outside), None, a, b, 1.0)


def dense(x: Tensor) -> Tensor:
    first, down = [linear(HIDDEN, INNER), linear(HIDDEN, INNER)], linear(INNER, HIDDEN)
    return mlp.tiled_mlp(x, first, down, "gated", "silu", TILE)


def mixture(x: Tensor) -> Tensor:
    rows = x.reshape(-1, HIDDEN)
    index = torch.arange(rows.shape[0])[:, None] % COUNT
    weights = torch.ones(rows.shape[0], 1)
    first, down = stack(HIDDEN, 2 * INNER), stack(INNER, HIDDEN)
    return experts.experts(rows, index, weights, first, down, ExpertsForm("gate_up", "silu"), TILE)


@pytest.mark.parametrize("run", [dense, mixture])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 64), (8, 8), (1, 512), (64, 8)])
def test_wide_tensors_have_the_rows_of_a_tile(run: Any, batch: int, tokens: int) -> None:
    """Batch and sequence count together: many short rows are no more than a long one."""
    x = torch.randn(batch, tokens, HIDDEN).requires_grad_()
    with Made() as made:
        run(x).square().sum().backward()
    # the weights and the gradients of the adapters are as wide, and do not grow with the tokens
    mine = [(rows, width) for rows, width in made.shapes if rows > max(TILE, COUNT * 2 * INNER)]
    assert all(width <= HIDDEN for _, width in mine), mine
    inner = {rows for rows, width in made.shapes if width in (INNER, 2 * INNER)}
    assert max(inner) <= max(TILE, COUNT * HIDDEN), inner
    assert TILE in inner
