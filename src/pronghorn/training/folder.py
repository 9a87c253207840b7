"""The run folder: its names, small files written whole or not at all, what a killed process left in it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.errors import RunConflictError
from pronghorn.training.lock import LOCK_NAME
from pronghorn.weights.writer import sync_path


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "run.yaml"

    @property
    def manifest(self) -> Path:
        """What the run was made from."""
        return self.root / "manifest.json"

    @property
    def page(self) -> Path:
        """What is trained on: figures, checks, and a few rows token by token."""
        return self.root / "inspect.html"

    @property
    def metrics(self) -> Path:
        """One JSON object per step and per evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds step-N, sealed."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The final adapter; its presence means that the run is finished."""
        return self.root / "adapter"

    @property
    def scratch(self) -> Path:
        """Where the Trainer writes; nothing in it counts."""
        return self.root / ".scratch"

    def create(self) -> None:
        """Make the folder, or accept an existing one that is empty or holds a run.

        Raises:
            RunConflictError: it holds something else, or cannot be made.
        """
        if self.root.exists() and not self.root.is_dir():
            raise RunConflictError(f"output.folder {self.root} is a file", fix="choose another output.folder")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunConflictError(
                f"output.folder {self.root} cannot be made: {error.strerror or error}",
                fix="choose an output.folder where you may write",
            ) from error
        foreign = sorted(
            path.name for path in self.root.iterdir() if path.name not in (LOCK_NAME, self.scratch.name)
        )
        if foreign and not self.config.exists():
            raise RunConflictError(
                f"output.folder {self.root} is not a run folder: no run.yaml, but {', '.join(foreign[:5])}",
                fix="choose another output.folder, or empty this one",
            )

    def clean(self) -> None:
        """Remove what a killed process left: scratch, trash, half-staged folders and half-written files."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        for parent in (self.root, self.checkpoints):
            if parent.is_dir():
                for path in parent.iterdir():
                    if (
                        path.name.startswith(".trash-")
                        or ".staging-" in path.name
                        or path.name.endswith(".partial")
                    ):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.checkpoints.mkdir(exist_ok=True)
        self.scratch.mkdir()


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a crash leaves the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_path(path.parent)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """``write_whole`` of indented JSON."""
    write_whole(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def extend_json(path: Path, key: str, value: dict[str, Any]) -> None:
    """Set one key of a JSON file, written whole again."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), key: value})
