"""Models that use one matrix for embedding and head: does the adapter keep them one, or must both be written?

What PEFT computes decides: training the embedding alone leaves the head as it was, so the merged model needs
two matrices; equal updates of both, and trained token rows (which PEFT ties itself), need one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.adapters.files import AdapterFolder, LoraPair
from pronghorn.errors import ExportError
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.reader import read_columns, read_rows
from pronghorn.weights.shards import Shard, TensorEntry

_ROWS = 4096


@dataclass(frozen=True)
class TiedPair:
    """Tied embedding and head, by their names in the model and in the files.

    ``untie``: both are written. ``duplicates``: the head's adapter tensors that only repeat the embedding's.
    """

    embedding: str
    head: str
    embedding_file: str
    head_file: str
    untie: bool
    duplicates: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Parts:
    """What an adapter holds for one module."""

    saved: TensorEntry | None
    pair: LoraPair | None
    tokens: TensorEntry | None

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        pair = self.pair.entries if self.pair else ()
        return tuple(entry for entry in (self.saved, self.tokens, *pair) if entry is not None)


def share(weights: WeightFolder, config: Mapping[str, Any], adapter: AdapterFolder) -> TiedPair | None:
    """The tied pair that the adapter touches; None where nothing is tied or the adapter leaves it alone.

    Raises:
        ExportError: the adapter was trained with tied="keep", but its two updates differ.
    """
    # the files may have the embedding under the name of another class: the adapter's own name comes first
    for embedding, head in sorted(keymap.TIED, key=lambda pair: not _parts(adapter, pair[0]).entries):
        first, last = keymap.find(embedding, weights.tensors), keymap.find(head, weights.tensors)
        if first is None:
            continue
        mine, other = _parts(adapter, embedding), _parts(adapter, head)
        if not _is_tied(config, last) or not (mine.entries or other.entries):
            return None
        wanted = adapter.record.tied if adapter.record else None
        equal = bool(other.entries) and _equal(adapter.shard, mine, other)
        if wanted == "keep" and other.entries and not equal:
            raise ExportError(
                f"the adapter was trained with tied='keep', but updates {embedding} and {head} differently",
                fix="train it again with tied='untie'",
            )
        only_tokens = mine.pair is None and mine.saved is None and not other.entries
        untie = wanted == "untie" or (wanted is None and not equal and not only_tokens)
        duplicates = frozenset(entry.name for entry in other.entries) if equal and not untie else frozenset()
        return TiedPair(embedding, head, first, last or _head_file(embedding, first, head), untie, duplicates)
    return None


def _is_tied(config: Mapping[str, Any], head: str | None) -> bool:
    text = config.get("text_config")
    flag = config.get("tie_word_embeddings")
    if flag is None and isinstance(text, Mapping):
        flag = text.get("tie_word_embeddings")
    return bool(flag) if flag is not None else head is None


def _head_file(embedding: str, embedding_file: str, head: str) -> str:
    """A head that is not stored yet gets the prefix that the embedding has in the files."""
    for model_side, file_side in keymap.PREFIXES:
        if file_side and embedding.startswith(model_side) and embedding_file.startswith(file_side):
            root = file_side.removesuffix("model.")
            return root + head
    return head


def _parts(adapter: AdapterFolder, name: str) -> _Parts:
    pair = next((pair for pair in adapter.pairs if pair.parameter == name), None)
    tokens = next((rows.entry for rows in adapter.tokens if rows.parameter == name), None)
    return _Parts(adapter.saved.get(name), pair, tokens)


def _equal(shard: Shard, embedding: _Parts, head: _Parts) -> bool:
    """Do both parts describe the same update of the same matrix?"""
    first, last = embedding, head
    if (first.saved is None) != (last.saved is None) or (first.pair is None) != (last.pair is None):
        return False
    if first.tokens is not None or last.tokens is not None:
        return False
    if first.saved is not None and last.saved is not None and not _same(shard, first.saved, last.saved):
        return False
    if first.pair is None or last.pair is None:
        return True
    return (
        first.pair.embedding
        and not last.pair.embedding
        and first.pair.scaling == last.pair.scaling
        and last.pair.magnitude is None
        and last.pair.bias is None
        and _same_turned(shard, first.pair.a, last.pair.b)
        and _same_turned(shard, first.pair.b, last.pair.a)
    )


def _chunks(rows: int) -> Iterator[tuple[int, int]]:
    for first in range(0, rows, _ROWS):
        yield first, min(rows, first + _ROWS)


def _same(shard: Shard, one: TensorEntry, two: TensorEntry) -> bool:
    return one.shape == two.shape and all(
        torch.equal(read_rows(shard, one, *chunk), read_rows(shard, two, *chunk))
        for chunk in _chunks(one.shape[0])
    )


def _same_turned(shard: Shard, wide: TensorEntry, tall: TensorEntry) -> bool:
    """Is ``tall`` the transpose of ``wide``?"""
    return wide.shape == tall.shape[::-1] and all(
        torch.equal(read_columns(shard, wide, *chunk).T, read_rows(shard, tall, *chunk))
        for chunk in _chunks(tall.shape[0])
    )
