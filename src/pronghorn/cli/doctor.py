"""``pronghorn doctor``: versions, drivers, and what is known not to work together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pronghorn.serving.doctor import Diagnosis


def doctor(
    vllm_python: Annotated[
        Path | None, typer.Option(help="Look at the environment of this interpreter, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at the installed libraries; exit with 1 where something is known to fail."""
    import json

    from pronghorn.serving.doctor import diagnose

    found = [diagnose(python) for python in ([None] if vllm_python is None else [None, vllm_python])]
    if as_json:
        typer.echo(json.dumps([one.as_dict() for one in found], indent=1))
    else:
        for one in found:
            _show(one)
    if not all(one.healthy for one in found):
        raise typer.Exit(1)


def _show(one: Diagnosis) -> None:
    from pronghorn.cli.tables import print_table

    said = one.as_dict()
    versions, gpus = said["versions"], said["gpus"]
    assert isinstance(versions, dict)
    assert isinstance(gpus, list)
    rows = [
        ("python", one.environment.python),
        *versions.items(),
        *(("GPU", gpu) for gpu in gpus or ["none"]),
    ]
    print_table(one.interpreter, ("what", "version"), rows)
    for finding in one.findings:
        typer.echo(f"{'FAILS' if finding.bad else 'note'}: {finding.what}")
        typer.echo(f"  fix: {finding.remedy} (source: {finding.source})")
    if not one.findings:
        typer.echo("nothing known to fail")
