"""How reports look on a terminal: one kind of table for every verb."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

_MARKS = {True: ("ok", "green"), False: ("BROKEN", "bold red"), None: ("not verified", "yellow")}


def print_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    """Print rows under a title. A cell that is True, False or None is shown as ok, BROKEN, not verified."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console(soft_wrap=False).print(table)


def _cell(value: object) -> Text:
    if value is None or isinstance(value, bool):
        text, style = _MARKS[value]
        return Text(text, style=style)
    return Text(str(value))
