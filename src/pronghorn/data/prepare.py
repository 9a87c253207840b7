"""Rows in, tokenised training and evaluation rows out, with an account of what became of every row."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pronghorn.data.checks import run_checks
from pronghorn.data.chunks import Part, chunks
from pronghorn.data.crew import done, workers_for
from pronghorn.data.layout import find_layout, find_template, require_supervised
from pronghorn.data.options import DataOptions
from pronghorn.data.packing import write_bins
from pronghorn.data.progress import Progress, Say
from pronghorn.data.report import DataReport
from pronghorn.data.rows import Source, open_source
from pronghorn.data.store import cache_key, cache_root, content_hash, folder_for, keep, read_shard
from pronghorn.data.tally import PartTally, Tally
from pronghorn.data.tokens import check_tokenizer
from pronghorn.data.work import Job
from pronghorn.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """``datasets.Dataset`` with columns input_ids and labels (-100 where nothing trains).

    ``bins`` is ``train`` packed, if that was asked for: one row per bin, and ``lengths`` of the rows in it.
    """

    train: Any
    eval: Any | None
    report: DataReport
    bins: Any | None = None


def prepare(options: DataOptions, tokenizer: Any, max_length: int, *, say: Say | None = None) -> Prepared:
    """Read, check, render, tokenise and mask the rows of a run.

    Args:
        options: the rows and how they train.
        tokenizer: the fast tokenizer of the base.
        max_length: tokens kept of each row.
        say: told every few seconds how far it is.

    Raises:
        DataError: rows cannot be used (more than ``options.skip_bad``), mix formats or fail a check not
            in ``options.allow``, or none is left.
    """
    prepared = examine(options, tokenizer, max_length, say=say)
    refuse(prepared.report, options)
    return prepared


def examine(options: DataOptions, tokenizer: Any, max_length: int, *, say: Say | None = None) -> Prepared:
    """Like ``prepare``, for looking: bad rows and failed checks are in the report and stop nothing."""
    train = [open_source(name, options) for name in options.train]
    held = [open_source(name, options) for name in options.eval]
    return examine_sources(train, held, options, tokenizer, max_length, say=say)


def examine_sources(
    train: list[Source],
    held: list[Source],
    options: DataOptions,
    tokenizer: Any,
    max_length: int,
    *,
    say: Say | None = None,
) -> Prepared:
    """``examine`` for rows that are already open; ``options.train`` and ``options.eval`` only name them."""
    check_tokenizer(tokenizer)
    budget = _budget(options, max_length)
    layout = find_layout([*train, *held], options)
    require_supervised(layout)
    template = find_template(layout, [*train, *held], tokenizer, options)
    data_hash = content_hash([*train, *held])
    target = cache_root() / cache_key(data_hash, options, tokenizer, template, max_length)
    if options.cache and (target / "report.json").is_file():
        return _load(target, cached=True)
    job = Job(tokenizer, template, layout, options, max_length)
    with folder_for(target, resume=options.cache) as folder:
        tally, trained, evaluated = _tokenise(job, folder, train, held, say)
        chosen = held_out(trained.hashes, options.eval_fraction, options.seed)
        report = report_of(job, (tally, trained, evaluated), len(chosen), data_hash)
        (folder / "held_out.json").write_text(json.dumps(chosen))
        if budget:
            packing = write_bins(_rows(folder)[0], folder / "bins.arrow", budget, options.seed)
            report = replace(report, packing=packing)
        (folder / "report.json").write_text(json.dumps(report.as_dict(), indent=1))
        folder = keep(folder, target)
    return _load(folder, cached=False)


def report_of(job: Job, counts: tuple[Tally, PartTally, PartTally], aside: int, data_hash: str) -> DataReport:
    """The account of all rows: ``counts`` of all, of those to train and of those to evaluate on.

    ``aside``: rows to train on that were set aside to evaluate on.
    """
    (tally, trained, evaluated), template = counts, job.template
    return DataReport(
        format=job.layout,
        sources=(*job.options.train, *job.options.eval),
        rows_read=tally.rows_read,
        train_rows=len(trained.hashes) - aside,
        eval_rows=len(evaluated.hashes) + aside,
        bad=tally.bad,
        bad_rows=tuple(tally.bad_rows),
        dropped=tally.dropped.places(),
        truncated=tally.truncated.places(),
        truncated_tokens=tally.truncated_tokens,
        rewritten=tally.flagged["rewritten"].places(),
        max_length=job.max_length,
        longest=tally.longest,
        histogram=tally.histogram(),
        tokens=tally.tokens,
        trained_tokens=tally.trained_tokens,
        checks=run_checks(tally, trained, evaluated, job.tokenizer, template, job.layout),
        data_hash=data_hash,
        template=template.origin if template else None,
        template_hash=template.hash if template else None,
    )


def _tokenise(
    job: Job, folder: Path, train: list[Source], held: list[Source], say: Say | None
) -> tuple[Tally, PartTally, PartTally]:
    """Write all shards; what became of the rows, and where those to train and to evaluate on came from."""
    total, parts = Tally(), {"train": PartTally(), "eval": PartTally()}
    total.names = [source.name for source in (*train, *held)]
    files = [path for source in (*train, *held) for path in source.files]
    size = sum(path.stat().st_size for path in files)
    workers = workers_for(job.options.workers, size)
    by_lines = bool(files) and all(path.suffix.lower() == ".jsonl" for path in files)
    progress = Progress(size if by_lines else None, workers, say)
    for chunk in done(chunks(train, held), job, folder, workers):
        tally, part = read_shard(folder, chunk.shard)
        total.merge(tally)
        parts[chunk.part].add(part)
        progress.add(len(chunk.items), chunk.size)
    return total, parts["train"], parts["eval"]


def _budget(options: DataOptions, max_length: int) -> int | None:
    """Tokens of one bin, None without packing."""
    if not options.packing:
        return None
    budget = options.pack_tokens or max_length
    if budget < max_length:
        raise DataError(
            f"data.pack_tokens is {budget}, but a row may have {max_length} tokens, and rows are never split",
            fix=f"set data.pack_tokens to {max_length} or more, or lower model.max_seq_length",
        )
    return budget


def held_out(hashes: array[int], fraction: float, seed: int) -> list[int]:
    """Rows set aside: those of smallest seeded hash. Equal rows never part, and order does not matter."""
    if not fraction or len(hashes) < 2:
        return []
    key = str(seed).encode()
    digests = (hashlib.blake2b(value.to_bytes(8, "big"), digest_size=8, key=key).digest() for value in hashes)
    keys = np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64, len(hashes))
    count = max(1, round(fraction * len(hashes)))
    held: list[int] = np.flatnonzero(keys <= np.sort(keys)[count - 1]).tolist()
    return held


def refuse(report: DataReport, options: DataOptions) -> None:
    """Raise a DataError if a run on these rows must not start."""
    _refuse_bad(report, options)
    _refuse_failed(report, options)
    _refuse_empty(report)


def _refuse_bad(report: DataReport, options: DataOptions) -> None:
    if report.bad <= options.skip_bad:
        return
    shown = "\n".join(f"  {row}" for row in report.bad_rows)
    more = report.bad - len(report.bad_rows)
    allowed = f" (data.skip_bad allows {options.skip_bad})" if options.skip_bad else ""
    raise DataError(
        f"{report.bad} of {report.rows_read} rows cannot be used{allowed}:\n{shown}"
        + (f"\n  ... and {more} more" if more else ""),
        fix=f"correct these rows, or leave them out with data.skip_bad={report.bad}",
    )


def _refuse_failed(report: DataReport, options: DataOptions) -> None:
    failed = [check for check in report.failed(stops=True) if check.name not in options.allow]
    if failed:
        names = ",".join(check.name for check in failed)
        raise DataError(
            "the rows fail checks that would spoil the model:\n"
            + "\n".join(f"  {check}" for check in failed),
            fix=f"look at them with `pronghorn inspect`; to train all the same: data.allow=[{names}]",
        )


def _refuse_empty(report: DataReport) -> None:
    if report.train_rows:
        return
    if report.dropped.count:
        raise DataError(
            f"no row is left to train on: of {report.rows_read} rows, {report.dropped.count} keep no trained "
            f"token within {report.max_length} tokens (the longest has {report.longest})",
            fix="raise max_length, or shorten the prompts",
        )
    raise DataError(
        f"no row to train on in {', '.join(report.sources)}",
        fix="give files with at least one usable row",
    )


def _load(folder: Path, *, cached: bool) -> Prepared:
    from datasets import Dataset

    report = DataReport.from_dict(json.loads((folder / "report.json").read_text()))
    train, held = _rows(folder)
    bins = Dataset.from_file(str(folder / "bins.arrow")) if report.packing else None
    return Prepared(train, held, replace(report, cached=cached), bins)


def _rows(folder: Path) -> tuple[Any, Any | None]:
    """The training rows of a folder, and those to evaluate on."""
    train = _shards(folder, "train")
    chosen = json.loads((folder / "held_out.json").read_text())
    held = None
    if chosen:
        held = train.select(chosen)
        train = train.select(np.delete(np.arange(len(train)), chosen))
    elif any(folder.glob("eval-*.arrow")):
        held = _shards(folder, "eval")
    return train, held


def _shards(folder: Path, part: Part) -> Any:
    """The rows of all chunks, memory-mapped where they lie."""
    from datasets import Dataset, concatenate_datasets

    paths = sorted(folder.glob(f"{part}-*.arrow"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])
