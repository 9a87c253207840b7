"""``pronghorn push``: a finished folder to the hub, in one commit and with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model, an adapter, or GGUF files.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME, or NAME for your own account.")],
    adapter: Annotated[
        Path | None,
        typer.Option(help="Of a merged model: the adapter, whose run the card tells of."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A private repository.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what the repository holds.")
    ] = False,
) -> None:
    """Check a folder's files and upload it; the token is that of `hf auth login`, or HF_TOKEN."""
    from pronghorn.serving.hub import Push
    from pronghorn.serving.push import push_folder

    typer.echo(push_folder(folder, Push(repo, None, private or None, overwrite), adapter=adapter))
