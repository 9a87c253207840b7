"""Where every tensor of the merged model will lie: the base's shards again, header bytes and all."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from pronghorn.export.codes import Coded
from pronghorn.export.plan import Change, MergePlan
from pronghorn.weights.reader import TORCH_DTYPES
from pronghorn.weights.shards import LENGTH_BYTES, Shard, TensorEntry


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: ``entry`` says where; ``base`` where the base has it (None for a new one).

    With ``coded``, ``entry`` is for the codes, and ``coded`` says where the rest goes.
    """

    entry: TensorEntry
    base: tuple[Shard, TensorEntry]
    change: Change | None
    coded: Coded | None = None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Everything that is written for this tensor, in the file's order."""
        parts = (self.entry, self.coded.scale, self.coded.once) if self.coded else (self.entry,)
        return tuple(part for part in parts if part is not None)


@dataclass(frozen=True)
class OutputShard:
    """A file to write: ``prefix`` is everything before its tensors."""

    name: str
    prefix: bytes
    tensors: tuple[OutputTensor, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.tensors[-1].entries[-1].end if self.tensors else len(self.prefix)


def lay_out(plan: MergePlan) -> tuple[OutputShard, ...]:
    """The files of the merged model, in the base's order; headers are the base's where no shape changes."""
    shards = tuple(_shard(plan, shard) for shard in plan.weights.shards)
    read = zip(shards, plan.weights.shards, strict=True)
    kept = [shard for shard, source in read if shard.tensors or source.prefix]  # else a view of nothing
    if len(kept) == len(shards):
        return shards
    return tuple(
        replace(shard, name=f"model-{number:05}-of-{len(kept):05}.safetensors")
        for number, shard in enumerate(kept, start=1)
    )


def _shard(plan: MergePlan, shard: Shard) -> OutputShard:
    tensors = [
        OutputTensor(entry, (shard, entry), plan.changes.get(entry.name)) for entry in shard.tensors.values()
    ]
    tied = plan.untied
    if tied and tied.embedding_file in shard.tensors and tied.head_file not in plan.weights.tensors:
        base = shard.tensors[tied.embedding_file]
        new = replace(base, name=tied.head_file)
        tensors.append(OutputTensor(new, (shard, base), plan.changes[tied.head_file]))
    shapes = [one.change.shape if one.change else one.entry.shape for one in tensors]
    if shard.prefix and shapes == [entry.shape for entry in shard.tensors.values()]:
        return OutputShard(shard.path.name, shard.prefix, tuple(tensors))
    sized = [replace(one.entry, shape=shape) for one, shape in zip(tensors, shapes, strict=True)]
    prefix, entries = write_header(shard.metadata, sized)
    moved = tuple(replace(one, entry=entry) for one, entry in zip(tensors, entries, strict=True))
    return OutputShard(shard.path.name, prefix, moved)


def write_header(
    metadata: Mapping[str, str], entries: list[TensorEntry]
) -> tuple[bytes, tuple[TensorEntry, ...]]:
    """A header for tensors in the given order, padded to 8 bytes as the format wants; their new places."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    placed = []
    for entry in entries:
        size = (
            prod(entry.shape) * TORCH_DTYPES[entry.dtype].itemsize
            if entry.dtype in TORCH_DTYPES
            else entry.nbytes
        )
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + size],
        }
        placed.append(replace(entry, start=at, end=at + size))
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    prefix = struct.pack("<Q", len(text)) + text
    return prefix, tuple(
        replace(one, start=one.start + len(prefix), end=one.end + len(prefix)) for one in placed
    )
