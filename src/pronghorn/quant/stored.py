"""What a folder says about its own quantisation, and 4-bit weights read out of its files.

The content decides: config.json's quantization_config (nested ones too) and the tensors in the files must
tell the same story, whatever the folder is called.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from pronghorn.errors import SourceError
from pronghorn.ops.packed import NESTED_BLOCK, Scales, decode_span
from pronghorn.quant import nf4
from pronghorn.sources.bounds import CONFIG_KEY, quantization_of
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.reader import TORCH_DTYPES, read_rows, read_tensor
from pronghorn.weights.shards import Shard, TensorEntry

_FIX = "download or copy the 4-bit model again, or use the 16-bit one"
# block sizes that bitsandbytes has kernels for
_BLOCKS = frozenset({32, 64, 128, 256, 512, 1024, 2048, 4096})
_FLOATS = frozenset({"F16", "BF16", "F32"})
_PART_DTYPES = {
    nf4.ABSMAX: ("U8", "F32"),
    nf4.CODE: ("F32",),
    nf4.NESTED_ABSMAX: ("F32",),
    nf4.NESTED_CODE: ("F32",),
}


@dataclass(frozen=True)
class StoredNF4:
    """One 4-bit weight in the files: ``shape`` and ``dtype`` (as in safetensors) are the decoded ones."""

    shard: Shard
    entry: TensorEntry
    parts: Mapping[str, tuple[Shard, TensorEntry]]
    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int
    offset: float
    _scales: list[Scales] = field(default_factory=list, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def scales(self) -> Scales:
        """The block magnitudes, read once; safe for threads."""
        with self._lock:
            if not self._scales:
                self._scales.append(self._read_scales())
            return self._scales[0]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` of the weight as a matrix, decoded, in its dtype."""
        width = self.shape[-1]
        begin, end = first * width, last * width
        low, high = (
            begin // self.block * self.block,
            min(prod(self.shape), -(-end // self.block) * self.block),
        )
        flat = replace(self.entry, shape=(self.entry.nbytes,), dtype="U8")
        codes = read_rows(self.shard, flat, low // 2, (high + 1) // 2)
        values = decode_span(codes, self.scales(), begin, end)
        return values.view(last - first, width).to(TORCH_DTYPES[self.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.entry.nbytes + sum(entry.nbytes for _, entry in self.parts.values())

    def _read_scales(self) -> Scales:
        codes = read_tensor(*self.parts[nf4.ABSMAX])
        if nf4.NESTED_ABSMAX not in self.parts:
            return Scales(codes, None, 0.0, self.block)
        nested, code = read_tensor(*self.parts[nf4.NESTED_ABSMAX]), read_tensor(*self.parts[nf4.NESTED_CODE])
        return Scales(codes, nested, self.offset, self.block, self.nested_block, code)


@dataclass(frozen=True)
class EncodedNF4:
    """A 16-bit weight in the files as it is once quantised on the way in: encoded and decoded again.

    ``dtype`` is the dtype (a torch dtype) that the model was loaded in.
    """

    shard: Shard
    entry: TensorEntry
    dtype: torch.dtype
    _scales: list[Scales] = field(default_factory=list, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows ``first`` to ``last`` as trained on, in the model's dtype."""
        width, elements = self.entry.shape[-1], prod(self.entry.shape)
        values = nf4.requantised(self._span, elements, self.scales(), first * width, last * width)
        return values.view(last - first, width).to(self.dtype)

    def scales(self) -> Scales:
        """The block magnitudes, worked out once; safe for threads."""
        with self._lock:
            if not self._scales:
                self._scales.append(nf4.scales_of(self._span, prod(self.entry.shape)))
            return self._scales[0]

    @property
    def finite(self) -> bool:
        """Whether the weight holds neither NaN nor infinity; others are not encoded."""
        return math.isfinite(self.scales().offset)  # the mean of all magnitudes

    def pieces(self) -> Iterator[torch.Tensor]:
        """Its tensors as bitsandbytes stores them, in the order of ``nf4.blank_tensors``; codes in pieces."""
        yield from nf4.codes_of(self._span, prod(self.entry.shape))
        yield from nf4.companions(self.scales(), self.entry.shape, self.dtype, self.entry.name).values()

    def _span(self, first: int, last: int) -> torch.Tensor:
        flat = replace(self.entry, shape=(prod(self.entry.shape),))
        return read_rows(self.shard, flat, first, last).to(self.dtype)


def stored_4bit(config: Mapping[str, Any], weights: WeightFolder) -> Mapping[str, StoredNF4]:
    """Every 4-bit weight of a folder by the name of its tensor; empty for a 16-bit folder. Reads no values.

    Raises:
        SourceError: config.json and the files contradict each other, a part of a weight is missing, or its
            sizes do not fit; the message names the tensor.
    """
    claimed = quantization_of(config)
    names = sorted(set(_owners(weights)))
    if claimed is None and names:
        raise SourceError(
            f"{weights.path}: {names[0]} is stored in 4-bit, but config.json has no {CONFIG_KEY}",
            fix="restore the config.json that belongs to these weights",
        )
    if claimed is not None and not names:
        raise SourceError(
            f"{weights.path}: config.json says the weights are quantised, but no tensor in the files is",
            fix=f"remove {CONFIG_KEY} from config.json if these are the 16-bit weights",
        )
    return {name: _stored(weights, name) for name in names}


def _owners(weights: WeightFolder) -> Iterator[str]:
    """Names of weights that have a companion of the 4-bit layout, or are packed bytes without any."""
    for name, (_, entry) in weights.tensors.items():
        for part in (
            nf4.ABSMAX,
            nf4.NESTED_ABSMAX,
            nf4.NESTED_CODE,
            nf4.CODE,
            ".quant_state.bitsandbytes__fp4",
            nf4.STATE,
        ):
            if name.endswith(part):
                yield name.removesuffix(part)
        if entry.dtype == "U8" and name.endswith(".weight") and len(entry.shape) == 2 and entry.shape[1] == 1:
            yield name


def _stored(weights: WeightFolder, name: str) -> StoredNF4:
    if name not in weights.tensors:
        raise SourceError(f"{weights.path}: the 4-bit weight {name} itself is missing", fix=_FIX)
    parts = {part: weights.tensors[name + part] for part in nf4.PARTS if name + part in weights.tensors}
    for part in (nf4.ABSMAX, nf4.CODE, nf4.STATE):
        if part not in parts:
            raise SourceError(
                f"{weights.path}: {name} is stored in 4-bit, but {name}{part} is missing", fix=_FIX
            )
    shard, entry = weights.tensors[name]
    state = _state(weights, name, parts)
    nested = "nested_blocksize" in state
    for part in (nf4.NESTED_ABSMAX, nf4.NESTED_CODE):
        if nested != (part in parts):
            raise SourceError(
                f"{weights.path}: {name}{part} is {'missing' if nested else 'there'}, but its "
                f"quant_state says {'double' if nested else 'single'} quantisation",
                fix=_FIX,
            )
    found = StoredNF4(
        shard,
        entry,
        parts,
        tuple(state["shape"]),
        state["dtype"],
        state["blocksize"],
        state.get("nested_blocksize", NESTED_BLOCK),
        float(state.get("nested_offset", 0.0)),
    )
    _check_sizes(weights, name, found)
    return found


def _state(
    weights: WeightFolder, name: str, parts: Mapping[str, tuple[Shard, TensorEntry]]
) -> dict[str, Any]:
    shard, entry = parts[nf4.STATE]
    try:
        state = dict(nf4.parse_state(read_tensor(shard, replace(entry, dtype="U8")).numpy().tobytes()))
        names = {
            str(dtype).removeprefix("torch."): name for name, dtype in TORCH_DTYPES.items() if name in _FLOATS
        }
        state["dtype"] = names[str(state["dtype"])]
        shape: Any = state["shape"]
        sizes = [state["blocksize"], state.get("nested_blocksize", 1), *shape]
        right = state["blocksize"] in _BLOCKS and state.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
        if (
            state["quant_type"] != "nf4"
            or not right
            or not all(isinstance(one, int) and one > 0 for one in sizes)
        ):
            raise ValueError(f"quant_type {state['quant_type']!r}, sizes {sizes}")
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{weights.path}: {name}{nf4.STATE} does not describe an NF4 weight: {error!r}", fix=_FIX
        ) from error
    return state


def _check_sizes(weights: WeightFolder, name: str, found: StoredNF4) -> None:
    elements = prod(found.shape)
    blocks = -(-elements // found.block)
    wanted = {"": (elements + 1) // 2, nf4.ABSMAX: blocks, nf4.CODE: 16}
    if nf4.NESTED_ABSMAX in found.parts:
        wanted |= {nf4.NESTED_ABSMAX: -(-blocks // found.nested_block), nf4.NESTED_CODE: 256}
    for part, count in wanted.items():
        entry = found.parts[part][1] if part else found.entry
        held = entry.nbytes if not part else prod(entry.shape)
        if held != count:
            raise SourceError(
                f"{weights.path}: {name}{part} holds {held} values, but {list(found.shape)} in blocks "
                f"of {found.block} needs {count}: its block size or shape is another one",
                fix=_FIX,
            )
        if part and entry.dtype not in _PART_DTYPES[part]:
            raise SourceError(
                f"{weights.path}: {name}{part} is {entry.dtype}, not {' or '.join(_PART_DTYPES[part])}",
                fix=_FIX,
            )
