"""One LoRA step on one GPU: speed and memory of pronghorn and its peers, and ops beside their floors.

    python -m benchmarks.gpu                              under 9 minutes; Llama-3.1-8B's shape
    python -m benchmarks.gpu --quick                      under 2 minutes
    python -m benchmarks.gpu --shape qwen3-8b --only pronghorn peft/*/2k
    python -m benchmarks.gpu --peer-path wheels           peers from a folder of unpacked wheels
    python -m benchmarks.gpu --device cpu --shape tiny    a dry run

Weights are random and made on the device: no network, no model files. Every cell runs in its own process.
Writes gpu.json and gpu.md into --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import ops
from benchmarks.gpu.cells import NF4_REFERENCES, OURS, REFERENCES, Cell, default_cells, select
from benchmarks.gpu.judge import judge
from benchmarks.gpu.report import markdown
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.step import versions

ROOT = Path(__file__).parents[2]
# seconds in which all cells end, and those without which none is begun
TOTAL_S, QUICK_S, SHORTEST_S = 530.0, 115.0, 15.0


def run_cell(cell: Cell, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Measure a cell in a process of its own, which is ended after ``seconds``."""
    peer = cell.contender not in (*OURS, *REFERENCES, *NF4_REFERENCES)
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    if peer and arguments.peer_path:
        paths.insert(0, str(arguments.peer_path.resolve()))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    python = str(arguments.peer_python) if peer and arguments.peer_python else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        command = [python, "-m", "benchmarks.gpu.step", json.dumps(cell.as_dict()), str(target)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return {"status": "failed", "why": f"not done after {seconds:.0f} s"}
        if arguments.verbose:
            print(done.stdout, done.stderr, sep="\n")
        if not target.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            return {"status": "failed", "why": last[0][:200]}
        row: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return row


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cells and the ops; cells that time leaves no room for are rows that say so."""
    began = time.perf_counter()
    dtype = arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16")
    cells = select(
        default_cells(arguments.shape, arguments.device, dtype, quick=arguments.quick), arguments.only
    )
    limits = ops.ceilings(arguments.device, getattr(torch, dtype))
    by_op = ops.table(arguments.device, getattr(torch, dtype), limits) if not arguments.no_ops else []
    if arguments.device != "cpu":
        torch.cuda.empty_cache()
    rows = []
    for cell in cells:
        left = began + (QUICK_S if arguments.quick else TOTAL_S) - time.perf_counter()
        if left < SHORTEST_S:
            rows.append({"status": "skipped", "why": "no time left"})
            continue
        rows.append(run_cell(cell, arguments, left))
        print(f"{cell.name}: {rows[-1].get('tokens_per_s', rows[-1].get('why'))}", flush=True)
    judge(cells, rows)
    device = platform.processor() if arguments.device == "cpu" else torch.cuda.get_device_name()
    found = {k: v for row in rows for k, v in row.get("versions", {}).items()} | versions()
    return {
        "device": f"{arguments.device} {device}".strip(), "dtype": dtype, "versions": found,
        "ceilings": limits,
        "cells": [cell.as_dict() for cell in cells], "rows": rows, "ops": by_op,
        "seconds": time.perf_counter() - began,
    }  # fmt: skip


def main(given: list[str] | None = None) -> int:
    """Measure, write, print; 1 if one of pronghorn's own rows does not count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--only", nargs="+", default=[], help="contender, or contender/shape/batch with *")
    parser.add_argument("--quick", action="store_true", help="fewer cells and steps")
    parser.add_argument("--no-ops", action="store_true", help="leave the table of ops out")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights")
    parser.add_argument("--peer-path", type=Path, help="folder to import peers from")
    parser.add_argument("--peer-python", type=Path, help="interpreter to run peers with")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--verbose", action="store_true", help="show what the cells print")
    arguments = parser.parse_args(given)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --shape tiny is the dry run")
    result = run(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.out / "gpu.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    ours = [
        row for cell, row in zip(result["cells"], result["rows"], strict=True) if cell["contender"] in OURS
    ]
    return 0 if all(row["status"] == "ok" for row in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
