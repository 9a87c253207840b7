"""Load, train, merge and load again, in this process, on tiny files."""

from __future__ import annotations

import json
from pathlib import Path

import pronghorn
from tests import tiny


def write_rows(path: Path, count: int = 24) -> Path:
    """Rows of questions and answers, enough for a few steps."""
    rows = [{"prompt": f"What comes after {n}?", "completion": f"{n + 1} follows."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_and_merge(folder: str) -> None:
    """From a base and rows to a verified merged folder, all under ``folder``."""
    home = Path(folder)
    base = tiny.write_base(home / "base", "llama")
    result = pronghorn.train(
        {
            "model": {"name": str(base), "max_seq_length": 64},
            "data": {"train": str(write_rows(home / "rows.jsonl")), "eval_fraction": 0.25},
            "lora": {"r": 4},
            "training": {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1},
            "logging": {"progress": "none"},
            "output": {"folder": str(home / "run")},
        }
    )
    pronghorn.export(result.adapter, home / "merged", verify=False)
    pronghorn.load(home / "merged")
    model, _ = pronghorn.FastLanguageModel.from_pretrained(str(result.adapter), max_seq_length=64)
    pronghorn.FastLanguageModel.for_inference(model)
