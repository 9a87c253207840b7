"""What would be trained, before a step is run: the account of all rows, and a few of them token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pronghorn.data.options import DataOptions
from pronghorn.data.page import page
from pronghorn.data.prepare import Prepared, examine, examine_sources
from pronghorn.data.report import DataReport
from pronghorn.data.rows import Source, from_dataset, from_rows
from pronghorn.errors import DataError

BAR = 40  # characters of the longest bar
EXAMPLE_TOKENS = 2000  # of each example, what is shown


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text. ``special`` pieces are one special token each."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Example:
    """One training row as the model sees it; ``row`` counts from 1 in the training rows."""

    row: int
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]


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
            title = f"row {example.row}: {example.tokens} tokens, {example.trained} trained"
            yield Panel(Group(_coloured(example)), title=title, title_align="left")


def inspect_data(
    data: Any,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    examples: int = 5,
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
    prepared = _examined(data, tokenizer, limit, options)
    return Inspection(prepared.report, _examples(prepared, tokenizer, examples))


def _examined(data: Any, tokenizer: Any, limit: int, options: dict[str, Any]) -> Prepared:
    if isinstance(data, DataOptions):
        if options:
            raise DataError("options are given twice", fix="put them into the DataOptions")
        return examine(data, tokenizer, limit)
    source = _in_memory(data)
    if source is None:
        return examine(DataOptions(train=data, **options), tokenizer, limit)
    return examine_sources([source], [], DataOptions(train=source.name, **options), tokenizer, limit)


def _in_memory(data: Any) -> Source | None:
    if isinstance(data, (str, Path)):
        return None
    if hasattr(data, "cache_files") and hasattr(data, "with_format"):
        return from_dataset(data, "dataset")
    if isinstance(data, Sequence) and data and all(isinstance(row, Mapping) for row in data):
        return from_rows(data)
    return None


def _examples(prepared: Prepared, tokenizer: Any, count: int) -> tuple[Example, ...]:
    rows = len(prepared.train)
    chosen = sorted({index * rows // count for index in range(count)}) if rows and count > 0 else []
    special = frozenset(tokenizer.all_special_ids) | {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return tuple(_example(prepared.train[index], index + 1, tokenizer, special) for index in chosen)


def _example(row: Mapping[str, Any], number: int, tokenizer: Any, special: frozenset[int]) -> Example:
    ids, labels = list(row["input_ids"]), list(row["labels"])
    shown = list(zip(ids, labels, strict=True))[:EXAMPLE_TOKENS]
    pieces = []
    # Special tokens are pieces of their own, so that two in a row are seen as two.
    keyed = [
        (label != -100, token in special, at if token in special else -1)
        for at, (token, label) in enumerate(shown)
    ]
    for (trained, is_special, _), group in groupby(zip(keyed, shown, strict=True), key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, (token, _) in group], clean_up_tokenization_spaces=False)
        pieces.append(Piece(text, trained, is_special))
    if len(ids) > len(shown):
        pieces.append(Piece(f" … and {len(ids) - len(shown)} tokens more", False, False))
    return Example(number, len(ids), sum(label != -100 for label in labels), tuple(pieces))


def _coloured(example: Example) -> Text:
    text = Text()
    for piece in example.pieces:
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
        table.add_row(check.name, Text(*outcome), "" if check.passed else f"{check.meaning}: {check.rows}")
    return table
