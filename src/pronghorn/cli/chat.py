"""``pronghorn chat``: ask a folder a question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pronghorn.serving.chat import Chat


def chat(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A model or an adapter (its base is found): folder or hub id."),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Ask this once; without it, an interactive chat.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of an adapter; by default the one recorded with it.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop an answer after so many tokens.")] = 256,
) -> None:
    """Ask a model or an adapter through its own chat template; the answer appears as it is written."""
    from pronghorn.serving.chat import Chat

    session = Chat(folder, base=base, system=system, max_new_tokens=max_new_tokens)
    if prompt is not None:
        _answer(session, prompt)
        return
    typer.echo("An empty line or Ctrl+D ends the chat.")
    while question := _ask():
        _answer(session, question)


def _answer(session: Chat, question: str) -> None:
    for piece in session.ask(question):
        typer.echo(piece, nl=False)
    typer.echo()


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
