"""metrics.jsonl: one line per step and evaluation, continued on resume with no step doubled or missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pronghorn.training.folder import write_whole

# the Trainer's name -> ours; what is not listed is not kept
_TRAIN_KEYS = (
    ("loss", "loss"),
    ("learning_rate", "learning_rate"),
    ("grad_norm", "grad_norm"),
    ("mean_token_accuracy", "token_accuracy"),
    ("epoch", "epoch"),
)
_EVAL_KEYS = (
    ("eval_loss", "eval_loss"),
    ("eval_mean_token_accuracy", "eval_token_accuracy"),
    ("eval_tokens", "eval_tokens"),
    ("epoch", "epoch"),
)


class MetricsLog:
    """Appends rows to ``path``; every row has ``step`` and is one whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def continue_after(self, step: int) -> None:
        """Keep the rows up to ``step`` (the checkpoint resumed from) and drop what was logged after it."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_whole(self.path, "".join(_line(row) for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Add one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Put the rows on the disk: a checkpoint may only be sealed after the steps before it are."""
        with self.path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file, in order; a line cut by a crash is left out."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def row_from_logs(logs: dict[str, Any], step: int) -> dict[str, Any] | None:
    """A row from what the Trainer logs; None for logs that are neither a step nor an evaluation."""
    keys = _TRAIN_KEYS if "loss" in logs else _EVAL_KEYS if "eval_loss" in logs else ()
    if not keys:
        return None
    return {"step": step, **{ours: logs[theirs] for theirs, ours in keys if theirs in logs}}


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
