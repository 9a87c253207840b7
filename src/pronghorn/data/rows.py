"""Rows as they lie in files, one at a time, each with the file and the number a person can look up.

Nothing here knows what a row means; a row that cannot even be read is a ``BadRow``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

from pronghorn.data import json_list
from pronghorn.data.options import DataOptions
from pronghorn.errors import DataError

MAX_ROW_BYTES = 16 << 20  # a 50 MB line is a broken export, not a conversation; 16 MiB is about 4 M tokens
_TABLE_ROWS = 100  # of a table at once
_ROW_COLUMNS = ("messages", "conversations")
_LIST = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*"([^"\\]*)"\s*:\s*)?\[')  # alone, or first in an object
_JSON_FIX = "write one JSON object per line (.jsonl), or a JSON list of objects (.json)"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it is, which part of it, and why."""

    file: str
    number: int
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.field + ': ' if self.field else ''}{self.reason}"


@dataclass(frozen=True)
class Row:
    """One row: its file, its number there and its columns.

    ``number`` is the line for .jsonl files, else the row; 1 is the first, and a CSV header does not count.
    """

    file: str
    number: int
    value: dict[str, Any]

    def bad(self, field: str, reason: str) -> BadRow:
        """This row as a bad one."""
        return BadRow(self.file, self.number, field, reason)


