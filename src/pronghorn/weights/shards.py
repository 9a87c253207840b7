"""One safetensors file: its header, checked before anything believes it.

The format: 8 bytes of little-endian header length, a JSON header, the tensors without holes or overlaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from pronghorn.errors import SourceError

# 25 MB hold about 200,000 tensors; more is an attack or a broken file (the library's own cap is 100 MB)
MAX_HEADER_BYTES = 25 * 10**6
LENGTH_BYTES = 8

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8,
        "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
        "I32": 32, "U32": 32, "F32": 32,
        "I64": 64, "U64": 64, "F64": 64, "C64": 64,
        "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    }
)  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in its file: ``start`` and ``end`` are byte offsets in the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


@dataclass(frozen=True)
class Shard:
    """A safetensors file: ``prefix`` is all before the tensors, verbatim; ``size`` the bytes of the file.

    ``prefix`` is empty in a view, whose ``tensors`` are not those that the header lists.
    """

    path: Path
    prefix: bytes
    tensors: Mapping[str, TensorEntry]
    size: int
    metadata: Mapping[str, str]


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        SourceError: missing or truncated file, or a header too long, malformed, overlapping or with holes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = _read_prefix(path, file.read(LENGTH_BYTES), size, file)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", fix="restore the file") from error
    header = _parse(path, prefix[LENGTH_BYTES:])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _broken(path, "its __metadata__ is not a map of strings")
    entries = sorted((_entry(path, name, raw, len(prefix)) for name, raw in header.items()), key=_position)
    _check_cover(path, entries, len(prefix), size)
    tensors = MappingProxyType({entry.name: entry for entry in entries})
    return Shard(path=path, prefix=prefix, tensors=tensors, size=size, metadata=MappingProxyType(metadata))


def _broken(path: Path, reason: str) -> NoReturn:
    raise SourceError(
        f"{path} is not a whole safetensors file: {reason}",
        fix="download or copy the file again, and compare its size",
    )


def _read_prefix(path: Path, first: bytes, size: int, file: Any) -> bytes:
    if len(first) < LENGTH_BYTES:
        _broken(path, f"it has only {size} bytes")
    (length,) = struct.unpack("<Q", first)
    if length > MAX_HEADER_BYTES:
        _broken(path, f"its header claims {length} bytes, more than the cap of {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > size:
        _broken(path, f"its header claims {length} bytes, but the file ends after {size}")
    rest: bytes = file.read(length)
    return first + rest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _broken(path, f"its header is not JSON with unique names ({error})")
    if not isinstance(header, dict):
        _broken(path, "its header is not a JSON object")
    return header


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, raw: Any, data_start: int) -> TensorEntry:
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        _broken(path, f"the entry of {name} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _broken(path, f"{name} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        _broken(path, f"{name} has the shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        _broken(path, f"{name} has the offsets {offsets!r}")
    if (offsets[1] - offsets[0]) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        _broken(path, f"{name} is {dtype} {shape} but takes {offsets[1] - offsets[0]} bytes")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _position(entry: TensorEntry) -> tuple[int, int]:
    return entry.start, entry.end


def _check_cover(path: Path, entries: list[TensorEntry], data_start: int, size: int) -> None:
    at = data_start
    for entry in entries:
        if entry.start != at:
            kind = "overlaps the tensor before it" if entry.start < at else "leaves a hole before it"
            _broken(path, f"{entry.name} {kind}")
        at = entry.end
    if at != size:
        _broken(path, f"its header describes {at} bytes, the file has {size}")
