"""``pronghorn verify``: does a folder keep the promises that every loader relies on?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[
        Path, typer.Argument(help="A model folder (merged or base), an adapter folder, or GGUF.")
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Load it in a fresh process and compare what it computes.")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="The adapter folder it was merged from (with --deep: logits must be equal)."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base folder; by default the one recorded with the adapter.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Exit with 0 although something could not be checked.")
    ] = False,
) -> None:
    """Check a folder; exit non-zero with the first broken promise named."""
    from pronghorn.export.verify import verify as run

    report = run(folder, deep=deep, against=against, base=base)
    if as_json:
        typer.echo(report.to_json())
    else:
        from pronghorn.cli.tables import print_table

        print_table(
            f"verify {report.folder} ({report.kind})",
            ("promise", "kept", "detail"),
            ((row.name, row.ok, row.detail) for row in report.rows),
        )
    report.raise_if_broken(allow_unverified=allow_unverified)
