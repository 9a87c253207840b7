"""NF4 against bitsandbytes itself: same bytes, same decoded bits; and against its own definition."""

from __future__ import annotations

import importlib

import pytest
import torch

from pronghorn.ops.packed import BLOCK, decode, dynamic_code, levels
from pronghorn.quant import nf4
from pronghorn.quant.library import bitsandbytes

SHAPES = [(96, 64), (33, 128), (512, 192), (2, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    ours = nf4.encode(weight(shape, dtype))
    data, state = bitsandbytes().functional.quantize_4bit(
        weight(shape, dtype), compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(ours.data, data)
    assert torch.equal(dynamic_code(data.device), state.state2.code)
    assert torch.equal(levels(data.device), state.code)
    # its CPU search for the nearest 8-bit code is off by one at times; ours is the nearest
    steps = (ours.scales.codes.int() - state.absmax.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_equals_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = nf4.encode(weight(shape, dtype))
    tensors = {
        name.removeprefix("w."): one for name, one in nf4.stored_tensors(packed, "w").items() if name != "w"
    }
    functional = importlib.import_module("bitsandbytes.functional")
    state = functional.QuantState.from_dict(tensors, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(packed.data, state)
    assert theirs.dtype == dtype
    assert torch.equal(decode(packed), theirs)


@pytest.mark.parametrize("shape", [(64, 96), (7, 63), (5, 13), (1, 1)])
def test_widths_that_are_no_multiple_of_the_block(shape: tuple[int, int]) -> None:
    values = weight(shape)
    decoded = decode(nf4.encode(values))
    flat = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.abs().amax(1, keepdim=True).expand_as(flat).flatten()[: values.numel()]
    # half the widest gap between two levels, and what the 8-bit magnitudes add
    assert ((decoded - values).abs().flatten() <= 0.17 * largest).all()


def test_decode_fills_a_given_buffer() -> None:
    packed = nf4.encode(weight((33, 128), torch.bfloat16))
    buffer = torch.full((33, 128), torch.nan, dtype=torch.bfloat16)
    assert decode(packed, out=buffer) is buffer
    assert torch.equal(buffer, decode(packed))
    wide = torch.full((33, 128), torch.nan)
    assert torch.equal(decode(packed, out=wide).bfloat16(), buffer)
    with pytest.raises(ValueError, match="out is"):
        decode(packed, out=torch.empty(128, 33))


@pytest.mark.parametrize("shape", [(40, 128), (64, 96), (9, 63)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_equal_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = weight(shape, dtype)
    whole = decode(nf4.encode(values))
    monkeypatch.setattr(nf4, "_TILE_ELEMENTS", 256)
    assert torch.equal(decode(nf4.encode(values)), whole)
    flat, count = values.flatten(), values.numel()

    def span(first: int, last: int) -> torch.Tensor:
        return flat[first:last]

    scales = nf4.scales_of(span, count)
    for begin, end in ((0, count), (shape[1], 3 * shape[1]), (count - 5, count), (17, 18)):
        found = nf4.requantised(span, count, scales, begin, end)
        assert torch.equal(found.to(dtype), whole.flatten()[begin:end])


def test_the_table_of_cells_is_a_binary_search() -> None:
    bounds = nf4._bounds(torch.device("cpu"))
    near = torch.cat(
        [bounds, torch.nextafter(bounds, torch.tensor(2.0)), torch.nextafter(bounds, torch.tensor(-2.0))]
    )
    edges = torch.arange(-1, 1.0001, 2 / nf4._CELLS)
    values = torch.cat([near, edges, torch.rand(10**5) * 2 - 1, torch.tensor([-1.0, 1.0, 1.0000001])])
    assert torch.equal(nf4._nearest(values).int(), torch.bucketize(values, bounds, out_int32=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    values = weight((4, 64))
    values[2, 3] = bad
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        nf4.encode(values)


def test_zeros_stay_zeros() -> None:
    assert torch.equal(decode(nf4.encode(torch.zeros(4, 64))), torch.zeros(4, 64))


def test_the_input_is_left_as_it_was() -> None:
    values = weight((4, 64))
    before = values.clone()
    nf4.encode(values)
    assert torch.equal(values, before)


def test_state_must_be_an_object() -> None:
    with pytest.raises(ValueError, match="not an object"):
        nf4.parse_state(b"[1]")
