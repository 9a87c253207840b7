"""Tensors out of safetensors files, whole or some rows at a time, with plain positioned reads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from types import MappingProxyType

import torch

from pronghorn.errors import SourceError
from pronghorn.weights.scratch import Scratch
from pronghorn.weights.shards import Shard, TensorEntry

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
        "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
        "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }
)  # fmt: skip


def read_tensor(shard: Shard, entry: TensorEntry) -> torch.Tensor:
    """The whole tensor ``entry`` of ``shard``, in its stored dtype, in memory of its own."""
    return _read(shard, entry, entry.start, entry.shape)


def read_rows(
    shard: Shard, entry: TensorEntry, first: int, last: int, scratch: tuple[Scratch, str] | None = None
) -> torch.Tensor:
    """Rows ``first`` (included) to ``last`` (excluded) of a tensor with at least one dimension.

    Returns:
        A tensor ``[last - first, *entry.shape[1:]]`` in the stored dtype; its memory is its own, or that
        of the role which ``scratch`` names.
    """
    if not entry.shape or not 0 <= first <= last <= entry.shape[0]:
        raise ValueError(f"rows {first}:{last} of {entry.name} {entry.shape}")
    row_bytes = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
    return _read(shard, entry, entry.start + first * row_bytes, (last - first, *entry.shape[1:]), scratch)


def _read(
    shard: Shard,
    entry: TensorEntry,
    start: int,
    shape: tuple[int, ...],
    scratch: tuple[Scratch, str] | None = None,
) -> torch.Tensor:
    if entry.dtype not in TORCH_DTYPES:
        raise SourceError(f"{entry.name} in {shard.path} is {entry.dtype}, which cannot be read as a tensor")
    dtype = TORCH_DTYPES[entry.dtype]
    count = prod(shape) * dtype.itemsize
    if scratch is None:
        buffer = torch.empty(count, dtype=torch.uint8)
    else:
        buffer = scratch[0].take(scratch[1], (count,), torch.uint8)
    with shard.path.open("rb", buffering=0) as file:
        read_into(file.fileno(), start, buffer.numpy().data, shard)
    return buffer.view(dtype).reshape(shape)


def read_into(descriptor: int, start: int, buffer: memoryview, shard: Shard) -> None:
    """Fill ``buffer`` from byte ``start`` of an open file; SourceError where the file has become shorter."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            raise SourceError(
                f"{shard.path} became shorter while it was read", fix="restore the file and start again"
            )
        done += count


def read_columns(shard: Shard, entry: TensorEntry, first: int, last: int) -> torch.Tensor:
    """Columns ``first`` (included) to ``last`` (excluded) of a matrix, one positioned read per row.

    Returns:
        A tensor ``[entry.shape[0], last - first]`` in the stored dtype.
    """
    rows, columns = entry.shape
    if not 0 <= first <= last <= columns:
        raise ValueError(f"columns {first}:{last} of {entry.name} {entry.shape}")
    dtype = TORCH_DTYPES[entry.dtype]
    size = dtype.itemsize
    buffer = torch.empty(rows * (last - first) * size, dtype=torch.uint8)
    view, width = buffer.numpy().data, (last - first) * size
    with shard.path.open("rb", buffering=0) as file:
        for row in range(rows):
            start = entry.start + (row * columns + first) * size
            read_into(file.fileno(), start, view[row * width : (row + 1) * width], shard)
    return buffer.view(dtype).reshape(rows, last - first)
