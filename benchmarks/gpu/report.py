"""The results as Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.judge import predicted_context
from benchmarks.gpu.shapes import BATCHES

CAPACITIES_GIB = {"80 GB": 74.5, "141 GB": 131.3}


def markdown(result: dict[str, Any]) -> str:
    """Steps, contexts, ops and versions."""
    cells = [Cell(**cell) for cell in result["cells"]]
    rows = list(zip(cells, result["rows"], strict=True))
    parts = ["# One training step on one device", "", _facts(result), "", *_steps(rows, result["ceilings"])]
    parts += _contexts(rows)
    if result["ops"]:
        parts += ["", "## Ops against their floors", "", *_ops(result["ops"])]
    return "\n".join(parts) + "\n"


def _facts(result: dict[str, Any]) -> str:
    ceilings = result["ceilings"]
    found = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"Device: {result['device']}. Measured ceilings: {ceilings['matrix_tflops']:.4g} TFLOP/s of "
        f"{result['dtype']} products, {ceilings['copy_gbs']:.4g} GB/s copied. {found}.\n\n"
        "LoRA rank 16 on every linear, AdamW. A row counts (ok) only if its first losses and gradient norms "
        "are those of plain transformers + PEFT."
    )


def _steps(rows: list[tuple[Cell, dict[str, Any]]], ceilings: dict[str, float]) -> list[str]:
    lines = [
        "| contender | model | batch | tokens/s | step (min to max), ms | useful share of rate | peak GiB "
        "(tensors, predicted) | first loss | grad norm | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, row in rows:
        head = f"| {cell.contender} | {cell.shape} | {cell.batch} |"
        if "step_s" not in row:
            lines.append(f"{head} | | | | | | {row['status']}: {row['why']} |")
            continue
        times = f"{row['step_s'] * 1e3:.1f} ({row['step_s_min'] * 1e3:.1f} to {row['step_s_max'] * 1e3:.1f})"
        share = row["useful_tflops"] / ceilings["matrix_tflops"]
        peak = f"{row['peak_reserved_gib']:.2f}" if "peak_reserved_gib" in row else ""
        if "predicted_peak_gib" in row:
            measured = f"{row['peak_allocated_gib']:.2f}" if "peak_allocated_gib" in row else "not measured"
            peak += f" ({measured}, {row['predicted_peak_gib']:.2f})"
        verdict = row["status"] + (f": {row['why']}" if row["why"] else "")
        lines.append(
            f"{head} {row['tokens_per_s']:,.0f} | {times} | {share:.1%} | {peak} | "
            f"{row['losses'][0]:.4f} | {row['grad_norms'][0]:.4g} | {verdict} |"
        )
    return lines


def _contexts(rows: list[tuple[Cell, dict[str, Any]]]) -> list[str]:
    """Longest context of one document predicted from two of a contender's runs, checked by its longest."""
    lines = []
    for contender, shape in dict.fromkeys((cell.contender, cell.shape) for cell, _ in rows):
        peaks = sorted(
            (BATCHES[cell.batch].tokens, row["peak_reserved_gib"])
            for cell, row in rows
            if (cell.contender, cell.shape) == (contender, shape)
            and "peak_reserved_gib" in row
            and not cell.batch.endswith("packed")
        )
        peaks = [p for i, p in enumerate(peaks) if not i or p[0] != peaks[i - 1][0]]
        if len(peaks) < 2:
            continue
        fits = ", ".join(
            f"{predicted_context(peaks[0], peaks[1], gib):,} tokens on {name}"
            for name, gib in CAPACITIES_GIB.items()
        )
        lines.append(f"- {contender}, {shape}: {fits}, from {peaks[0][0]:,} and {peaks[1][0]:,} tokens.")
        if len(peaks) > 2:
            tokens, peak = peaks[-1]
            slope = (peaks[1][1] - peaks[0][1]) / (peaks[1][0] - peaks[0][0])
            expected = peaks[0][1] + slope * (tokens - peaks[0][0])
            lines.append(
                f"  Confirmed at {tokens:,} tokens: {expected:.2f} GiB predicted, {peak:.2f} measured."
            )
    return ["", "## Longest context", "", *lines] if lines else []


def _ops(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| op | by | time, us | floor, us | bound by | floor / time |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['op']} | {row['by']} | {row['us']:.1f} | {row['floor_us']:.1f} | {row['bound']} | "
            f"{row['floor_us'] / row['us']:.0%} |"
        )
    return lines
