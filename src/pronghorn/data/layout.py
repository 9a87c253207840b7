"""Which layout the rows of a run have, and whether they need a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from pronghorn.data import preference
from pronghorn.data.formats import RowError, detect_format, layouts
from pronghorn.data.options import FORMATS, DataOptions, Format
from pronghorn.data.report import SHOWN
from pronghorn.data.rows import BadRow, Row, Source
from pronghorn.data.tally import Tally
from pronghorn.data.templates import ChatTemplate, choose_template
from pronghorn.errors import DataError

T = TypeVar("T")

_CHAT_LAYOUTS = ("messages", "conversations", "instruction")


def find_layout(sources: list[Source], options: DataOptions) -> Format:
    """The layout asked for, or that of the first row that fits one."""
    if options.format != "auto":
        return options.format
    reasons = []
    for source in sources:
        for row in islice(source.read(), SHOWN):
            if isinstance(row, BadRow):
                reasons.append(row)
                continue
            try:
                return detect_format(renamed(row, options))
            except RowError as error:
                reasons.append(row.bad(error.field, error.reason))
    raise DataError(
        "the format of the rows cannot be told:\n" + "\n".join(f"  {reason}" for reason in reasons[:SHOWN]),
        fix=f"set data.format to one of {', '.join(FORMATS)}, and data.rename for columns of other names",
    )


def find_template(
    layout: Format, sources: list[Source], tokenizer: Any, options: DataOptions
) -> ChatTemplate | None:
    """The template that rows of ``layout`` are written with; None for plain text."""
    if layout in _CHAT_LAYOUTS:
        return choose_template(tokenizer, options.template, options.template_options)
    first = next((row for source in sources for row in source.read() if isinstance(row, Row)), None)
    if first is None or layout == "text":
        return None
    value = renamed(first, options).value
    is_chat = (
        preference.is_chat(value)
        if layout in preference.LAYOUTS
        else not isinstance(value.get("prompt"), str)
    )
    return choose_template(tokenizer, options.template, options.template_options) if is_chat else None


def require_supervised(layout: Format) -> None:
    """Raise a DataError if rows of ``layout`` do not say what to write, but what to prefer or to answer."""
    if layout == "preference":
        raise DataError(
            "these are preference rows (chosen and rejected), and supervised training needs one answer",
            fix="give rows_for_trl(...).train to TRL's DPOTrainer; or train on the chosen answers alone: "
            "data.rename={chosen: completion}, or {chosen: messages} where they hold the prompt",
        )
    if layout == "prompt_only":
        raise DataError(
            "these rows are prompts without answers, and supervised training needs answers",
            fix="give rows_for_trl(...).train to TRL's GRPOTrainer; or add a column completion",
        )


def renamed(row: Row, options: DataOptions) -> Row:
    """The row with the column names pronghorn knows."""
    if not options.rename:
        return row
    return replace(row, value={options.rename.get(name, name): value for name, value in row.value.items()})


def usable(
    rows: Iterable[Row | BadRow], layout: Format, options: DataOptions, tally: Tally, read: Callable[[Row], T]
) -> Iterator[tuple[Row, T]]:
    """Every row that says what to train on, with what ``read`` makes of it; the others are counted as bad.

    Raises:
        DataError: a row has another layout than the first one.
    """
    for row in rows:
        tally.rows_read += 1
        if isinstance(row, BadRow):
            tally.add_bad(row)
            continue
        row = renamed(row, options)
        if options.format == "auto":
            refuse_mixed(row, layout)
        try:
            yield row, read(row)
        except RowError as error:
            tally.add_bad(row.bad(error.field, error.reason))


def refuse_mixed(row: Row, layout: Format) -> None:
    """Raise a DataError if the row has another layout than the first one."""
    fits = layouts(row.value)
    if fits == ["prompt_only"] and layout in ("prompt_completion", "preference"):
        return  # Parquet leaves out columns that are null: the row lacks its answer, and is named for that
    if fits and fits != [layout]:
        raise DataError(
            f"the rows mix formats: the first is {layout}, {row.file}:{row.number} is {' and '.join(fits)} "
            f"(columns {', '.join(row.value)})",
            fix=f"use one format in all files, or set data.format={layout} to read every row as {layout}",
        )
