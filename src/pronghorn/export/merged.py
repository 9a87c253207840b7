"""Write the weights of a merged model, file to file: untouched bytes copied by the kernel, the rest on tiles.

Two threads work on tiles and copies while a third puts finished files on the disk. Memory holds the tiles at
hand and some factors of the adapter, whatever the size of the model.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from pronghorn.adapters.merge import FactorCache, merge_rows, tiles
from pronghorn.errors import ExportError
from pronghorn.export.codes import Coded, encode, scale_divisor
from pronghorn.export.layout import OutputShard, OutputTensor
from pronghorn.export.plan import Change
from pronghorn.quant.stored import EncodedNF4
from pronghorn.weights.reader import TORCH_DTYPES, read_rows
from pronghorn.weights.scratch import Scratch
from pronghorn.weights.shards import Shard, TensorEntry
from pronghorn.weights.writer import copy_bytes, write_all

WORKERS = 2
# a unit of work: short enough that both threads finish together, long enough that starting it costs nothing
_JOB_TILES = 16
_COPY_BYTES = 32 * 2**20
_SYNC_JOBS = 16  # 128 MiB
_INTEGERS = MappingProxyType(
    {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
)

Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes in all."""


@dataclass
class TensorCount:
    """Elements of one merged tensor, and how many of them differ from the base's."""

    elements: int = 0
    changed: int = 0


@dataclass
class MergeCounts:
    """What writing found out, tensor by tensor."""

    tensors: dict[str, TensorCount] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, elements: int, changed: int) -> None:
        """Count a tile; called by both threads."""
        with self._lock:
            count = self.tensors.setdefault(name, TensorCount())
            count.elements += elements
            count.changed += changed


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tiles are too small to share: on a busy machine a team of threads waits 10 ms where one needs 0.1.

    The setting is put back last: that of ``_workers`` would become the default of new threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))


@_one_thread()
def write_shards(
    shards: tuple[OutputShard, ...],
    adapter: Shard,
    folder: Path,
    progress: Progress | None = None,
    finished: Callable[[Path], None] | None = None,
) -> MergeCounts:
    """Write the files laid out by ``lay_out`` into ``folder`` and put them on the disk.

    ``finished`` is told of each file once it is on the disk, by a thread of its own: the others go on.

    Raises:
        OSError: the disk is full or fails.
    """
    writer = _Writer(FactorCache(adapter), MergeCounts())
    total, done = sum(shard.size for shard in shards), sum(len(shard.prefix) for shard in shards)
    workers = _workers()
    syncer, teller = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    running: list[tuple[Path, int, list[Future[int]]]] = []
    syncs: list[Future[None]] = []
    try:
        for shard in shards:
            path = folder / shard.name
            target = _create(path, shard)
            running.append((path, target, [workers.submit(job, target) for job in writer.jobs(shard)]))
            # the next file is handed out before the last one is waited for: no thread is idle in between
            while len(running) > 1 or (running and shard is shards[-1]):
                path, descriptor, futures = running[0]
                for number, future in enumerate(futures, 1):
                    done += future.result()
                    if number % _SYNC_JOBS == 0:  # else the disk would start on a file only at its end
                        syncs.append(syncer.submit(os.fdatasync, descriptor))
                    if progress:
                        progress(done, total)
                running.pop(0)
                syncs.append(syncer.submit(_sync_and_close, descriptor))
                if finished:
                    syncs.append(teller.submit(_tell, finished, path, syncs[-1]))
        for sync in syncs:
            sync.result()
    finally:
        workers.shutdown(cancel_futures=True)
        syncer.shutdown()
        teller.shutdown(cancel_futures=True)
        for _, descriptor, _ in running:
            os.close(descriptor)
    return writer.counts


def with_divisors(shards: tuple[OutputShard, ...], adapter: Shard) -> tuple[OutputShard, ...]:
    """NVFP4's divisors, worked out from the merged weights: one for all weights of a parent module.

    Engines make one matrix of its children (q, k and v; gate and up) and take one divisor for it.
    """
    writer = _Writer(FactorCache(adapter), MergeCounts())
    jobs = [job for shard in shards for job in writer.jobs(shard) if isinstance(job, _Merge)]
    jobs = [job for job in jobs if job.tensor.coded]
    found: dict[str, float] = {}
    with _one_thread(), _workers() as workers:
        for job, largest in zip(jobs, workers.map(_Merge.largest, jobs), strict=True):
            parent = _parent(job.tensor)
            found[parent] = max(found.get(parent, 0.0), largest)
    divisors = {parent: scale_divisor(largest) for parent, largest in found.items()}
    return tuple(
        replace(shard, tensors=tuple(_divided(tensor, divisors) for tensor in shard.tensors))
        for shard in shards
    )


