"""``pronghorn serve``: check a folder for vLLM, show the exact command, run it until it is stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pronghorn.serving.vllm import ServePlan


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder or an adapter folder.")],
    base: Annotated[
        str | None, typer.Option(help="An adapter's base; by default the one recorded with it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in requests.")] = None,
    vllm_python: Annotated[
        Path | None, typer.Option(help="The interpreter of the environment that has vLLM.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="vllm; or transformers: slow, one request at a time, only when asked for.")
    ] = "vllm",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    ready_seconds: Annotated[float, typer.Option(min=1, help="Give up when not ready by then.")] = 900,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the command; start nothing.")
    ] = False,
) -> None:
    """Serve a folder; exit non-zero, each reason named, where vLLM would refuse it or ignore a part of it."""
    from pronghorn.errors import ConfigError

    if engine == "transformers":
        _plain(folder, base, name or folder.resolve().name, port)
        return
    if engine != "vllm":
        raise ConfigError(f"--engine is {engine!r}", fix="choose vllm or transformers")
    from pronghorn.export.verify_engines import ENGINES
    from pronghorn.serving.vllm import find_vllm, plan_serving
    from pronghorn.serving.vllm import serve as run

    plan = plan_serving(folder, base=base, name=name)
    print_plan(plan)
    if dry_run:
        return
    found = find_vllm(vllm_python)
    tried = ENGINES["vllm"]
    if found.version.split(".")[:2] != tried.split(".")[:2]:
        typer.echo(f"note: the checks are those of vLLM {tried}, and this is {found.version}", err=True)
    typer.echo(f"vLLM {found.version} starts on port {port}; Ctrl+C stops it")
    code = run(plan, found, port=port, ready_seconds=ready_seconds, say=typer.echo)
    raise typer.Exit(code)


def print_plan(plan: ServePlan, told: str | None = None) -> None:
    """The command and the Python call, unfolded: they are copied; and each note that was not ``told`` yet."""
    typer.echo(f"serve:   {plan.line()}\npython:  {plan.python()}")
    for note in plan.notes:
        if note != told:
            typer.echo(f"note:    {note}")


def _plain(folder: Path, base: str | None, name: str, port: int) -> None:
    from pronghorn.serving.chat import Chat
    from pronghorn.serving.plain import make_server

    server = make_server(Chat(folder, base=base), name, port=port)
    typer.echo(f"ready: http://127.0.0.1:{server.server_port}/v1, model {name!r} (plain transformers)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return
    finally:
        server.server_close()
