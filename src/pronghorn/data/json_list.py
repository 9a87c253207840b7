"""A JSON list of rows, however long, cut into its elements a block at a time. Nothing is parsed here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK = 1 << 20  # bytes read at once
# A string is one mark, up to its quote or the end of what was read; within an element commas do not matter.
_REST = rb'[^"\\]*(?:\\.[^"\\]*)*("?)'
_BETWEEN, _WITHIN, _REST_OF_STRING = (
    re.compile(each, re.DOTALL)
    for each in (b'"' + _REST + rb"|[\[\]{},]", b'"' + _REST + rb"|[\[\]{}]", _REST)
)


class BrokenListError(ValueError):
    """The file ends before the list does, or goes on behind it."""


def elements(file: BinaryIO, limit: int, behind: bytes = b"") -> Iterator[bytes | int]:
    """The elements of the list that ``file`` stands in, behind its opening bracket.

    Args:
        file: read to its end.
        limit: bytes of an element.
        behind: what closes the file, behind the list.

    Yields:
        The text of an element, which may be no JSON; of one above ``limit`` its bytes, about.

    Raises:
        BrokenListError: behind the last element.
    """
    held, at = b"", 0  # what was read from the beginning of an element on; searched up to ``at``
    dropped = 0  # bytes of that element that were given up, because it is too long
    depth, in_string, first = 1, False, True
    while block := file.read(BLOCK):
        held += block
        start = 0
        if in_string and (rest := _REST_OF_STRING.match(held, at)):
            at, in_string = rest.end(), not rest[1]
        while not in_string and (mark := (_BETWEEN if depth == 1 else _WITHIN).search(held, at)):
            at, kind, in_string = mark.end(), mark[0][:1], mark[1] == b""
            depth += (kind in b"[{") - (kind in b"]}")
            if depth and kind != b",":
                continue
            text = held[start : at - 1]
            size = dropped + len(text if dropped else (text := text.strip()))
            if depth or size or not first:
                yield text if size <= limit else size
            if not depth:
                _require_end(held[at:], file, behind)
                return
            start, dropped, first = at, 0, False
        if not in_string:
            at = len(held)
        if dropped + len(held) - start <= limit:
            held, at = held[start:], at - start
        else:
            dropped += at - start
            held, at = held[at:], 0
    if dropped or held.strip():
        yield held.strip() if not dropped else dropped + len(held)
    raise BrokenListError("the file ends within the list; a bracket or a quote is missing, or it was cut off")


def _require_end(rest: bytes, file: BinaryIO, behind: bytes) -> None:
    rest = rest.strip()
    while len(rest) <= len(behind) and (block := file.read(BLOCK)):
        rest = (rest + block).strip()
    if rest != behind:
        text = rest[:20].decode(errors="replace")
        raise BrokenListError(
            f"the list ends here, but the file goes on: {text}" if rest else "the file ends early"
        )
