"""The arithmetic of the merge, against the same formula written out whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pronghorn.adapters.files import LoraPair
from pronghorn.adapters.merge import FactorCache, Update, merge_rows, tiles
from pronghorn.weights.shards import read_shard


def make(folder: Path, **tensors: torch.Tensor) -> FactorCache:
    save_file(tensors, folder / "x.safetensors")
    return FactorCache(read_shard(folder / "x.safetensors"))


def pair(cache: FactorCache, rank: int, scaling: float, **options: Any) -> LoraPair:
    entries = cache.shard.tensors
    return LoraPair("w", entries["a"], entries["b"], rank, scaling, **options)


def whole(update: Update, cache: FactorCache, rows: int, columns: int) -> torch.Tensor:
    # a copy of each: the next call may use its memory again
    return torch.cat([update.delta(cache, *tile, columns).clone() for tile in tiles(rows, columns)])


SHAPES = [
    (63, 507, 16),
    (1031, 512, 16),
    (4096, 333, 64),
    (17, 40_000, 8),
    (2000, 2048, 3),
    (1, 64, 4),
    (16, 8, 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scaling", [2.0, 1 / math.sqrt(7)])
def test_tiles_have_the_bits_of_the_whole_product(
    shape: tuple[int, int, int], scaling: float, tmp_path: Path
) -> None:
    rows, columns, rank = shape
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    cache = make(tmp_path, a=a, b=b)
    plain = whole(Update(pair(cache, rank, scaling)), cache, rows, columns)
    assert torch.equal(plain, (b @ a) * scaling)
    turned = whole(Update(pair(cache, rank, scaling), transposed=True), cache, columns, rows)
    assert torch.equal(turned, ((b @ a) * scaling).T)


@pytest.mark.parametrize(
    "shape", [*((rows, columns) for rows, columns, _ in SHAPES), (0, 5), (33, 2**18), (10**6, 1)]
)
def test_tiles_cover_every_row_once_and_none_is_short(shape: tuple[int, int]) -> None:
    rows, columns = shape
    pieces = tiles(rows, columns)
    assert [row for first, last in pieces for row in range(first, last)] == list(range(rows))
    assert all(last - first >= min(16, rows) for first, last in pieces)


@pytest.mark.parametrize("swapped", [False, True])
def test_stacked_experts_follow_peft_s_einsum(swapped: bool, tmp_path: Path) -> None:
    experts, rank, inputs, outputs, generator = 5, 3, 24, 40, torch.Generator().manual_seed(0)
    a = torch.randn(rank * experts, inputs, generator=generator)
    b = torch.randn(outputs, rank * experts, generator=generator)
    cache = make(tmp_path, a=a, b=b)
    form = "o r e, e r i -> e i o" if swapped else "o r e, e r i -> e o i"
    expected = torch.einsum(form, b.reshape(outputs, rank, experts), a.reshape(experts, rank, inputs)) * 0.7
    both = pair(cache, rank, 0.7, stacked=True)
    rows, columns = expected.shape[1:]
    fused = Update(both, transposed=swapped, experts=experts).delta(cache, 0, experts * rows, columns)
    assert torch.allclose(fused.view_as(expected), expected, rtol=1e-6, atol=1e-7)
    across = Update(both, transposed=swapped, experts=experts).delta(cache, rows - 2, rows + 3, columns)
    assert torch.allclose(across, expected.reshape(-1, columns)[rows - 2 : rows + 3], rtol=1e-6, atol=1e-7)
    part = Update(both, transposed=swapped, experts=experts, expert=3, offset=8).delta(cache, 2, 10, columns)
    assert torch.allclose(part, expected[3, 10:18], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rounding(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    delta = 1e-3 * torch.randn(50, 60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        merge_rows(weight, delta.clone()).to(dtype), (weight.double() + delta.double()).float().to(dtype)
    )


def test_dora_rows_get_their_magnitude() -> None:
    weight, delta = torch.randn(20, 30), torch.randn(20, 30)
    magnitude = torch.rand(20) + 0.5
    merged = merge_rows(weight, delta.clone(), magnitude)
    assert torch.allclose(merged.norm(dim=1), magnitude)
    assert torch.allclose(
        merged / merged.norm(dim=1, keepdim=True), torch.nn.functional.normalize(weight + delta)
    )


def test_the_factor_cache_is_bounded(tmp_path: Path) -> None:
    cache = make(tmp_path, **{f"t{number}": torch.full((100,), float(number)) for number in range(8)})
    small = FactorCache(cache.shard, limit_bytes=1000)
    for number in [0, 1, 2, 3, 0, 7, 0]:
        assert float(small.get(cache.shard.tensors[f"t{number}"])[0]) == number
        assert len(small._held) <= 2
