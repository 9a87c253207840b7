"""What would be trained, before a step is run: the account of all rows, and a few of them token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pronghorn.data.examples import Example, Piece, Shown
from pronghorn.data.layout import find_layout
from pronghorn.data.page import page
from pronghorn.data.preference import LAYOUTS
from pronghorn.data.preference_rows import examine_preferences
from pronghorn.data.prepare import examine_sources
from pronghorn.data.report import DataReport
from pronghorn.data.rows import open_data

EXAMPLES = 5  # rows shown token by token, if nobody says how many
BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Inspection:
    """What a run on these rows would train on. Prints itself with rich."""

    report: DataReport
    examples: tuple[Example, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"report": self.report.as_dict(), "examples": [asdict(example) for example in self.examples]}

    def show(self) -> None:
        """Print to the terminal."""
        Console().print(self)

    def html(self) -> str:
        """A page that stands by itself: no script, nothing loaded from elsewhere."""
        return page(self.as_dict())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.report
        yield _histogram(self.report)
        yield _checks(self.report)
        yield Text.assemble("Examples: ", ("trained tokens", "green"), ", ", ("special tokens", "reverse"))
        for example in self.examples:
            yield _panel(example)


def inspect_data(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    examples: int = EXAMPLES,
    **options: Any,
) -> Inspection:
    """Show what training on ``data`` would train on; bad rows and failed checks stop nothing.

    Args:
        data: a file, folder or hub id, several of them, ``DataOptions``, a list of rows, or a ``Dataset``.
        tokenizer: the tokenizer of the base.
        max_length: tokens kept of each row; by default what the tokenizer says, at most 2048.
        examples: how many rows are shown token by token, spread evenly.
        **options: fields of ``DataOptions``, e.g. ``loss_on="last_assistant"``.

    Raises:
        DataError: the rows cannot be found, or mix formats.
    """
    limit = max_length or min(int(tokenizer.model_max_length), 2048)
    train, held, chosen = open_data(data, options)
    layout = find_layout([*train, *held], chosen)
    shown = Shown(tokenizer, examples)
    if layout in LAYOUTS:
        examined = examine_preferences(layout, train, held, chosen, tokenizer, limit)
        return Inspection(examined.report, shown.preferences(examined))
    prepared = examine_sources(train, held, chosen, tokenizer, limit)
    return Inspection(prepared.report, shown.rows(prepared.train))


def _panel(example: Example) -> Panel:
    """A row; of a preference row the prompt, and below it both answers side by side."""
    parts: list[RenderableType] = [_coloured(example.pieces)]
    if example.answers:
        sides = Table.grid(padding=(0, 2), expand=True)
        for _ in example.answers:
            sides.add_column(ratio=1, overflow="fold")
        sides.add_row(*[Text(f"{one.side}: {one.tokens} tokens", style="bold") for one in example.answers])
        sides.add_row(*[_coloured(answer.pieces) for answer in example.answers])
        parts += [Text(), sides]
    title = f"row {example.row}: {example.tokens} tokens, {example.trained} trained"
    return Panel(Group(*parts), title=title, title_align="left")


def _coloured(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        colour = "green" if piece.trained else "dim"
        text.append(piece.text.replace("\n", "↵\n"), style=f"{colour} reverse" if piece.special else colour)
    return text


def _histogram(report: DataReport) -> Table:
    table = Table(title="Length in tokens before cutting", title_justify="left", show_header=False, box=None)
    most = max((count for _, count in report.histogram), default=1)
    for low, count in report.histogram:
        over = " over the limit" if low >= report.max_length else ""
        table.add_row(f"{low}+", "█" * -(-BAR * count // most), f"{count}{over}")
    return table


def _checks(report: DataReport) -> Table:
    table = Table(title="Checks", title_justify="left", show_header=False)
    for check in report.checks:
        outcome = (
            ("passed", "green")
            if check.passed
            else ("stops", "bold red")
            if check.stops
            else ("warns", "yellow")
        )
        table.add_row(check.name, Text(*outcome), "" if check.passed else str(check).partition(": ")[2])
    return table
