"""``pronghorn export``: adapter in, complete and verified folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    adapter: Annotated[Path, typer.Argument(help="The trained adapter's folder.")],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    format_: Annotated[str, typer.Option("--format", help="What to write.")] = "merged_16bit",
    base: Annotated[
        str | None, typer.Option(help="The base; by default the one recorded with the adapter.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    adapter_name: Annotated[
        str | None, typer.Option(help="Which adapter, where the folder holds several.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check the result.")] = False,
) -> None:
    """Merge an adapter into its base, file to file, and verify the result in a fresh process."""
    from pronghorn.cli.tables import print_fields
    from pronghorn.export.run import export as run

    report = run(
        adapter,
        target,
        format=format_,
        base=base,
        overwrite=overwrite,
        adapter_name=adapter_name,
        verify=not no_verify,
    )
    print_fields(f"export {adapter} -> {target}", report)
