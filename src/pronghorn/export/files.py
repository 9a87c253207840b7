"""The files of an exported folder: which of the base's are copied, do they fit, where may they go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from pronghorn.errors import ExportError
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.writer import copy_file

# other copies of the weights (they would be the untrained ones), adapters, and leftovers of training
LEFT_OUT = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt",
    "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.pkl", "*.tflite", "*.npz",
    "adapter_config.json", "pronghorn.json", "trainer_state.json",
)  # fmt: skip
# room for directory entries and rounding up to blocks
_SPARE_BYTES = 16 * 2**20


def small_files(base: Path) -> tuple[list[Path], list[Path]]:
    """Files of the base beside its weights, relative to it: those that are copied, those left out."""
    copied: list[Path] = []
    left: list[Path] = []
    for root, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root, name).relative_to(base)
            if name.startswith("."):
                continue
            (left if any(fnmatch(name, pattern) for pattern in LEFT_OUT) else copied).append(path)
    return copied, left


def copy_into(source: Path, names: list[Path], staging: Path) -> None:
    """Copy files by their relative names, making the folders they need."""
    for name in names:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, staging / name)


def left_out(weights: WeightFolder, names: list[Path]) -> tuple[str, ...]:
    """What is left out and not written anew, for the report."""
    rewritten = {shard.path.name for shard in weights.shards}
    if weights.index is not None:
        rewritten.add(weights.index.name)
    return tuple(str(name) for name in names if str(name) not in rewritten)


def check_apart(target: Path, sources: dict[str, Path]) -> None:
    """Refuse a target that is, holds or lies within a folder that is read.

    Raises:
        ExportError: naming both.
    """
    real = Path(os.path.realpath(target))
    for name, folder in sources.items():
        other = Path(os.path.realpath(folder))
        if real == other or real in other.parents or other in real.parents:
            relation = "is" if real == other else "lies within" if other in real.parents else "holds"
            raise ExportError(
                f"the target {target} {relation} the {name} {folder}", fix="choose another target"
            )


def check_space(target: Path, needed_bytes: int) -> None:
    """Refuse to start where the disk cannot hold the result.

    Raises:
        ExportError: with both sizes.
    """
    place = next(_existing_parents(target))
    free = shutil.disk_usage(place).free
    if free < needed_bytes + _SPARE_BYTES:
        raise ExportError(
            f"{target} needs {_size(needed_bytes + _SPARE_BYTES)}, but its disk has {_size(free)} free",
            fix="free some space or choose a target on another disk",
        )


def _existing_parents(path: Path) -> Iterator[Path]:
    real = Path(os.path.realpath(path))
    for place in (real, *real.parents):
        if place.is_dir():
            yield place


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
