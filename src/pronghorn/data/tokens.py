"""Samples to token ids and labels.

Conversations are encoded as one text without added special tokens, so the ids are those of
``apply_chat_template``. Labels are -100 where nothing is trained. A trained turn runs through the token that
closes it; whitespace that the template writes behind that token does not train.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pronghorn.data.formats import Chat, Pair, RowError, Sample, Text
from pronghorn.data.isolated import IsolatedTemplate
from pronghorn.data.options import DataOptions
from pronghorn.data.shapes import Shapes
from pronghorn.data.spans import (
    LONGEST_SPECIAL,
    Located,
    RewrittenTurn,
    locate,
    marked_spans,
    trained_messages,
)
from pronghorn.data.templates import ChatTemplate, Renderer
from pronghorn.errors import DataError

IGNORE = -100


@dataclass(frozen=True)
class EncodedRow:
    """Token ids, cut to the limit, and the runs ``[first, last)`` of them that train, in order and apart.

    ``full_length`` is the length before cutting.

    ``flags`` names the checks of ``checks.ROW_CHECKS`` it fails, and ``rewritten``.
    """

    input_ids: list[int]
    runs: tuple[tuple[int, int], ...]
    full_length: int
    flags: tuple[str, ...] = ()

    @property
    def labels(self) -> list[int]:
        """The ids that train, -100 elsewhere."""
        labels = [IGNORE] * len(self.input_ids)
        for first, last in self.runs:
            labels[first:last] = self.input_ids[first:last]
        return labels

    @property
    def trained(self) -> int:
        """Number of labels that train."""
        return sum([last - first for first, last in self.runs])


def check_tokenizer(tokenizer: Any) -> None:
    """Masks need a tokenizer that knows which characters each token covers.

    Raises:
        DataError: it is a slow one, written in Python.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it cannot say which text a token covers",
            fix="load the tokenizer with use_fast=True, or convert it to tokenizer.json",
        )