def _divided(tensor: OutputTensor, divisors: Mapping[str, float]) -> OutputTensor:
    if tensor.coded is None:
        return tensor
    return replace(tensor, coded=replace(tensor.coded, divisor=divisors[_parent(tensor)]))


def _parent(tensor: OutputTensor) -> str:
    """The module above the one that owns a weight: ``model.layers.0.mlp`` of its ``up_proj.weight``."""
    return tensor.base[1].name.rsplit(".", 2)[0]


def _create(path: Path, shard: OutputShard) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    os.truncate(descriptor, shard.size)
    write_all(descriptor, shard.prefix, 0)
    return descriptor


def _tell(finished: Callable[[Path], None], path: Path, synced: Future[None]) -> None:
    synced.result()
    finished(path)


def _sync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class _Writer:
    cache: FactorCache
    counts: MergeCounts

    def jobs(self, shard: OutputShard) -> Iterator[Callable[[int], int]]:
        """Pieces of work that each write a part of the file and return how many bytes."""
        run: list[OutputTensor] = []
        for tensor in shard.tensors:
            if tensor.change is None:
                if run and not _adjacent(run[-1], tensor):
                    yield from _copies(run)
                    run = []
                run.append(tensor)
                continue
            yield from _copies(run)
            run = []
            pieces = tiles(*_matrix(tensor.change.shape))
            for first in range(0, len(pieces), _JOB_TILES):
                yield _Merge(self, tensor, tensor.change, pieces[first : first + _JOB_TILES])
        yield from _copies(run)


def _adjacent(one: OutputTensor, other: OutputTensor) -> bool:
    (file, entry), (next_file, next_entry) = one.base, other.base
    return file.path == next_file.path and entry.end == next_entry.start


def _copies(run: list[OutputTensor]) -> Iterator[Callable[[int], int]]:
    """Copy neighbouring tensors as one range."""
    if not run:
        return
    (source, first), last = run[0].base, run[-1].base[1]
    for start in range(first.start, last.end, _COPY_BYTES):
        count = min(_COPY_BYTES, last.end - start)
        yield _Copy(source.path, start, count, run[0].entry.start + start - first.start)


@dataclass(frozen=True)
class _Copy:
    source: Path
    start: int
    count: int
    at: int

    def __call__(self, target: int) -> int:
        with self.source.open("rb", buffering=0) as file:
            copy_bytes(file.fileno(), target, self.start, self.count, self.at)
        return self.count


