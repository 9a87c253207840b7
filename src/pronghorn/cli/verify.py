"""``pronghorn verify``: the promises of a folder, the engines that serve it, and a repaired copy."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
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
        typer.Option(
            help="The adapter it was merged from, or its run; the whole model where there was none (with "
            "--deep: logits must be equal)."
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="With --deep --against: a file of rows whose loss must be equal, too; of a run, without it, "
            "its evaluation rows."
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base folder; by default the one recorded with the adapter.")
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option("--for", help="Engines that must serve it rightly, e.g. vllm,transformers,llama.cpp."),
    ] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="With --deep: the interpreter of a vLLM that opens it, too.")
    ] = None,
    llama_python: Annotated[
        Path | None,
        typer.Option(help="With --deep: the interpreter of a llama-cpp-python that opens it as GGUF, too."),
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(help="Write a repaired copy to this folder; with --base, from the base.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Exit with 0 although something could not be checked.")
    ] = False,
) -> None:
    """Check a folder; exit non-zero with the first broken promise, or the first failing engine, named."""
    from pronghorn.cli.tables import print_table
    from pronghorn.errors import ConfigError

    for option, given in (("--vllm-python", vllm_python), ("--llama-python", llama_python)):
        if given is not None and not deep:
            raise ConfigError(f"{option} opens the folder, and --deep was not given", fix="add --deep")
    if fix is not None:
        folder = _repaired(folder, fix, base)
    from pronghorn.export.verify import verify as run

    with TemporaryDirectory(prefix="pronghorn-") as scratch:
        report = run(
            folder,
            deep=deep,
            against=against,
            base=base,
            vllm_python=vllm_python,
            llama_python=llama_python,
            rows=_tokenised(Path(scratch) / "rows.jsonl", rows, against, base) if deep else rows,
        )
    report = report.asking(engines) if engines is not None else report
    if as_json:
        typer.echo(report.to_json())
    else:
        print_table(
            f"verify {report.folder} ({report.kind})",
            ("promise", "kept", "detail"),
            ((row.name, row.ok, row.detail) for row in report.rows),
        )
        if report.engines:
            print_table("engines, told from the files", ("engine", "serves it", "detail"),
                        ((one.name, one.ok, one) for one in report.engines))  # fmt: skip
    if engines is not None:
        report.raise_unless_served(engines)
    report.raise_if_broken(allow_unverified=allow_unverified)


def _tokenised(target: Path, rows: Path | None, against: Path | None, base: Path | None) -> Path | None:
    """The rows as ``verify`` takes them: those of the file, else those that the run was evaluated on."""
    from pronghorn.errors import DataError
    from pronghorn.export.verify import source_folder
    from pronghorn.serving.rows import write_rows
    from pronghorn.training.folder import RunFolder

    if against is None or (rows is None and not RunFolder(against).config.is_file()):
        return rows
    source_folder(against, rows)
    try:
        write_rows(target, rows, against, base)
    except DataError as error:
        if rows is not None:
            raise
        typer.echo(f"the loss of the run's evaluation rows is not compared: {error.message}", err=True)
        return None
    return target


def _repaired(folder: Path, target: Path, base: Path | None) -> Path:
    from pronghorn.export.repair import repair

    done = repair(folder, target, base=base)
    typer.echo(f"repaired copy of {folder}: {target}")
    for line in done.changes or ("nothing needed a repair",):
        typer.echo(f"  {line}")
    return target
