"""Rows in, tokenised training and evaluation rows out, with an account of what became of every row."""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from pronghorn.data.formats import RowError, Sample, detect_format, layouts, to_sample
from pronghorn.data.options import FORMATS, DataOptions, Format
from pronghorn.data.report import SHOWN, DataReport
from pronghorn.data.rows import BadRow, Row, Source, open_source
from pronghorn.data.store import ArrowFile, cache_key, cache_root, content_hash, keep, new_folder
from pronghorn.data.templates import ChatTemplate, choose_template
from pronghorn.data.tokens import EncodedRow, Encoder
from pronghorn.errors import DataError

BATCH = 1000  # rows rendered and tokenised at once: 0.5 MB of ids at 90 tokens a row
_CHAT_LAYOUTS = ("messages", "conversations", "instruction")


@dataclass(frozen=True)
class Prepared:
    """``datasets.Dataset`` with columns input_ids and labels (-100 where nothing trains)."""

    train: Any
    eval: Any | None
    report: DataReport


@dataclass
class _Tally:
    """Counts while rows stream past."""

    rows_read: int = 0
    bad: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    dropped: int = 0
    dropped_places: list[str] = field(default_factory=list)
    truncated: int = 0
    truncated_places: list[str] = field(default_factory=list)
    truncated_tokens: int = 0
    rewritten: int = 0
    longest: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def add_bad(self, row: BadRow) -> None:
        self.bad += 1
        if len(self.bad_rows) < SHOWN:
            self.bad_rows.append(row)

    def add_dropped(self, place: str) -> None:
        self.dropped += 1
        if len(self.dropped_places) < SHOWN:
            self.dropped_places.append(place)

    def add_truncated(self, place: str, lost: int) -> None:
        self.truncated += 1
        self.truncated_tokens += lost
        if len(self.truncated_places) < SHOWN:
            self.truncated_places.append(place)


def prepare(options: DataOptions, tokenizer: Any, max_length: int) -> Prepared:
    """Read, check, render, tokenise and mask the rows of a run.

    Args:
        options: the rows and how they train.
        tokenizer: the fast tokenizer of the base.
        max_length: tokens kept of each row.

    Raises:
        DataError: rows cannot be used (more than ``options.skip_bad``), mix formats, or none is left.
    """
    train = [open_source(name, options) for name in options.train]
    held = [open_source(name, options) for name in options.eval]
    layout = _layout([*train, *held], options)
    template = _template(layout, [*train, *held], tokenizer, options)
    data_hash = content_hash([*train, *held])
    root = cache_root()
    target = root / cache_key(data_hash, options, tokenizer, template, max_length)
    if options.cache and (target / "report.json").is_file():
        return _load(target, cached=True)
    folder = new_folder(root)
    try:
        tally = _Tally()
        encoder = Encoder(tokenizer, template, options, max_length)
        hashes = _write(folder / "train.arrow", train, layout, encoder, tally)
        eval_rows = len(_write(folder / "eval.arrow", held, layout, encoder, tally)) if held else 0
        _refuse_bad(tally, options)
        chosen = _held_out(hashes, options.eval_fraction)
        report = DataReport(
            format=layout,
            sources=(*options.train, *options.eval),
            train_rows=len(hashes) - len(chosen),
            eval_rows=eval_rows + len(chosen),
            max_length=max_length,
            data_hash=data_hash,
            template=template.origin if template else None,
            template_hash=template.hash if template else None,
            **_counts(tally),
        )
        _refuse_empty(report)
        (folder / "held_out.json").write_text(json.dumps(chosen))
        (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=1))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return _load(keep(folder, target) if options.cache else folder, cached=False)


def _layout(sources: list[Source], options: DataOptions) -> Format:
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
                return detect_format(_renamed(row, options))
            except RowError as error:
                reasons.append(row.bad(error.field, error.reason))
    raise DataError(
        "the format of the rows cannot be told:\n" + "\n".join(f"  {reason}" for reason in reasons[:SHOWN]),
        fix=f"set data.format to one of {', '.join(FORMATS)}, and data.rename for columns of other names",
    )


def _template(
    layout: Format, sources: list[Source], tokenizer: Any, options: DataOptions
) -> ChatTemplate | None:
    if layout in _CHAT_LAYOUTS:
        return choose_template(tokenizer, options.template, options.template_options)
    if layout == "prompt_completion":
        first = next((row for source in sources for row in source.read() if isinstance(row, Row)), None)
        if first is not None and not isinstance(_renamed(first, options).value.get("prompt"), str):
            return choose_template(tokenizer, options.template, options.template_options)
    return None


def _renamed(row: Row, options: DataOptions) -> Row:
    if not options.rename:
        return row
    return replace(row, value={options.rename.get(name, name): value for name, value in row.value.items()})


