"""Which rows count: those whose losses and gradient norms are the plain run's."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.shapes import group

# Two bf16 runs of one model differ by the order of their roundings; a loss is a mean over many tokens.
LOSS_BOUND = 0.005
NORM_BOUND = 0.05

Row = dict[str, Any]


def judge(cells: list[Cell], rows: list[Row]) -> None:
    """Turn each "measured" into "ok" or "invalid", with the reason."""
    for cell, row in zip(cells, rows, strict=True):
        if row["status"] != "measured":
            continue
        why = _why_invalid(row, _reference(cell, cells, rows))
        row["status"], row["why"] = ("invalid", why) if why else ("ok", "")


def _reference(cell: Cell, cells: list[Cell], rows: list[Row]) -> Row | None:
    """The plain run on the same documents, whichever way they were cut into rows."""
    for contender in cell.references:
        for other, row in zip(cells, rows, strict=True):
            same = (other.shape, group(other.batch)) == (cell.shape, group(cell.batch))
            if other.contender == contender and same and "losses" in row:
                return row
    return None


def _why_invalid(row: Row, reference: Row | None) -> str:
    if not all(norm > 0 for norm in row["grad_norms"]):
        return f"gradient norms {row['grad_norms']}"
    if reference is None:
        return "no plain run of these documents to compare with"
    for name, bound in (("losses", LOSS_BOUND), ("grad_norms", NORM_BOUND)):
        for step, (mine, true) in enumerate(zip(row[name], reference[name], strict=True), 1):
            off = abs(mine - true) / abs(true) if true else float("inf")
            if not off <= bound:
                return f"step {step}: {name} {mine:.5g}, the plain run has {true:.5g}"
    return ""


def predicted_context(short: tuple[int, float], long: tuple[int, float], capacity_gib: float) -> int:
    """Tokens that fit: a line through (tokens, peak GiB) of two runs, a twentieth of the device kept free."""
    slope = (long[1] - short[1]) / (long[0] - short[0])
    fixed = short[1] - slope * short[0]
    return int((0.95 * capacity_gib - fixed) / slope) if slope > 0 else 0
