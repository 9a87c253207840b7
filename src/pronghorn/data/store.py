"""Tokenised rows on disk: one memory-mapped Arrow file per part, in a folder named by all that made it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from pronghorn.data.options import DataOptions
from pronghorn.data.rows import Source
from pronghorn.data.templates import ChatTemplate

LAYOUT = 4  # raise when the same inputs give other rows than before
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("input_ids", _IDS), ("labels", _IDS)])


class ArrowFile:
    """Writes rows of ids and labels to one file, a batch at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0

    def __enter__(self) -> ArrowFile:
        self._sink = pa.OSFile(str(self.path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, _SCHEMA)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._writer.close()
        self._sink.close()

    def write(self, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> None:
        """Append rows."""
        self._writer.write_batch(
            pa.record_batch([pa.array(input_ids, _IDS), pa.array(labels, _IDS)], schema=_SCHEMA)
        )
        self.rows += len(input_ids)


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
        options.model_dump(mode="json", exclude={"cache", "isolate", "skip_bad", "allow"}),
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


def new_folder(root: Path) -> Path:
    """A folder to write into; ``keep`` gives it its name."""
    root.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".new-", dir=root))


def keep(folder: Path, target: Path) -> Path:
    """Rename a finished folder; if another process was first, its equal result is used."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(folder)
    return target
