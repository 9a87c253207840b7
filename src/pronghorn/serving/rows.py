"""The rows that models are held against each other on: a file, or the evaluation rows of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pronghorn.adapters.files import choose_adapter
from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import prepare
from pronghorn.errors import DataError
from pronghorn.loading.tokenizer import has_tokenizer, load_tokenizer
from pronghorn.sources.resolve import resolve, resolve_base
from pronghorn.training.config import load_config
from pronghorn.training.folder import RunFolder

# scored tokens: 2048 x 128k words of vocabulary in float32 are 1 GB of temporary file
MAX_TOKENS = 2048
IGNORED = -100
_MAX_ROW_TOKENS = 2048  # of a row; longer ones are cut


def scored_rows(
    rows: str | Path | None, places: Sequence[str | Path], tokenizer: Any
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of rows that have a scored token, until ``MAX_TOKENS`` are scored.

    Args:
        rows: a file of rows, as for training; None: the evaluation rows of a run.
        places: adapters, one of which lies in the folder of that run.
        tokenizer: its ``model_max_length`` cuts rows.

    Raises:
        DataError: there are no rows, or none of their tokens is scored.
    """
    if rows is not None:
        prepared = prepare(DataOptions(train=(str(rows),)), tokenizer, tokenizer.model_max_length).train
    else:
        prepared = _evaluation_rows(places, tokenizer)
    count = 0
    for row in prepared:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        here = sum(label != IGNORED for label in labels[1:])
        if here:
            count += here
            yield ids, labels
        if count >= MAX_TOKENS:
            return
    if not count:
        raise DataError("no token of the rows is scored", fix="give rows with an answer")


def write_rows(target: Path, rows: str | Path | None, against: Path, base: Path | None) -> None:
    """Write ``scored_rows`` as ``pronghorn.verify`` reads them: JSON lines of input_ids and labels.

    Args:
        target: the file.
        rows: a file of rows; None: the evaluation rows of the run ``against``.
        against: an adapter, or the folder of its run.
        base: where the base is; by default the place recorded with the adapter.

    Raises:
        DataError: there are no rows, or none of their tokens is scored.
        SourceError, AdapterError: the adapter or its base cannot be used.
    """
    adapter = resolve(choose_adapter(against, None))
    found = resolve_base(adapter, base=base, trust_remote_code=True)
    home = adapter.path if has_tokenizer(adapter.path) else found.path
    tokenizer = load_tokenizer(home, trust_remote_code=False)
    tokenizer.model_max_length = min(tokenizer.model_max_length, _MAX_ROW_TOKENS)
    with target.open("x", encoding="utf-8") as file:
        for ids, labels in scored_rows(rows, [adapter.path], tokenizer):
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


def _evaluation_rows(places: Sequence[str | Path], tokenizer: Any) -> Any:
    """The evaluation rows of the run in whose folder one of the places lies."""
    for place in places:
        config = RunFolder(Path(place).expanduser().absolute().parent).config
        if config.is_file():
            prepared = prepare(load_config(config).data, tokenizer, tokenizer.model_max_length).eval
            if prepared is not None:
                return prepared
    raise DataError(
        "there are no rows to compare on: no candidate lies in a run folder with evaluation rows",
        fix="name a file of rows (--rows FILE)",
    )
