"""``pronghorn chat``: ask a folder a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def chat(
    folder: Annotated[Path, typer.Argument(help="A model folder, or an adapter folder (its base is found).")],
    prompt: Annotated[
        str | None, typer.Option(help="Ask this once; without it, an interactive chat.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Apply this adapter to the model in FOLDER.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 256,
) -> None:
    """Answer through the folder's own chat template, with plain transformers, as text streams out."""
    from pronghorn.serving.chat import Chat

    session = Chat(folder, adapter=adapter, system=system, max_new_tokens=max_new_tokens)
    if prompt is not None:
        _answer(session, prompt)
        return
    typer.echo("An empty line or Ctrl+D ends the chat.")
    while question := _ask():
        _answer(session, question)


def _answer(session: object, question: str) -> None:
    from pronghorn.serving.chat import Chat

    assert isinstance(session, Chat)
    for piece in session.ask(question):
        typer.echo(piece, nl=False)
    typer.echo()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
