"""The 16-bit model that a folder in 4-bit was made from, known by its values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pronghorn.errors import ExportError
from pronghorn.quant.stored import StoredNF4, stored_4bit
from pronghorn.sources.bounds import quantization_of
from pronghorn.sources.record import read_record
from pronghorn.sources.resolve import resolve, resolve_base
from pronghorn.sources.source import Source, SourceKind
from pronghorn.weights.folder import fingerprint, open_weights
from pronghorn.weights.reader import read_rows

# relative to the weight: NF4's own error is 0.09, that of another model's weight 1 and more
_BOUND = 0.2
_ROWS = 64


def original_of(adapter: Source, base: str | Path) -> tuple[Source, Path] | None:
    """(``base``, the stored 4-bit base), where ``base`` holds the 16-bit values of the latter; else None.

    None: the adapter was not trained on a folder stored in 4-bit, or ``base`` is that very folder or
    quantised itself.

    Raises:
        ExportError: ``base`` holds another model.
        SourceError, AdapterError: as for ``resolve_base``.
    """
    record = read_record(adapter.path)
    if record is None or record.quantization != "nf4":
        return None
    given = resolve(base, trust_remote_code=True, to_serve=True)
    if given.kind is not SourceKind.BASE or quantization_of(given.config) is not None:
        return None
    if fingerprint(open_weights(given.path)) == record.base_fingerprint:
        return None
    trained = resolve_base(adapter, trust_remote_code=True)
    stored = stored_4bit(trained.config, open_weights(trained.path))
    if not stored:
        return None
    _check(given, trained.path, stored)
    return given, trained.path


def _check(given: Source, trained: Path, stored: Mapping[str, StoredNF4]) -> None:
    tensors = open_weights(given.path).tensors
    for name, one in stored.items():
        why = "is not there in this shape"
        if name in tensors and tuple(tensors[name][1].shape) == one.shape:
            rows = min(_ROWS, one.shape[0])
            original = read_rows(*tensors[name], 0, rows).float()
            off = float((one.rows(0, rows).float() - original).norm() / original.norm())
            if off <= _BOUND:
                continue
            why = f"is {off:.2f} off its decoded values, where NF4 is 0.09 off"
        raise ExportError(
            f"{given.path} is not the 16-bit model that {trained} was made from: {name} {why}",
            fix="give that model as base=PATH (--base), or merge onto the decoded values",
        )
