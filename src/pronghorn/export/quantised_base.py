"""A base quantised to a layout of compressed-tensors, held against the one an adapter was trained on.

The files are others, so no fingerprint knows it. Its values do: decoded, they are those of the training but
for rounding, and they do not hold the adapter's update already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pronghorn.adapters.files import AdapterFolder
from pronghorn.errors import AdapterError
from pronghorn.export.verify_codes import Coded, coded
from pronghorn.export.verify_decode import decode
from pronghorn.export.verify_folder import Folder
from pronghorn.quant.stored import StoredNF4, stored_4bit
from pronghorn.sources.source import Source
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.reader import read_rows, read_tensor

GIVE_BASE = "give that very base with base=PATH (--base), in 16 bit or quantised"
_ROWS = 64  # of each matrix


def held_against(adapter: AdapterFolder, base: Path, trained: Source) -> tuple[float, float]:
    """How far the weights of ``base`` are off those of ``trained``, relative to these; and how much of the
    adapter's update is in the difference: 0 where it is not merged, 1 where it is.

    Raises:
        AdapterError: a matrix has another shape in ``trained``, or values that are not finite.
    """
    weights = open_weights(trained.path)
    stored = stored_4bit(trained.config, weights)
    apart = size = along = length = 0.0
    for piece in _pieces(adapter, Folder(base), weights, stored):
        _check_finite(piece, {base: piece.decoded, trained.path: piece.trained, adapter.path: piece.update})
        difference = piece.decoded - piece.trained
        apart += float(difference.double().square().sum())
        size += float(piece.trained.double().square().sum())
        if piece.update is not None:
            along += float((difference * piece.update).double().sum())
            length += float(piece.update.double().square().sum())
    if not size:
        return math.inf, 0.0
    return (apart / size) ** 0.5, along / length if length else 0.0


@dataclass(frozen=True)
class _Piece:
    """The first rows [rows, in] of a weight in float32: decoded, as trained on, and the adapter's update."""

    name: str
    decoded: torch.Tensor
    trained: torch.Tensor
    update: torch.Tensor | None


def _pieces(
    adapter: AdapterFolder, view: Folder, weights: WeightFolder, stored: Mapping[str, StoredNF4]
) -> Iterator[_Piece]:
    names = coded(view)
    pairs = {keymap.find(pair.parameter, names): pair for pair in adapter.pairs if not pair.embedding}
    for name, one in names.items():
        rows = min(_ROWS, one.shape[0])
        trained = _trained_rows(name, one, rows, view, weights, stored)
        if trained is None:
            continue
        pair, update = pairs.get(name), None
        if pair is not None:
            b = read_rows(adapter.shard, pair.b, 0, rows).float()
            update = pair.scaling * b @ read_tensor(adapter.shard, pair.a).float()
        yield _Piece(name, decode(one, 0, rows)[0], trained, update)


def _check_finite(piece: _Piece, places: Mapping[Path, torch.Tensor | None]) -> None:
    for place, values in places.items():
        if values is not None and not bool(torch.isfinite(values).all()):
            raise AdapterError(
                f"{piece.name} has values in {place} that are not finite, so nothing can be computed with it",
                fix="quantise, download or train it again",
            )


def _trained_rows(
    name: str, one: Coded, rows: int, view: Folder, weights: WeightFolder, stored: Mapping[str, StoredNF4]
) -> torch.Tensor | None:
    """None where the base of the training has no matrix of this name (its experts may be stacked)."""
    file = keymap.find(name, weights.tensors)
    if file is None:
        return None
    shape = stored[file].shape if file in stored else weights.tensors[file][1].shape
    if len(shape) != 2:
        return None
    if shape != one.shape:
        raise AdapterError(
            f"{view.path} is not {weights.path} quantised: {name} is {list(one.shape)}, there {list(shape)}",
            fix=GIVE_BASE,
        )
    if file in stored:
        return stored[file].rows(0, rows).float()
    return read_rows(*weights.tensors[file], 0, rows).float()