class Encoder:
    """Encodes samples in batches with one tokenizer, one template and one limit.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: needed for chats only.
        options: which tokens train, and what happens to rewritten turns.
        max_length: tokens kept of each row.
    """

    def __init__(
        self, tokenizer: Any, template: Renderer | None, options: DataOptions, max_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.options = options
        self.max_length = max_length
        self.shapes = self._shapes(template) if template is not None else None
        self.leading_ids  # noqa: B018 - the first call sets truncation and padding off, which threads must not

    def _shapes(self, renderer: Renderer) -> Shapes:
        template = renderer.template if isinstance(renderer, IsolatedTemplate) else renderer
        assert isinstance(template, ChatTemplate)
        return Shapes(template, renderer, self.options.loss_on, self.special_texts)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """Every token the tokenizer takes as a whole and marks special, as text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return frozenset(token.content for token in added if token.special) | {
            *self.tokenizer.all_special_tokens
        }

    @cached_property
    def _closing(self) -> re.Pattern[str]:
        """A special token at the end of a text, and whitespace after it."""
        names = "|".join(re.escape(name) for name in sorted(self.special_texts, key=len, reverse=True))
        return re.compile(rf"(?:{names or '(?!)'})(\s*)\Z")

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Any special token."""
        names = "|".join(re.escape(name) for name in sorted(self.special_texts, key=len, reverse=True))
        return re.compile(names or "(?!)")

    @cached_property
    def leading_ids(self) -> list[int]:
        """What the tokenizer puts before plain text by itself: its BOS, or nothing."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        added = list(self.tokenizer("a")["input_ids"])
        return next((added[:i] for i in range(len(added)) if added[i : i + len(plain)] == plain), [])

    @cached_property
    def _bos_id(self) -> int | None:
        found: int | None = self.tokenizer.bos_token_id  # looked up by name: 1 us
        return found

    @cached_property
    def eos_id(self) -> int:
        """The id that ends plain text and completions."""
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos token to end rows with", fix="set tokenizer.eos_token")
        return int(self.tokenizer.eos_token_id)

    def encode(self, samples: Sequence[Sample]) -> list[list[EncodedRow] | RowError]:
        """Encode each sample; several rows come of one only where ``rewritten: split`` asks for it.

        Returns:
            In the order of ``samples``: the rows, or why there are none.
        """
        results: list[list[EncodedRow] | RowError] = [[] for _ in samples]
        for kind, encode in ((Chat, self._chats), (Pair, self._pairs), (Text, self._texts)):
            members = [index for index, sample in enumerate(samples) if isinstance(sample, kind)]
            if members:
                for index, result in zip(members, encode([samples[i] for i in members]), strict=True):
                    results[index] = result
        return results

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return ids

    def _texts(self, samples: Sequence[Any]) -> list[list[EncodedRow] | RowError]:
        rows: list[list[EncodedRow] | RowError] = []
        for ids in self._ids([sample.text for sample in samples]):
            whole = self._closed(self._opened(ids))
            rows.append([self._cut(whole, [(0, len(whole))])])
        return rows

    def _pairs(self, samples: Sequence[Any]) -> list[list[EncodedRow] | RowError]:
        prompts = self._ids([sample.prompt for sample in samples])
        joint = self._ids([sample.prompt + sample.completion for sample in samples])
        # Where both texts would share a token, the prompt is kept as a server sends it.
        apart = [i for i, ids in enumerate(joint) if ids[: len(prompts[i])] != prompts[i]]
        for index, ids in zip(apart, self._ids([samples[i].completion for i in apart]), strict=True):
            joint[index] = prompts[index] + ids
        rows: list[list[EncodedRow] | RowError] = []
        for prompt, ids in zip(prompts, joint, strict=True):
            whole = self._closed(self._opened(ids))
            start = len(whole) - len(self._closed(ids)) + len(prompt)
            if self.options.loss_on == "all":
                start = 0
            rows.append([self._cut(whole, [(start, len(whole))])])
        return rows

    def _opened(self, ids: list[int]) -> list[int]:
        lead = self.leading_ids
        return ids if ids[: len(lead)] == lead else lead + ids

    def _closed(self, ids: list[int]) -> list[int]:
        """Ids ended by exactly one eos; whitespace that a rendered chat has behind it is left out."""
        for back in range(len(ids) - 1, max(len(ids) - 4, -1), -1):
            if ids[back] == self.eos_id:
                return ids[: back + 1]
            if self.tokenizer.decode(ids[back : back + 1]).strip():
                break
        return [*ids, self.eos_id]

    def _chats(self, samples: Sequence[Any]) -> list[list[EncodedRow] | RowError]:
        if self.template is None:
            raise DataError("conversations need a chat template", fix="give one with data.template=FILE")
        assert self.shapes is not None
        found = self.shapes.locate(samples)
        located = [item for item in found if isinstance(item, Located)]
        encoded = iter(self._located(located))
        rows: list[list[EncodedRow] | RowError] = []
        for chat, item in zip(samples, found, strict=True):
            if isinstance(item, RowError):
                rows.append(item)
                continue
            made = next(encoded) if isinstance(item, Located) else self._rewritten(chat, item)
            rows.append(self._spells_special(chat, made))
        return rows

    def _spells_special(self, chat: Chat, rows: list[EncodedRow] | RowError) -> list[EncodedRow] | RowError:
        if isinstance(rows, RowError):
            return rows
        if not any(self.special.search(message.get("content", "")) for message in chat.messages):
            return rows
        return [replace(row, flags=(*row.flags, "special_text")) for row in rows]

    def _located(self, located: list[Located]) -> list[list[EncodedRow] | RowError]:
        if not located:
            return []
        batch = self.tokenizer(
            [item.text for item in located], add_special_tokens=False, return_attention_mask=False
        )
        return [
            [self._mask(item, ids, encoding)]
            for item, ids, encoding in zip(located, batch["input_ids"], batch.encodings, strict=True)
        ]

    def _mask(self, item: Located, ids: list[int], encoding: Any) -> EncodedRow:
        runs, flags = [], list(item.flags)
        for start, end in item.spans:
            end, closed = self.close_turn(item.text, start, end)
            first, last = _token_range(encoding, start, end)
            runs.append((first, last))
            if not closed and "end_token" not in flags:
                flags.append("end_token")
        if self.leading_ids and ids[: len(self.leading_ids)] != self.leading_ids:
            flags.append("no_bos")
        return self._cut(ids, runs, tuple(flags))

    def close_turn(self, text: str, start: int, end: int) -> tuple[int, bool]:
        """Where the turn's last trained character is, and whether it belongs to a token that ends a turn.

        Some templates (GLM) end a turn with the token that opens the next one; it is part of the answer then.
        """
        if closing := self._closing.search(text, max(start, end - LONGEST_SPECIAL), end):
            return closing.start(1), True
        if following := self.special.match(text, end):
            return following.end(), True
        return end, False

    def _rewritten(self, chat: Chat, turn: RewrittenTurn) -> list[EncodedRow] | RowError:
        assert self.template is not None
        chosen = trained_messages(chat, self.options.loss_on)
        if self.options.rewritten == "refuse":
            marked = marked_spans(self.template, chat, chosen)
            if isinstance(marked, RowError):
                return marked
            if marked is not None:
                return self._located([marked])[0]
            return RowError(
                f"messages[{turn.index}]",
                "the chat template writes this message differently once others follow it, so what would be "
                "trained is not what would be served; set data.rewritten=split (one row per answer, each as "
                "served), data.rewritten=last_turn, or data.loss_on=last_assistant",
            )
        parts = [
            _until(chat, index) for index in (chosen if self.options.rewritten == "split" else chosen[-1:])
        ]
        assert self.template is not None
        found = locate(self.template, parts, "last_assistant", self.special)
        for item in found:
            if isinstance(item, RowError):
                return item
            if isinstance(item, RewrittenTurn):
                return RowError(
                    f"messages[{item.index}]", "the chat template does not keep the messages before it"
                )
        rows = self._located([item for item in found if isinstance(item, Located)])
        parts_rows = [row for part in rows if not isinstance(part, RowError) for row in part]
        return [replace(row, flags=(*row.flags, "rewritten")) for row in parts_rows]

    def _cut(
        self, ids: list[int], runs: Iterable[tuple[int, int]], flags: tuple[str, ...] = ()
    ) -> EncodedRow:
        if ids[:1] == ids[1:2] == [self._bos_id]:
            flags = (*flags, "bos")
        kept: list[tuple[int, int]] = []
        at = 1  # nothing stands before the first token to predict it from
        for first, last in runs:
            first, last = max(first, at), min(last, self.max_length)
            if first < last:
                kept.append((first, last))
                at = last
        return EncodedRow(ids[: self.max_length], tuple(kept), len(ids), flags)


def _until(chat: Chat, index: int) -> Chat:
    """The conversation up to message ``index``, which alone trains."""
    return replace(chat, messages=chat.messages[: index + 1], train=(False,) * index + (True,))


def _token_range(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """Tokens ``[first, last)`` that begin in characters ``[start, end)``.

    A token that begins before ``start`` (prompt and answer merged) is not the answer's to predict.
    """
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None:
        return 0, 0
    last = next(t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None)
    if encoding.token_to_chars(first)[0] < start:
        first += 1
    return first, last + 1
