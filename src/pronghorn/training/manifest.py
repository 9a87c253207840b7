"""manifest.json: what a run was made from, so that it is resumed with the same and can be repeated."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from pronghorn.adapters.record import library_versions
from pronghorn.errors import RunConflictError
from pronghorn.training.config import RunConfig
from pronghorn.training.folder import write_json

_LIBRARIES = ("pronghorn", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")

# keys of run.yaml that change nothing in the adapter, so they may change between two legs of a run
_FREE_KEYS = (
    "checkpoints.",
    "logging.",
    "output.folder",
    "data.cache",
    "eval.batch_size",
    "training.recompute",
    "training.over_budget",
)
# content that may have changed although run.yaml says the same
_CONTENT_KEYS = (
    "base.fingerprint",
    "data.data_hash",
    "data.template_hash",
    "data.packing",
    "trainable",
    "processes",
)
_ONE_PROCESS = 1  # what a manifest means that names no number


def run_versions() -> dict[str, str]:
    """Versions of Python and of every library that decides the numbers."""
    return {"python": platform.python_version(), **library_versions(_LIBRARIES)}


def trainable_tensors(model: Any) -> list[dict[str, Any]]:
    """Name, shape and dtype of each tensor that trains, in the model's order."""
    return [
        {"name": name, "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    ]


def require_same_config(old: dict[str, Any], new: RunConfig, folder: Path) -> None:
    """Compare the resolved configuration of a run folder with the one asked for now.

    Raises:
        RunConflictError: lists each key with its old and new value.
    """
    before, after = _flat(old), _flat(new.to_dict())
    lines = [
        f"{key}: {before.get(key, 'not set')!r} in the run folder, {after.get(key, 'not set')!r} now"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and not key.startswith(_FREE_KEYS)
    ]
    _refuse(lines, folder)


def require_same_content(path: Path, now: dict[str, Any]) -> None:
    """Compare the manifest of a run folder with what was loaded now: base, rows, template, trainable tensors.

    Raises:
        RunConflictError: lists what differs.
    """
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # killed before it was written, so before the first step
    except ValueError:
        raise RunConflictError(f"{path} is not valid JSON", fix="choose another output.folder") from None
    old, now = {"processes": _ONE_PROCESS, **old}, {"processes": _ONE_PROCESS, **now}
    lines = [
        f"{key}: {_brief(_at(old, key))} in the run folder, {_brief(_at(now, key))} now"
        for key in _CONTENT_KEYS
        if _at(old, key) != _at(now, key)
    ]
    _refuse(lines, path.parent)


def add_fallbacks(path: Path, fallbacks: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Add what one leg counted to the manifest: calls of replaced parts that ran the original, and why.

    Returns:
        The counts of all legs so far: kind of part -> reason -> calls.
    """
    manifest = json.loads(path.read_text(encoding="utf-8"))
    total: dict[str, dict[str, int]] = manifest["acceleration"]["fallbacks"]
    for kind, reasons in fallbacks.items():
        for reason, calls in reasons.items():
            counts = total.setdefault(kind, {})
            counts[reason] = counts.get(reason, 0) + calls
    write_json(path, manifest)
    return total


def changed_versions(path: Path) -> list[str]:
    """Libraries whose version changed since the run began: a resumed run may differ in its last bits."""
    try:
        old = json.loads(path.read_text(encoding="utf-8")).get("versions", {})
    except (FileNotFoundError, ValueError):
        return []
    now = run_versions()
    return [f"{name} {old[name]} -> {now.get(name, 'gone')}" for name in old if old[name] != now.get(name)]


def _refuse(lines: list[str], folder: Path) -> None:
    if lines:
        raise RunConflictError(
            "\n  ".join([f"{folder} holds a run of another configuration:", *lines]),
            fix="set these back to go on with that run, or choose another output.folder",
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay values."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}."))
    return flat


def _at(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _brief(value: Any) -> str:
    if value is None:
        return "none"
    return f"{len(value)} tensors" if isinstance(value, list) else repr(value)
