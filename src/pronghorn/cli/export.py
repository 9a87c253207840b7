"""``pronghorn export``: adapter in, complete and verified folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pronghorn.export.job import Watch
    from pronghorn.export.report import ExportReport
    from pronghorn.serving.hub import Push, Pushed


def export(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="The trained adapter, or its run: a folder or a hub id. To quantise, a whole model, too.",
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="merged_16bit; w4a16, w8a8, fp8, nvfp4 (quantised); gguf-q8_0, gguf-q4_k_m, ..., gguf-lora; "
            "adapter (portable); lora (as it is).",
        ),
    ] = "merged_16bit",
    base: Annotated[
        str | None, typer.Option(help="The base; by default the one recorded with the adapter.")
    ] = None,
    onto: Annotated[
        str, typer.Option(help="Of a base in 4-bit: the decoded values trained on, or the original ones.")
    ] = "decoded",
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Of a multimodal base: the language model alone.")
    ] = False,
    llama_python: Annotated[
        Path | None,
        typer.Option(help="The Python that has llama_cpp, for the GGUF formats that its quantiser makes."),
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Rows on which GPTQ (llm-compressor) chooses the codes of w4a16.")
    ] = None,
    calibrate_python: Annotated[
        Path | None, typer.Option(help="The Python that has llmcompressor, where it is not this one.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing folder (and what REPO holds).")
    ] = False,
    adapter_name: Annotated[
        str | None, typer.Option(help="Which adapter, where the folder holds several.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload it meanwhile, visible once verified; see pronghorn push."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a private repository.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not check the result.")] = False,
) -> None:
    """Merge an adapter into its base, file to file, and verify the result in a fresh process."""
    from pronghorn.export.onto import MergeFormat
    from pronghorn.export.run import export as run

    place = _place(push, private, overwrite)
    wanted = MergeFormat(
        format_,
        onto,  # type: ignore[arg-type]  # it checks itself
        llama_python,
        text_only=text_only,
        calibrate=calibrate,
        calibrate_python=calibrate_python,
    )

    def write(watch: Watch) -> ExportReport:
        return run(
            adapter,
            target,
            format=wanted,
            base=base,
            overwrite=overwrite,
            adapter_name=adapter_name,
            verify=not no_verify,
            progress=watch,
        )

    report, pushed = _watched(write, place, "finishing" if no_verify else "verifying in a fresh process")
    _print(report, f"export {adapter} -> {target}", onto)
    if pushed is not None:
        typer.echo(pushed)


def _place(repo: str | None, private: bool, overwrite: bool) -> Push | None:
    from pronghorn.errors import ConfigError
    from pronghorn.serving.hub import Push

    if private and repo is None:
        raise ConfigError("--private is for a repository, and --push names none", fix="add --push REPO")
    return Push(repo, None, private or None, overwrite) if repo is not None else None


def _print(report: ExportReport, title: str, onto: str) -> None:
    """What was written, checked and lost, and how it is served."""
    from pronghorn.cli.tables import print_table

    print_table(title, ("what", "value"), _rows(report))
    if report.checks:
        print_table(
            "verified", ("promise", "kept", "detail"), ((row.name, True, row.detail) for row in report.checks)
        )
    if report.quality:
        before = "base" if report.whole else "base + adapter"
        print_table("what quantising cost", ("measure", before, report.format), report.quality)
    if report.onto is not None:
        _print_drift(report, onto)
    _print_llama_cpp(report) if report.format.startswith("gguf-") else _print_serving(report)


def _watched(
    write: Callable[[Watch], ExportReport], place: Push | None, afterwards: str
) -> tuple[ExportReport, Pushed | None]:
    """Export under a bar, and push it where asked."""
    from pronghorn.cli.tables import byte_bar
    from pronghorn.export.job import Watch
    from pronghorn.serving.push import push_export

    with byte_bar("writing", afterwards) as progress:
        if place is None:
            return write(Watch(progress)), None
        return push_export(place, write, progress=progress)


def _print_llama_cpp(report: ExportReport) -> None:
    """How llama.cpp and Ollama take the files."""
    for file in sorted(report.folder.glob("*.gguf")):
        adapter = report.format == "gguf-lora"
        print(
            f"llama-server -m {'BASE.gguf --lora ' if adapter else ''}{file}{'' if adapter else ' --jinja'}"
        )
    if (report.folder / "Modelfile").is_file():
        print(f"ollama create {report.folder.name} -f {report.folder / 'Modelfile'}")


def _print_drift(report: ExportReport, onto: str) -> None:
    """How far what was written is from the model that was trained."""
    from pronghorn.cli.compare import COLUMNS, table_rows
    from pronghorn.cli.tables import print_table
    from pronghorn.errors import PronghornError
    from pronghorn.serving.compare import drift

    try:
        measured = drift(report, onto)
    except PronghornError as error:
        merge = f"pronghorn export {report.adapter} DIR --onto original, then " if report.is_adapter else ""
        folder = "DIR" if report.is_adapter else report.folder
        print(
            f"drift from the trained model was not measured: {error.message}\n"
            f"  fix: {merge}pronghorn compare {report.adapter} {folder} --rows FILE"
        )
        return
    print_table(
        f"drift from the trained model, on {measured[0].tokens} tokens", COLUMNS, table_rows(measured)
    )


def _print_serving(report: ExportReport) -> None:
    """How the result is served, where vLLM would serve it rightly; else the reason."""
    from pronghorn.cli.serve import print_plan
    from pronghorn.errors import PronghornError
    from pronghorn.serving.vllm import plan_serving

    try:
        print_plan(plan_serving(report.folder, base=report.base), told=report.onto)
    except PronghornError as error:
        typer.echo(f"not for vLLM: {error}")


def _rows(report: ExportReport) -> Iterator[tuple[str, object]]:
    yield "base", report.base
    yield "tensors merged / copied", f"{report.tensors_merged} / {report.tensors_copied}"
    yield "written", f"{report.bytes_written / 1e6:,.1f} MB"
    yield "time", f"{report.seconds:.1f} s" + (", verification included" if report.checks else "")
    if report.onto is not None:
        yield "onto", report.onto
    if report.changed_share is not None:
        yield "elements changed", f"{report.changed_share:.2%} of the merged tensors"
    yield from (("changed", change) for change in report.changes)
    yield from (("left out", name) for name in report.left_out)
    yield from (("warning", warning) for warning in report.warnings)
    yield "verified", report.verified
