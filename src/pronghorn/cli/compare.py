"""``pronghorn compare``: two models or adapters on the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pronghorn.serving.compare import Measured

COLUMNS = ("model", "perplexity", "KL", "top-1", "tokens/s", "weights", "resident")


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The reference: a model or an adapter.")],
    second: Annotated[str, typer.Argument(metavar="B", help="What is held against it.")],
    rows: Annotated[
        Path | None,
        typer.Option(help="A file of rows; without it, the evaluation rows of the run that A or B lies in."),
    ] = None,
) -> None:
    """Compare two models, 16-bit, 4-bit, merged, or adapters: perplexity, KL, top-1, speed, memory."""
    from pronghorn.cli.tables import print_table
    from pronghorn.serving.compare import Candidate
    from pronghorn.serving.compare import compare as run

    measured = run((Candidate(first, first), Candidate(second, second)), rows)
    print_table(f"compared on {measured[0].tokens} tokens", COLUMNS, table_rows(measured))


def table_rows(measured: Iterable[Measured]) -> Iterable[tuple[object, ...]]:
    """A line of the table for each model."""
    for one in measured:
        yield (
            one.name,
            f"{one.perplexity:.4g}",
            "reference" if one.kl is None else f"{one.kl:.3g}",
            "" if one.agreement is None else f"{one.agreement:.2%}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.held_bytes / 1e6:,.1f} MB",
            "not known" if one.added_bytes is None else f"{one.added_bytes / 1e6:,.1f} MB",
        )