@dataclass(frozen=True)
class _Merge:
    """Some tiles of one changed tensor."""

    writer: _Writer
    tensor: OutputTensor
    change: Change
    pieces: list[tuple[int, int]]

    def __call__(self, target: int) -> int:
        entry, stored = self.tensor.entry, TORCH_DTYPES[self.tensor.base[1].dtype]
        rows, columns = _matrix(self.change.shape)
        row_bytes = entry.nbytes // rows if rows else 0
        scratch = self.writer.cache.scratch
        changed = written = 0
        for first, last in self.pieces:
            before = self._base_rows(first, last)
            exact = self._tile(before, first, last, columns)
            merged = scratch.take("merged", tuple(exact.shape), stored).copy_(exact)
            self._check_finite(merged, before)
            # a base that was decoded to float32 in memory is written in the dtype of its files
            changed += merged.numel() - _same_bits(before.to(stored), merged[: len(before)], scratch)
            if self.tensor.coded:
                written += self._write_codes(target, self.tensor.coded, exact.float(), first)
            else:
                data = merged.view(torch.uint8).numpy().data.cast("B")
                written += write_all(target, data, entry.start + first * row_bytes)
        if self.change.entries or not self.tensor.coded:
            count = self.pieces[-1][1] - self.pieces[0][0]
            self.writer.counts.add(self.tensor.base[1].name, count * columns, changed)
        return written

    def _write_codes(self, target: int, coded: Coded, exact: torch.Tensor, first: int) -> int:
        """Write codes and scales of some float32 rows (and what the tensor has once, with the first)."""
        codes, scale = encode(exact, coded.scheme, TORCH_DTYPES[coded.scale.dtype], coded.divisor)
        parts = [(self.tensor.entry, codes), (coded.scale, scale.view(torch.uint8))]
        if coded.once and first == 0:
            once = [coded.divisor] if coded.scheme.two_scales else self.change.shape
            parts.append((coded.once, torch.tensor([once], dtype=TORCH_DTYPES[coded.once.dtype])))
        written = 0
        for entry, data in parts:
            place = entry.start + first * (entry.nbytes // entry.shape[0])
            written += write_all(target, data.contiguous().view(torch.uint8).numpy().data.cast("B"), place)
        return written

    def _check_finite(self, merged: torch.Tensor, before: torch.Tensor) -> None:
        """The base may hold NaN, float16 ends at 65504, and DoRA divides by a norm."""
        if math.isfinite(_largest(merged)):
            return
        if not math.isfinite(_largest(before)):
            raise not_finite(self.tensor.base[1].name, self.tensor.base[0].path.parent)
        raise ExportError(
            f"{self.tensor.entry.name} would hold values beyond {self.tensor.base[1].dtype}, or NaN",
            fix="merge into the bfloat16 version of the base",
        )

    def largest(self) -> float:
        """The largest magnitude in these tiles, merged but not rounded."""
        columns = _matrix(self.change.shape)[1]
        return max(_largest(self._tile(self._base_rows(*rows), *rows, columns)) for rows in self.pieces)

    def _base_rows(self, first: int, last: int) -> torch.Tensor:
        """The base's rows; fewer (or none) where the vocabulary was resized beyond them."""
        shard, entry = self.tensor.base
        flat = _flat(entry)
        if self.change.quantised is not None:
            if isinstance(self.change.quantised, EncodedNF4) and not self.change.quantised.finite:
                raise not_finite(entry.name, shard.path.parent)
            return self.change.quantised.rows(first, last)
        rows = (min(first, flat.shape[0]), min(last, flat.shape[0]))
        return read_rows(shard, flat, *rows, scratch=(self.writer.cache.scratch, "base"))

    def _tile(self, before: torch.Tensor, first: int, last: int, columns: int) -> torch.Tensor:
        """Rows of the merged tensor in float32 (or as they are stored): ``[last - first, columns]``."""
        change, cache = self.change, self.writer.cache
        weight = before
        if change.source is not None:
            weight = read_rows(cache.shard, _flat(change.source), first, last)
        if change.update is not None:
            delta = change.update.delta(cache, first, last, columns)
            magnitude = change.update.pair.magnitude
            factors = cache.get(magnitude)[first:last] if magnitude is not None else None
            weight = merge_rows(weight, delta, factors)
        if change.bias is not None and change.bias.bias is not None:
            added = cache.get(change.bias.bias)[first:last] * change.bias.scaling
            weight = weight.float() + added.view(-1, 1)
        if change.tokens is not None:
            given = weight
            weight = torch.empty(last - first, *given.shape[1:])  # new rows may lie beyond the base's
            weight[: given.shape[0]] = given
            values = cache.get(change.tokens.entry)
            for row, index in enumerate(change.tokens.indices):
                if first <= index < last:
                    weight[index - first] = values[row]
        return weight


def _same_bits(one: torch.Tensor, two: torch.Tensor, scratch: Scratch) -> int:
    """Equal elements, compared as integers by numpy: 0.1 ns each, torch takes 0.7 to 1 on one thread."""
    integer = _INTEGERS[one.dtype]
    differ = scratch.take("differ", tuple(one.shape), torch.bool).numpy()
    np.not_equal(one.view(integer).numpy(), two.view(integer).numpy(), out=differ)
    return one.numel() - int(np.count_nonzero(differ))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns: leading dimensions are rows, a vector is one column."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (prod(shape), 1)


def _flat(entry: TensorEntry) -> TensorEntry:
    return replace(entry, shape=_matrix(entry.shape))


def zero_updates(adapter: Shard) -> tuple[set[str], list[str]]:
    """Names of the adapter's tensors that are all zero, and of those that hold a NaN or an infinity."""
    zero, broken = set(), []
    with _one_thread():
        for name, entry in adapter.tensors.items():
            flat = _flat(entry)
            largest = max(
                (_largest(read_rows(adapter, flat, *rows)) for rows in tiles(*flat.shape)), default=0.0
            )
            if math.isinf(largest):
                broken.append(name)
            elif largest == 0:
                zero.add(name)
    return zero, broken


def _largest(rows: torch.Tensor) -> float:
    """The largest magnitude; infinity where one is NaN: min and max carry it along."""
    if not rows.numel():
        return 0.0
    # 0.1 ns an element, isfinite takes 1.9 to 2.3
    low, high = map(float, torch.aminmax(rows))
    return max(-low, high) if math.isfinite(low) and math.isfinite(high) else math.inf


def not_finite(name: str, folder: Path) -> ExportError:
    """What to raise for a tensor of a base that has values no adapter is added to and no code stands for."""
    return ExportError(
        f"{name} of {folder} holds NaN or infinity", fix="copy or download the base again, or use another one"
    )
