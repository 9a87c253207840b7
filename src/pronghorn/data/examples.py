"""A few rows as a model sees them: text in pieces, each trained or not, special tokens apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from pronghorn.data.preference import SIDES
from pronghorn.data.preference_rows import Examined
from pronghorn.data.tokens import IGNORE

EXAMPLE_TOKENS = 2000  # of each sequence, what is shown


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text. ``special`` pieces are one special token each."""

    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class Answer:
    """What follows the prompt of a preference row: ``side`` is chosen or rejected."""

    side: str
    tokens: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Example:
    """One training row; ``row`` counts from 1 in the training rows.

    Of a preference row, ``pieces`` are the prompt, ``tokens`` counts it once, and ``answers`` follow it.
    """

    row: int
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]
    answers: tuple[Answer, ...] = ()


class Shown:
    """Makes examples with one tokenizer.

    Args:
        tokenizer: decodes; its special tokens are shown apart.
        count: how many rows, spread evenly.
    """

    def __init__(self, tokenizer: Any, count: int) -> None:
        self.tokenizer = tokenizer
        self.count = count
        self.special = frozenset(tokenizer.all_special_ids) | {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def rows(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
        """Examples of rows with input_ids and labels."""
        return tuple(self._row(rows[index], index + 1) for index in self._chosen(len(rows)))

    def preferences(self, examined: Examined) -> tuple[Example, ...]:
        """Examples of preference or prompt-only rows."""
        return tuple(self._preference(examined, index) for index in self._chosen(len(examined.train)))

    def _chosen(self, rows: int) -> Iterable[int]:
        return sorted({index * rows // self.count for index in range(self.count)}) if rows else ()

    def _row(self, row: Mapping[str, Any], number: int) -> Example:
        ids, labels = list(row["input_ids"]), [label != IGNORE for label in row["labels"]]
        return Example(number, len(ids), sum(labels), self._pieces(ids, labels))

    def _preference(self, examined: Examined, index: int) -> Example:
        encoded = examined.encoded(index)
        prompt = self._pieces(encoded.prompt, [False] * len(encoded.prompt))
        answers = tuple(
            Answer(side, len(ids), self._pieces(ids, [True] * len(ids)))
            for side, ids in zip(SIDES, encoded.answers, strict=False)
        )
        return Example(index + 1, len(encoded.prompt) + encoded.trained, encoded.trained, prompt, answers)

    def _pieces(self, ids: Sequence[int], trains: Sequence[bool]) -> tuple[Piece, ...]:
        shown = list(zip(ids, trains, strict=True))[:EXAMPLE_TOKENS]
        pieces = []
        # Special tokens are pieces of their own, so that two in a row are seen as two.
        keyed = [
            (trained, token in self.special, at if token in self.special else -1)
            for at, (token, trained) in enumerate(shown)
        ]
        for (trained, is_special, _), group in groupby(
            zip(keyed, shown, strict=True), key=lambda pair: pair[0]
        ):
            tokens = [token for _, (token, _) in group]
            text = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            pieces.append(Piece(text, trained, is_special))
        if len(ids) > len(shown):
            pieces.append(Piece(f" … and {len(ids) - len(shown)} tokens more", False, False))
        return tuple(pieces)
