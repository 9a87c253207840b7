"""How reports and progress look on a terminal: one kind of table and of bar for every verb."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
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


@contextmanager
def byte_bar(label: str, afterwards: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is moved by a call with (bytes done, bytes in all); at the end it says ``afterwards``.

    It is drawn on a terminal only, and goes with the block.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def move(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, description=label if done < total else afterwards)

        yield move


def _cell(value: object) -> Text:
    if value is None or isinstance(value, bool):
        text, style = _MARKS[value]
        return Text(text, style=style)
    return Text(str(value))
