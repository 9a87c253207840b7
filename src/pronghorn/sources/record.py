"""pronghorn.json beside an adapter: which base it belongs to and how it was trained."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pronghorn.errors import AdapterError

RECORD_NAME = "pronghorn.json"
FORMAT = 1


@dataclass(frozen=True)
class AdapterRecord:
    """What PEFT's own files do not say about an adapter.

    ``base_name`` is what the user typed, ``base_path`` the folder the weights came from, ``base_revision``
    the hub commit (None for local folders), ``base_fingerprint`` a content fingerprint ("ph1:..."); ``tied``
    is "keep" or "untie" where tied embeddings were trained; ``trainable`` are the trained tensors by their
    names in the PEFT model; ``vocab_rows`` is the number of embedding rows where the vocabulary was resized.
    ``quantization`` is "nf4" where the base was held in 4-bit; ``quantised`` are then the tensors of its
    files that were, and ``quantised_dtype`` ("bfloat16", ...) is what they decoded to.
    ``tokenizer_changes`` says in words what the tokenizer's files hold that those of the base do not.
    """

    base_name: str
    base_revision: str | None = None
    base_path: str | None = None
    base_fingerprint: str | None = None
    max_seq_length: int | None = None
    tied: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    rank: int | None = None
    vocab_rows: int | None = None
    quantization: str | None = None
    quantised_dtype: str | None = None
    quantised: tuple[str, ...] = ()
    tokenizer_changes: tuple[str, ...] = ()


_OPTIONAL_TEXT = ("base_revision", "base_path", "base_fingerprint", "tied", "quantization", "quantised_dtype")
_LISTS = ("trainable", "quantised", "tokenizer_changes")
_OPTIONAL_COUNT = ("max_seq_length", "rank", "vocab_rows")


def read_record(folder: Path) -> AdapterRecord | None:
    """The record in an adapter folder; None where there is none (an adapter saved by PEFT alone).

    Raises:
        AdapterError: the file is there and cannot be read as a record.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, f"it is not valid JSON ({error})") from error
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise _broken(path, f"it is not a record of format {FORMAT}")
    _check(path, raw)
    known = {one.name for one in fields(AdapterRecord)}
    kept = {key: value for key, value in raw.items() if key in known}  # a newer version may have added keys
    lists = {key: tuple(kept.get(key, ())) for key in _LISTS}
    return AdapterRecord(**{**kept, **lists})


def _check(path: Path, raw: dict[str, Any]) -> None:
    versions = raw.get("versions", {})
    if not isinstance(raw.get("base_name"), str):
        raise _broken(path, "base_name is not a text")
    for key in _OPTIONAL_TEXT:
        if not isinstance(raw.get(key), (str, type(None))):
            raise _broken(path, f"{key} is not a text")
    for key in _OPTIONAL_COUNT:
        value = raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise _broken(path, f"{key} is not a count")
    if not isinstance(versions, dict) or not all(isinstance(value, str) for value in versions.values()):
        raise _broken(path, "versions is not a map of texts")
    for key in _LISTS:
        named = raw.get(key, [])
        if not isinstance(named, list) or not all(isinstance(value, str) for value in named):
            raise _broken(path, f"{key} is not a list of texts")
    if raw.get("quantization") not in (None, "nf4"):
        raise _broken(path, f"quantization is {raw['quantization']!r}, which this version does not know")


def _broken(path: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{path} cannot be used: {reason}",
        fix=f"save the adapter again, or remove {RECORD_NAME} to use the adapter without its record",
    )
