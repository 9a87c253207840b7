"""Writing pronghorn.json, and saying what differs between the record of an adapter and the present."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pronghorn.sources.record import FORMAT as FORMAT
from pronghorn.sources.record import RECORD_NAME as RECORD_NAME
from pronghorn.sources.record import AdapterRecord as AdapterRecord
from pronghorn.sources.record import read_record as read_record

_LIBRARIES = ("pronghorn", "torch", "transformers", "peft")


def write_record(folder: Path, record: AdapterRecord) -> Path:
    """Write the record into an adapter folder; returns its path."""
    path = folder / RECORD_NAME
    path.write_text(json.dumps({"format": FORMAT, **asdict(record)}, indent=2) + "\n", encoding="utf-8")
    return path


def library_versions(names: Iterable[str] = _LIBRARIES) -> dict[str, str]:
    """Versions of the libraries that are installed; by default of those that decide what an adapter means."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def differences(recorded: AdapterRecord, now: AdapterRecord) -> list[str]:
    """A line for each setting in which ``now`` differs from the record of the training."""
    lines = []
    for key in ("max_seq_length", "rank", "tied", "quantization", "quantised_dtype"):
        before, after = getattr(recorded, key), getattr(now, key)
        if (before is not None or key == "quantization") and before != after:
            lines.append(f"{key}: {before} at training, {after} now")
    if recorded.trainable and set(recorded.trainable) != set(now.trainable):
        gone = sorted(set(recorded.trainable) - set(now.trainable))
        new = sorted(set(now.trainable) - set(recorded.trainable))
        parts = [
            f"{len(names)} {word} (first: {names[0]})"
            for names, word in ((gone, "gone"), (new, "new"))
            if names
        ]
        lines.append(f"trainable tensors: {', '.join(parts)}")
    for name, before in recorded.versions.items():
        after = now.versions.get(name)
        if after is not None and after != before:
            lines.append(f"{name}: {before} at training, {after} now")
    return lines
