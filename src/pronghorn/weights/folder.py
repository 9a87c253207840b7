"""The weights of a model folder: which safetensors files belong to it, and every tensor in them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pronghorn.errors import SourceError
from pronghorn.weights.shards import Shard, TensorEntry, read_shard

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
# 512 pages of 4 KiB: 2 MiB read, some milliseconds, for any model
FINGERPRINT_PAGES = 512
PAGE_BYTES = 4096


@dataclass(frozen=True)
class WeightFolder:
    """A folder's weights; ``index`` is the path of the index file where the weights are sharded."""

    path: Path
    shards: tuple[Shard, ...]
    index: Path | None
    tensors: Mapping[str, tuple[Shard, TensorEntry]]

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files."""
        return sum(shard.size for shard in self.shards)


def open_weights(folder: Path) -> WeightFolder:
    """Find and check the weight files of a model folder; only headers are read.

    Raises:
        SourceError: no safetensors weights, a missing, stale or broken file, a file outside the folder, or an
            index that does not agree with the files.
    """
    index = folder / INDEX_NAME
    single = folder / SINGLE_NAME
    if index.exists() and single.exists():
        raise SourceError(
            f"{folder} holds both {SINGLE_NAME} and {INDEX_NAME}: one is stale, loaders disagree on which",
            fix=f"remove {SINGLE_NAME}, or the index and its shards",
        )
    if index.exists():
        listed = _read_index(index)
        names = sorted(set(listed.values()))
    elif single.exists():
        listed, names = {}, [SINGLE_NAME]
    else:
        raise _no_weights(folder)
    stale = sorted(
        path.name for path in folder.iterdir() if _SHARD_NAME.fullmatch(path.name) and path.name not in names
    )
    if stale:
        raise SourceError(
            f"{folder} holds shards that belong to no index: {', '.join(stale)}", fix="remove them"
        )
    shards = tuple(read_shard(_inside(folder, name)) for name in names)
    tensors = _collect(shards)
    if index.exists():
        _compare_index(index, listed, tensors)
    return WeightFolder(folder, shards, index if index.exists() else None, MappingProxyType(tensors))


def fingerprint(weights: WeightFolder) -> str:
    """A content fingerprint in milliseconds for any size: all headers and up to 512 pages of the tensors.

    Two bases of one architecture differ in (nearly) every page, so sampled pages tell them apart; this is a
    guard against the wrong base, not against an attacker. Shard names do not count, shard layout does.
    """
    digest = hashlib.sha256()
    per_shard = max(4, FINGERPRINT_PAGES // max(1, len(weights.shards)))
    for shard in weights.shards:
        digest.update(shard.size.to_bytes(8, "little"))
        digest.update(shard.prefix)
        entries = [entry for entry in shard.tensors.values() if entry.nbytes]
        step = max(1, -(-len(entries) // per_shard))
        with shard.path.open("rb") as file:
            for entry in entries[::step]:
                file.seek(entry.start + max(0, entry.nbytes - PAGE_BYTES) // 2)
                digest.update(file.read(min(PAGE_BYTES, entry.nbytes)))
    return "ph1:" + digest.hexdigest()


def _no_weights(folder: Path) -> SourceError:
    if any(_SHARD_NAME.fullmatch(path.name) for path in folder.glob("model-*")):
        return SourceError(f"{folder} has weight shards but no {INDEX_NAME}", fix="restore the index file")
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        return SourceError(
            f"{folder} has only pickled weights, which run code when they are opened",
            fix="convert them to safetensors once, or use a revision of the model that has safetensors files",
        )
    return SourceError(
        f"{folder} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME}",
        fix="give the folder of a complete model",
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        parsed: Any = json.loads(index.read_text(encoding="utf-8"))
        listed = parsed["weight_map"]
        valid = isinstance(listed, dict) and all(isinstance(name, str) for name in listed.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SourceError(
            f"{index} is not a weight index: {error!r}", fix="restore the index file"
        ) from error
    if not valid or not listed:
        raise SourceError(
            f"{index} is not a weight index: its weight_map is not a map of names", fix="restore it"
        )
    for name in set(listed.values()):
        if (
            "/" in name
            or "\\" in name
            or "\0" in name
            or not name.endswith(".safetensors")
            or name.startswith(".")
        ):
            raise SourceError(
                f"{index} points to {name!r}, which is not a plain .safetensors file name in the same folder",
                fix="do not use this model, or correct its index by hand",
            )
    return dict(listed)


def _inside(folder: Path, name: str) -> Path:
    """The path of a weight file, its links followed and found to stay inside (or in the hub cache)."""
    path = folder / name
    if not path.exists():
        raise SourceError(f"{folder} lacks the weight file {name}", fix="download or copy the model again")
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":  # hub cache: snapshots/<revision>/file is a link to blobs/<hash>
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise SourceError(
            f"{path} is a link to {real}, outside the folder", fix="copy the file into the folder"
        )
    return path


def _collect(shards: tuple[Shard, ...]) -> dict[str, tuple[Shard, TensorEntry]]:
    tensors: dict[str, tuple[Shard, TensorEntry]] = {}
    for shard in shards:
        for name, entry in shard.tensors.items():
            if name in tensors:
                raise SourceError(
                    f"the tensor {name} is in both {tensors[name][0].path} and {shard.path.name}",
                    fix="download or copy the model again",
                )
            tensors[name] = (shard, entry)
    return tensors


def _compare_index(
    index: Path, listed: dict[str, str], tensors: Mapping[str, tuple[Shard, TensorEntry]]
) -> None:
    found = {name: shard.path.name for name, (shard, _) in tensors.items()}
    if found == listed:
        return
    wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
    first = wrong[0]
    raise SourceError(
        f"{index} and the files disagree on {len(wrong)} tensors, the first is {first}: the index says "
        f"{listed.get(first, 'nothing')}, it is in {found.get(first, 'no file')}",
        fix="download or copy the model again",
    )