def _samples(
    sources: list[Source], layout: Format, options: DataOptions, tally: _Tally
) -> Iterator[tuple[Row, Sample]]:
    """Every row that says what to train on; the others are counted as bad."""
    for source in sources:
        for row in source.read():
            tally.rows_read += 1
            if isinstance(row, BadRow):
                tally.add_bad(row)
                continue
            row = _renamed(row, options)
            if options.format == "auto":
                _refuse_mixed(row, layout)
            try:
                yield row, to_sample(row, layout, options.system)
            except RowError as error:
                tally.add_bad(row.bad(error.field, error.reason))


def _refuse_mixed(row: Row, layout: Format) -> None:
    fits = layouts(row.value)
    if fits and fits != [layout]:
        raise DataError(
            f"the rows mix formats: the first is {layout}, {row.file}:{row.number} is {' and '.join(fits)} "
            f"(columns {', '.join(row.value)})",
            fix=f"use one format in all files, or set data.format={layout} to read every row as {layout}",
        )


def _write(path: Path, sources: list[Source], layout: Format, encoder: Encoder, tally: _Tally) -> array[int]:
    """Write all usable rows to ``path``; returns a 64-bit hash of each row written."""
    options = encoder.options
    hashes = array("Q")
    samples = _samples(sources, layout, options, tally)
    with ArrowFile(path) as file:
        while batch := list(islice(samples, BATCH)):
            if tally.bad > options.skip_bad:
                continue  # the run is refused: only count what else is wrong
            kept: list[EncodedRow] = []
            for (row, _), result in zip(batch, encoder.encode([sample for _, sample in batch]), strict=True):
                if isinstance(result, RowError):
                    tally.add_bad(row.bad(result.field, result.reason))
                else:
                    kept.extend(encoded for encoded in result if _keeps(encoded, row, encoder, tally))
            file.write([row.input_ids for row in kept], [row.labels for row in kept])
            hashes.extend(_row_hash(row, options.seed) for row in kept)
    return hashes


def _keeps(encoded: EncodedRow, row: Row, encoder: Encoder, tally: _Tally) -> bool:
    place = f"{row.file}:{row.number}"
    tally.longest = max(tally.longest, encoded.full_length)
    lost = encoded.full_length - len(encoded.input_ids)
    trained = encoded.trained
    if trained == 0 or (lost and encoder.options.too_long == "drop"):
        tally.add_dropped(place)
        return False
    if lost:
        tally.add_truncated(place, lost)
    tally.rewritten += "rewritten" in encoded.flags
    tally.tokens += len(encoded.input_ids)
    tally.trained_tokens += trained
    return True


def _row_hash(row: EncodedRow, seed: int) -> int:
    digest = hashlib.blake2b(
        array("i", row.input_ids).tobytes(), digest_size=8, key=seed.to_bytes(8, "big", signed=True)
    )
    return int.from_bytes(digest.digest(), "big")


def _held_out(hashes: array[int], fraction: float) -> list[int]:
    """Rows set aside: those of smallest hash, so that equal rows never part and order does not matter."""
    if not fraction or len(hashes) < 2:
        return []
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    count = max(1, round(fraction * len(hashes)))
    limit = hashes[order[count - 1]]
    return sorted(index for index in order if hashes[index] <= limit)


def _counts(tally: _Tally) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(tally).items()}


def _refuse_bad(tally: _Tally, options: DataOptions) -> None:
    if tally.bad <= options.skip_bad:
        return
    shown = "\n".join(f"  {row}" for row in tally.bad_rows)
    more = f"\n  ... and {tally.bad - len(tally.bad_rows)} more" if tally.bad > len(tally.bad_rows) else ""
    raise DataError(
        f"{tally.bad} of {tally.rows_read} rows cannot be used"
        + (f" (data.skip_bad allows {options.skip_bad})" if options.skip_bad else "")
        + f":\n{shown}{more}",
        fix=f"correct these rows, or leave them out with data.skip_bad={tally.bad}",
    )


def _refuse_empty(report: DataReport) -> None:
    if report.train_rows:
        return
    if report.dropped:
        raise DataError(
            f"no row is left to train on: of {report.rows_read} rows, {report.dropped} keep no trained token "
            f"within {report.max_length} tokens (the longest has {report.longest})",
            fix="raise max_length, or shorten the prompts",
        )
    raise DataError(
        f"no row to train on in {', '.join(report.sources)}", fix="give files with at least one usable row"
    )


def _load(folder: Path, *, cached: bool) -> Prepared:
    from datasets import Dataset

    report = DataReport.from_dict(json.loads((folder / "report.json").read_text()))
    train = Dataset.from_file(str(folder / "train.arrow"))
    chosen = json.loads((folder / "held_out.json").read_text())
    held = None
    if chosen:
        aside = set(chosen)
        held = train.select(chosen)
        train = train.select([index for index in range(len(train)) if index not in aside])
    elif (folder / "eval.arrow").is_file():
        held = Dataset.from_file(str(folder / "eval.arrow"))
    return Prepared(train, held, replace(report, cached=cached))
