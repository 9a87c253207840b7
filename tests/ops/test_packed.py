"""4-bit weights in products: each way to decode them, and the buffer that one decode is shared through."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pronghorn.errors import NotSupportedError
from pronghorn.ops import lora, mlp, reference, select
from pronghorn.ops.buffer import DecodeBuffer, PackedWeight
from pronghorn.ops.packed import Packed, decode
from pronghorn.ops.shapes import LoraPart
from pronghorn.quant import nf4
from pronghorn.quant.library import bitsandbytes
from tests.ops.measure import outputs_and_grads

WIDTH, INNER, RANK = 128, 192, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def packed(rows: int, width: int, seed: int = 0) -> Packed:
    return nf4.encode(randn(rows, width, seed=seed).bfloat16())


class Counted:
    """A decode that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, weight: Packed, out: Tensor) -> Tensor:
        self.calls += 1
        return decode(weight, out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 128), (5000, 192), (2, 64)])
def test_the_kernel_of_bitsandbytes_and_torch_decode_the_same_bits(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    bitsandbytes()
    weight = packed(*shape)
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert select.nf4_decode(weight, out, using="bitsandbytes") is out
    assert torch.equal(out, select.nf4_decode(weight, torch.empty_like(out), using="torch"))
    assert torch.equal(out, select.nf4_decode(weight, torch.empty_like(out)))


def test_rows_that_end_within_a_block_are_decoded_by_torch() -> None:
    bitsandbytes()
    weight, out = packed(64, 96), torch.empty(64, 96)
    with pytest.raises(NotSupportedError, match="does not take rows of 96, no multiple of the block 64"):
        select.nf4_decode(weight, out, using="bitsandbytes")
    assert torch.equal(select.nf4_decode(weight, out), decode(weight, torch.empty(64, 96)))


def parts(
    buffer: DecodeBuffer | None, outs: list[int], width: int, flat: tuple[Tensor, ...]
) -> list[LoraPart]:
    """Packed weights in a buffer, or (without one) what they decode to; ``flat``: bias, a, b of each."""
    made, offset = [], 0
    for index, out in enumerate(outs):
        bias, a, b = flat[3 * index : 3 * index + 3]
        weight = packed(out, width, seed=index)
        held = (
            decode(weight, torch.empty(out, width, dtype=a.dtype))
            if buffer is None
            else PackedWeight(weight, buffer, offset)
        )
        made.append(LoraPart(held, bias, a, b, 0.5))
        offset += out * width
    return made


def trained(outs: list[int], width: int, dtype: torch.dtype) -> list[Tensor]:
    made = []
    for index, out in enumerate(outs):
        made += [randn(out, seed=20 + index), randn(RANK, width, seed=30 + index), randn(out, RANK, seed=40)]
    return [tensor.to(dtype).requires_grad_() for tensor in made]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_give_the_bits_of_their_decoded_weights(dtype: torch.dtype) -> None:
    outs = [192, 64, 64]
    buffer, counted = DecodeBuffer(sum(outs) * WIDTH, count := Counted()), count
    x = randn(2, 19, WIDTH, seed=9).to(dtype).requires_grad_()
    inputs = [x, *trained(outs, WIDTH, dtype)]
    seeds = [randn(2, 19, out, seed=out) for out in outs]
    run = lambda room: lambda x, *flat: lora.lora_linears(x, parts(room, outs, WIDTH, flat))  # noqa: E731
    ours, theirs = outputs_and_grads(run(buffer), inputs, seeds), outputs_and_grads(run(None), inputs, seeds)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counted.calls == 3


@pytest.mark.parametrize("tile", [None, 7])
def test_an_mlp_gives_the_bits_of_its_decoded_weights(tile: int | None) -> None:
    dtype = torch.bfloat16
    count = Counted()
    buffer = DecodeBuffer(3 * WIDTH * INNER, count)
    x = randn(2, 19, WIDTH, seed=9).to(dtype).requires_grad_()
    first = trained([INNER, INNER], WIDTH, dtype)
    inputs = [x, *first, *trained([WIDTH], INNER, dtype)]

    def run(room: DecodeBuffer | None, x: Tensor, *flat: Tensor) -> Tensor:
        early, late = parts(room, [INNER, INNER], WIDTH, flat[:6]), parts(room, [WIDTH], INNER, flat[6:])
        if room is not None:
            assert isinstance(late[0].weight, PackedWeight)
            late = [late[0]._replace(weight=PackedWeight(late[0].weight.packed, room, 2 * WIDTH * INNER))]
        if tile is None:
            return mlp.mlp(x, early, late[0], "gated", "silu")
        return mlp.tiled_mlp(x, early, late[0], "gated", "silu", tile)

    seeds = [randn(2, 19, WIDTH, seed=3)]
    ours = outputs_and_grads(partial(run, buffer), inputs, seeds)
    theirs = outputs_and_grads(partial(run, None), inputs, seeds)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert count.calls == 3  # forward and backward of every tile, from one decode each


def test_layers_share_the_buffer_and_recompute_shares_the_decode() -> None:
    count = Counted()
    buffer = DecodeBuffer(WIDTH * WIDTH, count)
    weights = [packed(WIDTH, WIDTH, seed=index) for index in range(3)]
    a, b = (randn(RANK, WIDTH, seed=5).requires_grad_(), randn(WIDTH, RANK, seed=6).requires_grad_())

    def layer(weight: Packed, x: Tensor) -> Tensor:
        (y,) = lora.lora_linears(x, [LoraPart(PackedWeight(weight, buffer, 0), None, a, b, 1.0)])
        return y.tanh()

    x = y = randn(5, WIDTH, seed=1).requires_grad_()
    for weight in weights:
        y = checkpoint(layer, weight, y, use_reentrant=False)
    y.sum().backward()
    assert count.calls == 5  # the last layer's is still there
    (room,) = buffer.rooms.values()
    assert room.memory.numel() == WIDTH * WIDTH
    ours, truth = x.grad, x.detach().clone().requires_grad_()
    y = truth
    for weight in weights:
        part = LoraPart(decode(weight, torch.empty(WIDTH, WIDTH)), None, a, b, 1.0)
        y = reference.lora_linears(y, [part])[0].tanh()
    y.sum().backward()
    assert truth.grad is not None and ours is not None
    torch.testing.assert_close(ours, truth.grad)


def test_changed_codes_are_decoded_again_and_stop_a_backward() -> None:
    count = Counted()
    buffer = DecodeBuffer(WIDTH * WIDTH, count)
    held = PackedWeight(packed(WIDTH, WIDTH), buffer, 0)
    part = LoraPart(held, None, None, None, 1.0)
    x = randn(3, WIDTH, seed=2).requires_grad_()
    before = lora.lora_linears(x, [part])[0]
    with torch.no_grad():
        held.packed.data.fill_(0x77)  # level 7 is zero
    assert not lora.lora_linears(x, [part])[0].any()
    assert count.calls == 2
    with pytest.raises(RuntimeError, match="modified in place"):
        before.sum().backward()


def test_a_copy_starts_empty_and_another_dtype_is_decoded_anew() -> None:
    count = Counted()
    buffer = DecodeBuffer(WIDTH * WIDTH, count)
    weight = packed(WIDTH, WIDTH)
    narrow = buffer.get(weight, 0, torch.bfloat16).clone()
    wide = buffer.get(weight, 0, torch.float32)
    assert count.calls == 2 and torch.equal(wide.bfloat16(), narrow)
    assert copy.deepcopy(buffer).rooms == {}