class Line(NamedTuple):
    """A row of JSON that was not parsed yet."""

    number: int
    text: bytes

    def parse(self, file: str) -> Row | BadRow:
        """The row, if it is one."""
        try:
            # utf-8-sig: a byte-order mark may open the file, and each part of files joined with `cat`
            value = json.loads(self.text.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return BadRow(file, self.number, "", f"not UTF-8 at byte {error.start}; save the file as UTF-8")
        except json.JSONDecodeError as error:
            line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
            return BadRow(file, self.number, "", f"not JSON: {error.msg} at {line}column {error.colno}")
        except RecursionError:
            return BadRow(file, self.number, "", "JSON nested too deeply")
        return _object(value, file, self.number)


@dataclass(frozen=True)
class Source:
    """One place rows come from. Its content is that of ``files``, and ``stamp`` says what they do not.

    ``unparsed`` gives JSON that is still to be parsed: another process may do that.
    """

    name: str
    files: tuple[Path, ...]
    unparsed: Callable[[], Iterator[Line | Row | BadRow]]
    stamp: str = ""

    def read(self) -> Iterator[Row | BadRow]:
        """The rows, parsed."""
        for item in self.unparsed():
            yield item.parse(self.name) if isinstance(item, Line) else item


def open_source(name: str, options: DataOptions) -> Source:
    """Find ``name``: a file, a folder saved by ``datasets``, else a dataset id on the hub.

    Raises:
        DataError: it does not exist, is empty, or is of no kind that can be read.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(path, name)
    if path.is_dir():
        return _open_folder(path, name, options.split)
    if path.suffix.lower() in _READERS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise DataError(f"{name}: no such file or folder", fix="check the path in data.train / data.eval")
    return _open_hub(name, options)


def _open_file(path: Path, name: str) -> Source:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{name}: files ending in {path.suffix or 'nothing'!r} cannot be read",
            fix=f"use one of {' '.join(_READERS)}, a folder saved by datasets, or a hub dataset id",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty", fix="give a file with at least one row")
    return Source(name, (path,), lambda: reader(path, name))


def _read_jsonl(path: Path, name: str) -> Iterator[Line | BadRow]:
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                size = len(line)
                while not line.endswith(b"\n") and (line := lines.readline(MAX_ROW_BYTES)):
                    size += len(line)
                yield BadRow(name, number, "", _too_big(size))
            elif (text := line.strip()) and (number > 1 or text != b"\xef\xbb\xbf"):
                yield Line(number, text)


def _object(value: Any, name: str, number: int) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(name, number, "", f"a row must be a JSON object, this is a {_kind(value)}")
    return Row(name, number, value)


def _read_json(path: Path, name: str) -> Iterator[Line | Row | BadRow]:
    if _is_json_lines(path):
        yield from _read_jsonl(path, name)
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        opening = _LIST.match(file.read(json_list.BLOCK))
        key = opening and opening[1]
        # An object may be one row that begins with a list, but not if it is larger than a row may be.
        if opening and (
            key is None or (size > MAX_ROW_BYTES and key.decode(errors="replace") not in _ROW_COLUMNS)
        ):
            file.seek(opening.end())
            yield from _read_list(file, name, b"" if key is None else b"}")
            return
    if size > MAX_ROW_BYTES:
        yield BadRow(name, 1, "", _too_big(size))
    else:
        yield from _read_object(path, name)


def _read_list(file: BinaryIO, name: str, behind: bytes) -> Iterator[Line | BadRow]:
    number = 0
    try:
        for number, text in enumerate(json_list.elements(file, MAX_ROW_BYTES, behind), 1):
            yield Line(number, text) if isinstance(text, bytes) else BadRow(name, number, "", _too_big(text))
    except json_list.BrokenListError as error:
        raise DataError(f"{name}:{number}: {error}", fix=_JSON_FIX) from error


def _read_object(path: Path, name: str) -> Iterator[Row | BadRow]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}", fix="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        reason = f"{name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        raise DataError(reason, fix=_JSON_FIX) from error
    except RecursionError:
        raise DataError(f"{name}: JSON nested too deeply", fix=_JSON_FIX) from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: a {_kind(value)} where a list of rows was expected", fix=_JSON_FIX)
    rows = next(iter(value.values())) if _wraps_a_list(value) else [value]
    for number, row in enumerate(rows, 1):
        yield _object(row, name, number)


def _is_json_lines(path: Path) -> bool:
    """True if the first line is an object by itself and another line follows."""
    with path.open("rb") as file:
        first, second = file.readline(MAX_ROW_BYTES), file.readline(2)
    if not (first.endswith(b"\n") and second and first.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"):
        return False
    try:
        return isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _wraps_a_list(value: dict[str, Any]) -> bool:
    """``{"data": [row, row]}``, as some exports write; not ``{"messages": [...]}``, which is one row."""
    return len(value) == 1 and isinstance(next(iter(value.values())), list) and not {*value} & {*_ROW_COLUMNS}


def _read_csv(path: Path, name: str) -> Iterator[Row | BadRow]:
    # The csv module's limit of 128 KiB a field, a process-wide setting, is below a long document.
    before = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        yield from _read_csv_rows(path, name)
    finally:
        csv.field_size_limit(before)


def _read_csv_rows(path: Path, name: str) -> Iterator[Row | BadRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        number = 0
        try:
            header = next(reader, [])
            if len(set(header)) != len(header) or not all(column.strip() for column in header):
                raise DataError(
                    f"{name}: the header {header} repeats or lacks a name", fix="name each column once"
                )
            for number, fields in enumerate(reader, 1):
                if not fields:
                    continue
                if len(fields) != len(header):
                    yield BadRow(name, number, "", f"{len(fields)} fields where the header has {len(header)}")
                else:
                    yield Row(name, number, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            yield BadRow(name, number + 1, "", f"not CSV: {error}; the rows after it were not read")
        except UnicodeDecodeError as error:
            yield BadRow(name, number + 1, "", f"not UTF-8: {error.reason}; the rows after it were not read")


def _read_parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        # Buffered like this a row group, which may be the whole file, is read a piece at a time.
        file = ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
        yield from _table_rows(file.iter_batches(batch_size=_TABLE_ROWS), name)
    except (ArrowException, OSError) as error:
        raise DataError(f"{name}: not a Parquet file: {error}", fix="write the file again") from error


def _table_rows(batches: Iterable[Any], name: str) -> Iterator[Row | BadRow]:
    values = (value for batch in batches for value in batch.to_pylist())
    for number, value in enumerate(values, 1):
        yield _bounded(Row(name, number, without_nulls(value)))


def _bounded(row: Row | BadRow) -> Row | BadRow:
    """What has no lines has no limit to a line: the same limit for the text of a row."""
    if isinstance(row, Row) and (size := text_size(row.value)) > MAX_ROW_BYTES:
        return row.bad("", _too_big(size))
    return row


def text_size(value: Any) -> int:
    """Characters of all text in a value, and a few for what is none."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum([text_size(each) for each in value.values()])
    return sum([text_size(each) for each in value]) if isinstance(value, list) else 8


_READERS: MappingProxyType[str, Callable[[Path, str], Iterator[Line | Row | BadRow]]] = MappingProxyType(
    {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
)


def _open_folder(path: Path, name: str, split: str) -> Source:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise DataError(
            f"{name}: a folder, but not one saved by datasets' save_to_disk ({error})",
            fix="name the files in it instead, or save it with dataset.save_to_disk",
        ) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise DataError(f"{name}: no split {split!r}; it has {', '.join(loaded)}", fix="set data.split")
        loaded = loaded[split]
    return from_dataset(loaded, name)


def _open_hub(name: str, options: DataOptions) -> Source:
    from datasets import load_dataset

    try:
        loaded = load_dataset(name, options.subset, split=options.split, revision=options.revision)
    except Exception as error:  # the hub client raises a dozen unrelated classes; all mean "not available"
        raise DataError(
            f"{name}: neither a local file or folder nor a dataset that could be loaded from the hub "
            f"(split {options.split!r}): {error}",
            fix="check the path or id, data.split, data.subset, and the network (HF_HUB_OFFLINE forbids it)",
        ) from error
    return from_dataset(loaded, name)


def from_dataset(dataset: Any, name: str) -> Source:
    """Rows of a ``datasets.Dataset``, read in batches from its Arrow files."""

    def read() -> Iterator[Row | BadRow]:
        return _table_rows(dataset.with_format("arrow").iter(batch_size=_TABLE_ROWS), name)

    files = tuple(Path(entry["filename"]) for entry in dataset.cache_files)
    return Source(name, files, read, stamp=dataset._fingerprint)  # selections and maps are not in the files


def from_rows(rows: Sequence[Mapping[str, Any]], name: str = "rows") -> Source:
    """Rows that are in memory."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode())

    def read() -> Iterator[Row | BadRow]:
        for number, value in enumerate(rows, 1):
            yield _bounded(_object(value, name, number))

    return Source(name, (), read, stamp=digest.hexdigest())


def open_data(data: Any, options: Mapping[str, Any]) -> tuple[list[Source], list[Source], DataOptions]:
    """Rows to train and to evaluate on, opened, from whatever a person has at hand.

    Args:
        data: a file, folder or hub id, several of them, ``DataOptions``, a list of rows, or a ``Dataset``.
        options: fields of ``DataOptions``; none if ``data`` is one.

    Raises:
        DataError: the rows cannot be found, or options are given twice.
    """
    if isinstance(data, DataOptions):
        if options:
            raise DataError("options are given twice", fix="put them into the DataOptions")
        chosen, train = data, None
    else:
        train = _in_memory(data)
        chosen = DataOptions(train=train.name if train else data, **options)
    opened = [train] if train else [open_source(name, chosen) for name in chosen.train]
    return opened, [open_source(name, chosen) for name in chosen.eval], chosen


def _in_memory(data: Any) -> Source | None:
    if isinstance(data, (str, Path)):
        return None
    if hasattr(data, "cache_files") and hasattr(data, "with_format"):
        return from_dataset(data, "dataset")
    if isinstance(data, Sequence) and data and all(isinstance(row, Mapping) for row in data):
        return from_rows(data)
    return None


def without_nulls(value: Any) -> Any:
    """Drop the keys Arrow adds as null because another row's struct has them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _too_big(size: int) -> str:
    return f"{size / 2**20:.0f} MB in one row; the limit is {MAX_ROW_BYTES >> 20} MB"


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)
