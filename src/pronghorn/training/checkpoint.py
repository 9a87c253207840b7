"""Sealed checkpoints: complete, listed with sha256, synced, renamed to step-N; found again, checked, rotated.

The folder the Trainer writes is scratch. A checkpoint exists from the rename on, and whatever has that name
was whole then; the digests in its MANIFEST.json show what happened to it since.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.errors import TrainingError
from pronghorn.weights.writer import StagedFolder, sync_path

MANIFEST_NAME = "MANIFEST.json"
PROGRESS_NAME = "progress.json"

# without any one of these a run cannot go on bit for bit
REQUIRED_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    PROGRESS_NAME,
)
_UNUSED_FILES = ("training_args.bin",)  # a raw pickle that resuming never reads
_RNG = "rng_state.pth"
_RNG_OF_ONE = re.compile(r"rng_state_\d+\.pth")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A sealed folder and the number of optimizer steps it stands after."""

    step: int
    path: Path

    def progress(self) -> dict[str, Any]:
        """What pronghorn itself needs to go on (tokens so far, digest of the trained weights)."""
        return dict(json.loads((self.path / PROGRESS_NAME).read_text(encoding="utf-8")))


def seal(written: Path, checkpoints: Path, step: int, progress: dict[str, Any]) -> Checkpoint:
    """Turn the Trainer's folder ``written`` into ``checkpoints/step-N``.

    Raises:
        TrainingError: a file needed to resume is missing from ``written``; nothing appears.
        OSError: the disk is full; nothing appears.
    """
    target = checkpoints / f"step-{step}"
    shutil.rmtree(target, ignore_errors=True)  # only ever a damaged one: a valid one would have been resumed
    with StagedFolder(target) as staging:
        for path in sorted(written.iterdir()):
            if path.name not in _UNUSED_FILES:
                path.rename(staging / path.name)
        (staging / PROGRESS_NAME).write_text(json.dumps(progress, indent=2), encoding="utf-8")
        missing = _missing(path.name for path in staging.iterdir() if path.is_file())
        if missing:
            raise TrainingError(
                f"the checkpoint of step {step} lacks {', '.join(missing)}",
                fix="the installed transformers saves other files than expected: please report its version",
            )
        files = {
            path.relative_to(staging).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        }
        (staging / MANIFEST_NAME).write_text(
            json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8"
        )
    shutil.rmtree(written, ignore_errors=True)
    return Checkpoint(step, target)


def damage(path: Path) -> str:
    """Why a checkpoint cannot be used, naming the file; empty when every file is as it was sealed."""
    try:
        files = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        listed = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_NAME} is not readable"
    if missing := _missing(listed):
        return f"{missing[0]} is missing"
    for name, (size, digest) in listed.items():
        file = path / name
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, sealed were {size}"
            if _sha256(file) != digest:
                return f"{name} differs from what was sealed (sha256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return ""


def _missing(names: Iterable[str]) -> list[str]:
    """Required files that are not among ``names``; of several processes each has random numbers of its
    own."""
    there = {_RNG if _RNG_OF_ONE.fullmatch(name) else name for name in names}
    return [name for name in REQUIRED_FILES if name not in there]


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every step-N in ``folder``, newest first, not yet checked."""
    if not folder.is_dir():
        return []
    matches = [(path, _STEP.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    found = [Checkpoint(int(match.group(1)), path) for path, match in matches if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True)


def newest_valid(folder: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that is as it was sealed; damaged ones are told (file and reason)."""
    for checkpoint in list_checkpoints(folder):
        reason = damage(checkpoint.path)
        if not reason:
            return checkpoint
        tell(f"skipping damaged checkpoint {checkpoint.path}: {reason}")
    return None


def rotate(folder: Path, keep: int) -> None:
    """Remove what is older than the ``keep`` newest valid checkpoints: first a rename, then a delete."""
    valid = 0
    for checkpoint in list_checkpoints(folder):
        if valid >= keep:
            trash = folder / f".trash-{checkpoint.path.name}"
            shutil.rmtree(trash, ignore_errors=True)
            checkpoint.path.rename(trash)
            sync_path(folder)
            shutil.rmtree(trash, ignore_errors=True)
        elif not damage(checkpoint.path):
            valid += 1


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
