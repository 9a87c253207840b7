"""Preference and prompt-only rows as ``datasets`` that TRL's DPOTrainer and GRPOTrainer take as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pronghorn.data.layout import find_layout
from pronghorn.data.options import DataOptions
from pronghorn.data.preference import LAYOUTS, Compared
from pronghorn.data.preference_rows import examine_preferences
from pronghorn.data.prepare import Prepared, refuse
from pronghorn.data.rows import open_data
from pronghorn.errors import DataError


def rows_for_trl(data: Any, tokenizer: Any, *, max_length: int | None = None, **options: Any) -> Prepared:
    """Read and check rows; returns ``train``, ``eval`` (or None) and ``report``.

    ``train`` has the columns prompt, chosen and rejected, or prompt and all other columns of the rows. TRL
    makes of it the very ids that ``inspect_data`` shows, if ``max_length`` is also its own.

    Args:
        data: what ``inspect_data`` takes.
        tokenizer: the tokenizer given to the trainer.
        max_length: tokens of prompt and answer together; by default what the tokenizer says, at most 2048.
        **options: fields of ``DataOptions``.

    Raises:
        DataError: rows cannot be used, fail a check that stops a run, or are of another layout.
    """
    train, held, chosen = open_data(data, options)
    _refuse_options(chosen)
    layout = find_layout([*train, *held], chosen)
    if layout not in LAYOUTS:
        raise DataError(
            f"the rows are {layout}, neither preference (chosen and rejected) nor prompt-only",
            fix="pronghorn.train takes them as they are, and so does TRL's SFTTrainer",
        )
    limit = max_length or min(int(tokenizer.model_max_length), 2048)
    examined = examine_preferences(layout, train, held, chosen, tokenizer, limit)
    refuse(examined.report, chosen)
    evaluated = _dataset(examined.eval) if examined.eval else None
    return Prepared(_dataset(examined.train), evaluated, examined.report)


def _refuse_options(options: DataOptions) -> None:
    """What a trainer decides cannot be decided in the rows."""
    if options.template is not None:
        raise DataError(
            "data.template has no effect on the rows: TRL writes them with the tokenizer's own template",
            fix="give the tokenizer the template first, with get_chat_template(tokenizer, NAME)",
        )
    if options.template_options:
        raise DataError(
            "data.template_options have no effect on the rows",
            fix="give them to the trainer, or in a template",
        )


def _dataset(rows: list[Compared]) -> Any:
    """A ``datasets.Dataset`` of the rows.

    A table gives all messages the same keys, null where one has none, and templates write some of those
    nulls; columns whose messages differ in their keys are therefore kept as JSON.
    """
    from datasets import Dataset, concatenate_datasets

    columns = _columns([row.row() for row in rows])
    features = _features(columns) if rows[0].is_chat else None
    tables = [Dataset.from_dict(columns, features=features)]
    if others := _columns([row.others for row in rows]):
        try:
            tables.append(Dataset.from_dict(others))
        except (TypeError, ValueError) as error:  # Arrow's own errors are among them
            raise DataError(
                f"the columns {', '.join(others)} do not make a table: {error}",
                fix="give each column values of one type",
            ) from error
    return concatenate_datasets(tables, axis=1) if len(tables) > 1 else tables[0]


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _features(columns: Mapping[str, list[Any]]) -> Any:
    import datasets

    plain = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    features: dict[str, Any] = {}
    for name, values in columns.items():
        even = name != "tools" and all({*message} == {*plain[0]} for value in values for message in value)
        if not even and not hasattr(datasets, "Json"):
            raise DataError(
                f"the messages of column {name} have different keys, which this version of datasets would "
                "fill with nulls",
                fix="pip install -U datasets, or give all messages just role and content",
            )
        features[name] = plain if even else datasets.Json()
    return datasets.Features(features)
