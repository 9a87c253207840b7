"""A name or path becomes a ``Source``: local files at a fixed revision, checked before use."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pronghorn.errors import AdapterError, NotSupportedError, SourceError
from pronghorn.sources import hub
from pronghorn.sources.bounds import COMPRESSED_TENSORS, check_base_config, quantised_kind, quantization_of
from pronghorn.sources.record import AdapterRecord, read_record
from pronghorn.sources.source import Source, SourceKind
from pronghorn.weights.folder import fingerprint, open_weights
from pronghorn.weights.shards import Shard, read_shard

BASE_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# the largest config.json of a public model is about 0.2 MB
MAX_CONFIG_BYTES = 8 * 2**20
_SAY_BASE = "name with base= (--base, or model.base in run.yaml)"


def resolve(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    to_serve: bool = False,
) -> Source:
    """Find the files of a model or adapter: a local folder first, else a hub snapshot; then check them.

    A local folder is never replaced by a hub model of the same name, and what looks like a path is never
    looked up on the hub. HF_HUB_OFFLINE is obeyed. ``to_serve`` also takes bases that engines open and that
    cannot be trained on: in the layouts of compressed-tensors and bitsandbytes.

    Raises:
        SourceError: nothing is there, or what is there is incomplete, damaged or hostile.
        NotSupportedError: the weights are quantised, or the adapter is no LoRA adapter.
    """
    text = os.fspath(name_or_path)
    local = Path(text).expanduser()
    if text and local.is_dir():
        if revision is not None:
            raise SourceError(
                f"{text} is a local folder, which has no revision {revision!r}",
                fix="leave revision out, or rename the folder if the hub model is meant",
            )
        return inspect(local.absolute(), name=text, trust_remote_code=trust_remote_code, to_serve=to_serve)
    if text and local.exists():
        raise SourceError(
            f"{text} is a file, not a model folder", fix="pass the folder that holds config.json"
        )
    if isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or not text:
        raise SourceError(f"there is no folder {text!r}", fix="check the path for typing errors")
    folder, commit = hub.download(text, revision=revision, token=token, code=trust_remote_code)
    return inspect(folder, name=text, revision=commit, trust_remote_code=trust_remote_code, to_serve=to_serve)


def resolve_base(
    adapter: Source,
    *,
    base: str | Path | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    to_serve: bool = False,
) -> Source:
    """The base an adapter was trained on: from its pronghorn.json first, else from adapter_config.json.

    ``base`` replaces where to look; the recorded fingerprint still has to match. ``to_serve`` also takes what
    ``resolve`` then takes; a base in a layout of compressed-tensors never has the recorded fingerprint, and
    what it was made from is for the caller to check.

    Raises:
        AdapterError: no base is named, or the one found is not the one the adapter was trained on.
        SourceError: the base's folder is missing or damaged.
    """
    record = read_record(adapter.path)
    revision = None
    if base is not None:
        wanted: str | Path = base
    elif record is not None:
        wanted, revision = _recorded(adapter, record)
    else:
        wanted, revision = _configured(adapter)
    try:
        found = resolve(
            wanted, revision=revision, token=token, trust_remote_code=trust_remote_code, to_serve=to_serve
        )
    except SourceError as error:
        raise SourceError(
            f"the base of the adapter {adapter.name} cannot be used: {error.message}",
            fix=f"{error.fix}; {_SAY_BASE} another place of it",
        ) from error
    if found.kind is not SourceKind.BASE:
        raise AdapterError(
            f"{wanted}, named as the base of the adapter {adapter.name}, is itself an adapter",
            fix=f"{_SAY_BASE} the folder of the model it was trained on",
        )
    if record is not None and record.base_fingerprint and not is_compressed(found):
        actual = fingerprint(open_weights(found.path))
        if actual != record.base_fingerprint:
            raise AdapterError(
                f"{found.path} is not the base the adapter {adapter.name} was trained on: the weights' "
                f"fingerprint is {actual[:16]}..., recorded is {record.base_fingerprint[:16]}... "
                f"({record.base_name})",
                fix=f"{_SAY_BASE} the folder (or hub id) of the very base it was trained on",
            )
    return found


def is_compressed(source: Source) -> bool:
    """Whether a base holds its weights in a layout of compressed-tensors."""
    return quantised_kind(quantization_of(source.config)) == COMPRESSED_TENSORS


def _recorded(adapter: Source, record: AdapterRecord) -> tuple[str | Path, str | None]:
    if record.base_path and Path(record.base_path).is_dir():
        return Path(record.base_path), None
    if record.base_revision and record.base_name:
        return record.base_name, record.base_revision
    raise AdapterError(
        f"the base of the adapter {adapter.name} is not here: {record.base_path or record.base_name!r}",
        fix=f"{_SAY_BASE} the place of that model on this machine",
    )


def _configured(adapter: Source) -> tuple[str, str | None]:
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise AdapterError(
            f"{adapter.path / ADAPTER_CONFIG} names no base (base_model_name_or_path)",
            fix=f"{_SAY_BASE} the model it was trained on",
        )
    if ".." in Path(named).parts:
        raise AdapterError(
            f"{adapter.path / ADAPTER_CONFIG} names the base {named!r}, a path that climbs out of its folder",
            fix=f"{_SAY_BASE} the model it was trained on, if you trust the adapter",
        )
    revision = adapter.config.get("revision")
    local = Path(named).expanduser().is_dir()
    return named, revision if isinstance(revision, str) and revision and not local else None


def inspect(
    folder: Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    to_serve: bool = False,
) -> Source:
    """Say what a local folder is, from its content, and check it; no weight is read.

    Raises:
        SourceError, NotSupportedError: as for ``resolve``.
    """
    has_base, has_adapter = (folder / BASE_CONFIG).is_file(), (folder / ADAPTER_CONFIG).is_file()
    has_model_weights = any(folder.glob("model*.safetensors*"))
    name = name or str(folder)
    if has_adapter and has_model_weights:
        raise SourceError(
            f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}), which loaders would put on top",
            fix="move the adapter_* files into a folder of their own",
        )
    if has_adapter:
        config = read_json(folder / ADAPTER_CONFIG)
        _check_adapter(folder, config)
        return Source(SourceKind.ADAPTER, folder, name, revision, config)
    if not has_base:
        raise _no_config(folder)
    config = read_json(folder / BASE_CONFIG)
    check_base_config(
        folder / BASE_CONFIG, config, open_weights(folder), code=trust_remote_code, to_serve=to_serve
    )
    return Source(SourceKind.BASE, folder, name, revision, config)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a small JSON file that must hold an object.

    Raises:
        SourceError: it cannot be read, is too large, or is not a JSON object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise SourceError(
                f"{path} has {size} bytes, more than {MAX_CONFIG_BYTES}", fix="restore the file"
            )
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}", fix="restore the file") from error
    if not isinstance(parsed, dict):
        raise SourceError(
            f"{path} holds a {type(parsed).__name__}, not a JSON object", fix="restore the file"
        )
    return parsed


def _no_config(folder: Path) -> SourceError:
    inside = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if len(inside) > 1:
        return SourceError(
            f"{folder} holds several adapters: {', '.join(inside)}", fix=f"choose one: {folder / inside[0]}"
        )
    if inside:
        return SourceError(
            f"{folder} has no {BASE_CONFIG}; there is an adapter in it", fix=f"use {folder / inside[0]}"
        )
    if sealed := max(folder.glob(f"checkpoints/*/{ADAPTER_CONFIG}"), key=os.path.getmtime, default=None):
        return SourceError(
            f"{folder} is a run that has no adapter yet",
            fix=f"train it to its end, or use its checkpoint {sealed.parent}",
        )
    return SourceError(
        f"{folder} has neither {BASE_CONFIG} nor {ADAPTER_CONFIG}",
        fix="pass the folder of a complete model or adapter",
    )


def _check_adapter(folder: Path, config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotSupportedError(
            f"{folder / ADAPTER_CONFIG} describes a {kind!r} adapter; only LORA adapters can be used",
            fix="train a LoRA adapter instead",
        )
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        if (folder / "adapter_model.bin").exists():
            raise SourceError(
                f"{folder} has only pickled weights (adapter_model.bin), which run code when they are opened",
                fix="save the adapter again with safetensors",
            )
        raise SourceError(f"{folder} lacks {ADAPTER_WEIGHTS}", fix="save or copy the adapter again")
    real = Path(os.path.realpath(weights))
    home = Path(os.path.realpath(folder))
    in_cache = home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs")
    if not (real.is_relative_to(home) or in_cache):
        raise SourceError(
            f"{weights} is a link to {real}, outside the folder", fix="copy the file into the folder"
        )
    _check_rank(folder / ADAPTER_CONFIG, config, read_shard(weights))


def _check_rank(path: Path, config: dict[str, Any], shard: Shard) -> None:
    largest = max((max(entry.shape, default=1) for entry in shard.tensors.values()), default=0)
    patterns = config.get("rank_pattern") or {}
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            raise SourceError(
                f"{path} says the rank is {rank!r}, but the largest dimension in its weights is {largest}",
                fix="restore the adapter_config.json that belongs to these weights",
            )
