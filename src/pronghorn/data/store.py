"""Tokenised rows on disk: memory-mapped Arrow files, one for each chunk, in a folder named by all that
made it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from pronghorn.data.options import DataOptions
from pronghorn.data.rows import BadRow, Source
from pronghorn.data.tally import TOTALS, Count, PartTally, Tally, row_hash
from pronghorn.data.templates import ChatTemplate
from pronghorn.data.tokens import IGNORE, EncodedRow

LAYOUT = 6  # raise when the same inputs give other rows than before
_IDS = pa.list_(pa.int32())
_PART = ("hashes", "files", "numbers")
_SCHEMA = pa.schema([("input_ids", _IDS), ("labels", _IDS)])


class ArrowFile:
    """Writes rows of ids and labels to one file, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> ArrowFile:
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, _SCHEMA)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, rows: Sequence[EncodedRow]) -> list[int]:
        """Append rows; the hash of each is returned."""
        flat = array("i")
        ends = [0]
        for row in rows:
            flat.fromlist(row.input_ids)
            ends.append(len(flat))
        ids = np.frombuffer(flat, np.int32) if flat else np.empty(0, np.int32)
        labels = np.full(len(flat), IGNORE, np.int32)
        for start, row in zip(ends, rows, strict=False):
            for first, last in row.runs:
                labels[start + first : start + last] = ids[start + first : start + last]
        offsets = pa.array(ends, pa.int32())
        columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels)]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        view = memoryview(flat)
        return [row_hash(view[start:end]) for start, end in pairwise(ends)]


def keep_shard(folder: Path, name: str, tally: Tally, part: PartTally) -> None:
    """Say what is in the shard ``name``, which is complete with this file, whatever happens next."""
    counts: dict[str, Any] = {each: getattr(tally, each) for each in (*TOTALS, "longest")}
    counts |= {
        "bad_rows": [asdict(row) for row in tally.bad_rows],
        "dropped": asdict(tally.dropped),
        "truncated": asdict(tally.truncated),
        "flagged": {flag: asdict(count) for flag, count in tally.flagged.items()},
    }
    unnamed = folder / f".{name}.tally"
    with (folder / f"{name}.arrow").open("rb") as rows, unnamed.open("wb") as file:
        np.savez(
            file,
            counts=np.frombuffer(json.dumps(counts).encode(), np.uint8),
            lengths=np.asarray(tally.lengths),
            hashes=np.asarray(part.hashes),
            files=np.asarray(part.files),
            numbers=np.asarray(part.numbers),
        )
        file.flush()
        for written in (rows, file):
            os.fsync(written.fileno())
    unnamed.rename(folder / f"{name}.tally")


def has_shard(folder: Path, name: str) -> bool:
    """Whether the shard is complete."""
    return (folder / f"{name}.tally").is_file()


def read_shard(folder: Path, name: str) -> tuple[Tally, PartTally]:
    """What ``keep_shard`` said."""
    with np.load(folder / f"{name}.tally") as file:
        values = {each: file[each] for each in file.files}
    counts = json.loads(values["counts"].tobytes())
    tally = Tally(**{each: counts[each] for each in (*TOTALS, "longest")})
    tally.bad_rows = [BadRow(**row) for row in counts["bad_rows"]]
    tally.dropped, tally.truncated = Count(**counts["dropped"]), Count(**counts["truncated"])
    tally.flagged.update({flag: Count(**count) for flag, count in counts["flagged"].items()})
    tally.lengths.frombytes(values["lengths"].tobytes())
    part = PartTally()
    for each in _PART:
        getattr(part, each).frombytes(values[each].tobytes())
    return tally, part


def content_hash(sources: Iterable[Source]) -> str:
    """sha256 over the bytes of every file the rows come from, in order."""
    total = hashlib.sha256()
    for source in sources:
        total.update(source.stamp.encode())
        for path in source.files:
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(1 << 20):
                    digest.update(block)
            total.update(digest.digest())
    return total.hexdigest()


def cache_key(
    data_hash: str, options: DataOptions, tokenizer: Any, template: ChatTemplate | None, limit: int
) -> str:
    """Names the result: equal keys mean equal rows."""
    parts = [
        LAYOUT,
        [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        data_hash,
        options.model_dump(mode="json", exclude={"cache", "isolate", "skip_bad", "allow", "workers"}),
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        tokenizer.special_tokens_map,
        template.hash if template else None,
        limit,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def cache_root() -> Path:
    """Beside the caches of ``datasets``, so that its environment variables move both."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "pronghorn"


@contextmanager
def folder_for(target: Path, *, resume: bool) -> Iterator[Path]:
    """A folder to write into; ``keep`` gives it its name.

    With ``resume`` it is the one that a run that was killed has left, if there is one and nobody else
    writes to it.
    An error removes it, for it would come again; being interrupted does not.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = target.parent / f".part-{target.name}", None
    if resume:
        folder.mkdir(exist_ok=True)
        lock = _locked(folder)
    if lock is None:
        folder = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        yield folder
    except BaseException as error:
        if lock is None or isinstance(error, Exception):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """A lock that ends with this process; None if another one has it, or the file system has none."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def keep(folder: Path, target: Path) -> Path:
    """Rename a finished folder; if another process was first, its equal result is used."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(folder)
    return target
