"""Every kernel compiles for chips that are not here, without spills and with 64-bit addresses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
# two generations of NVIDIA's large chips, the small one of the newest, and AMD's: the rest is in the table
CHIPS = ("cuda:80", "cuda:90", "cuda:120", "hip:gfx942")


def gate(*chips: str) -> dict[str, Any]:
    """What the gate prints in a process of its own: here Triton may be an interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.kernel_gate", "--json", "--chips", *chips]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table() -> tuple[str, dict[tuple[str, str], str]]:
    """Triton's version and the cells of the committed table."""
    text = (ROOT / "benchmarks" / "results" / "kernel_gate.md").read_text(encoding="utf-8")
    version = re.findall(r"^Triton (\S+);", text, re.MULTILINE)[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[part.strip() for part in line] for line in lines]
    return version, {
        (row[0], chip): value for row in rows for chip, value in zip(head[1:], row[1:], strict=True)
    }


def test_kernels_compile_for_chips_that_are_not_here() -> None:
    result = gate(*CHIPS)
    rows = result["rows"]
    assert [row for row in rows if not row["passed"]] == []
    assert all(row["wide"] for row in rows) and any(row["matrix"] for row in rows)

    version, committed = table()
    assert {row["kernel"] for row in rows} == {kernel for kernel, _ in committed}, (
        "the table is old: make it again"
    )
    if version == result["triton"]:
        made = {(row["kernel"], row["chip"]): row["cell"] for row in rows}
        assert made == {place: value for place, value in committed.items() if place[1] in CHIPS}


def test_the_committed_table_has_no_failure() -> None:
    _, committed = table()
    assert {chip for _, chip in committed} == {
        "cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"
    }  # fmt: skip
    assert [place for place, value in committed.items() if "FAIL" in value] == []


@pytest.mark.slow
def test_every_chip_of_the_table() -> None:
    version, committed = table()
    result = gate(*sorted({chip for _, chip in committed}))
    assert [row for row in result["rows"] if not row["passed"]] == []
    if version == result["triton"]:
        assert {(row["kernel"], row["chip"]): row["cell"] for row in result["rows"]} == committed
