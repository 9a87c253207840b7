"""Preference and prompt-only rows to token ids, cut and split where TRL's trainers cut and split them.

A prompt is what a server sends, opening of the answer included. An answer is the rest of prompt and answer
written as one; where that does not begin with the prompt's ids, the answer begins where both part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pronghorn.data.formats import RowError
from pronghorn.data.preference import Compared, Messages
from pronghorn.data.spans import agreement, holds
from pronghorn.data.templates import Prefix, RenderError
from pronghorn.data.tokens import Encoder


@dataclass(frozen=True)
class EncodedAnswers:
    """Ids of a prompt and of each answer behind it, cut to the limit of the encoder.

    ``full_length`` is the longest of its sequences before cutting, ``cut`` the tokens that all of them lost;
    ``flags`` names checks that the row fails.
    """

    prompt: list[int]
    answers: tuple[list[int], ...]
    full_length: int
    cut: int = 0
    flags: tuple[str, ...] = ()

    @property
    def trained(self) -> int:
        """Tokens of the answers."""
        return sum(map(len, self.answers))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences: the prompt counts once for each answer."""
        return self.trained + len(self.prompt) * max(1, len(self.answers))


@dataclass(frozen=True)
class _Written:
    """A row as text: the prompt, then prompt and answer as one, for each answer."""

    prompt: str
    whole: tuple[str, ...]
    flags: frozenset[str]


def encode_answers(encoder: Encoder, rows: Sequence[Compared]) -> list[EncodedAnswers | RowError]:
    """Encode rows that are all messages or all text; in their order."""
    if not rows:
        return []
    chat = rows[0].is_chat
    written = _render(encoder, rows) if chat else [_join(encoder, row) for row in rows]
    texts = [text for one in written if isinstance(one, _Written) for text in (one.prompt, *one.whole)]
    # A rendered chat says its BOS itself; before plain text it is the tokenizer's to say.
    ids = iter(
        encoder.tokenizer(texts, add_special_tokens=not chat, return_attention_mask=False)["input_ids"]
        if texts
        else ()
    )
    encoded: list[EncodedAnswers | RowError] = []
    for row, one in zip(rows, written, strict=True):
        if isinstance(one, RowError):
            encoded.append(one)
        else:
            encoded.append(_split(encoder, row, one, next(ids), [next(ids) for _ in one.whole]))
    return encoded


def _join(encoder: Encoder, row: Compared) -> _Written:
    prompt, eos = str(row.prompt), str(encoder.tokenizer.eos_token)
    assert encoder.eos_id is not None  # it raises where there is none
    texts = [str(text) for text in row.answers.values()]
    repeated = bool(texts) and all(text.startswith(prompt) for text in texts)
    whole = tuple(prompt + text + ("" if text.endswith(eos) else eos) for text in texts)
    return _Written(prompt, whole, frozenset({"repeated_prompt"} if repeated else ()))


def _render(encoder: Encoder, rows: Sequence[Compared]) -> list[_Written | RowError]:
    assert encoder.template is not None
    prefixes = [prefix for row in rows for prefix in _prefixes(row)]
    texts = iter(encoder.template.render(prefixes))
    return [_written(encoder, row, [next(texts) for _ in _prefixes(row)]) for row in rows]


def _prefixes(row: Compared) -> Iterator[Prefix]:
    """What is rendered of a row: its prompt as a server sends it, then each whole conversation."""
    prompt = _messages(row.prompt)
    yield Prefix(prompt, len(prompt), row.tools, prompt=True)
    for answer in row.answers.values():
        whole = prompt + _messages(answer)
        yield Prefix(whole, len(whole), row.tools)


def _written(encoder: Encoder, row: Compared, texts: list[str | RenderError]) -> _Written | RowError:
    error = next((text for text in texts if isinstance(text, RenderError)), None)
    if error is not None:
        return RowError("prompt", error.reason)
    opening, *whole = map(str, texts)
    flags = {"special_text"} if _spells_special(encoder, row) else set[str]()
    for text, answer in zip(whole, row.answers.values(), strict=True):
        start = len(opening)
        if not text.startswith(opening):
            start = agreement(opening, text)
            if start < _end_of_prompt(encoder, row, text):
                return RowError(
                    "prompt", "the chat template writes the prompt differently once an answer follows it"
                )
            flags.add("opening")
        if not encoder.close_turn(text, start, len(text))[1]:
            flags.add("end_token")
        if not all(holds(text[start:], message) for message in _messages(answer)):
            flags.add("lost_text")
    return _Written(opening, tuple(whole), frozenset(flags))


def _end_of_prompt(encoder: Encoder, row: Compared, text: str) -> int:
    """Where the prompt's messages end in ``text``; behind its end if the template has rewritten them."""
    assert encoder.template is not None
    prompt = _messages(row.prompt)
    (before,) = encoder.template.render([Prefix(prompt, len(prompt), row.tools)])
    return len(before) if isinstance(before, str) and text.startswith(before) else len(text) + 1


def _messages(given: Messages | str) -> Messages:
    assert not isinstance(given, str), "rows of one call are of one kind"
    return given


def _spells_special(encoder: Encoder, row: Compared) -> bool:
    said = [message for part in (row.prompt, *row.answers.values()) for message in _messages(part)]
    return any(encoder.special.search(message.get("content", "")) for message in said)


def _split(
    encoder: Encoder, row: Compared, written: _Written, prompt: list[int], whole: list[list[int]]
) -> EncodedAnswers:
    flags = set(written.flags)
    start = min((agreement(prompt, ids) for ids in whole), default=len(prompt))
    if start < len(prompt) and "opening" not in flags:
        flags.add("boundary")
    first = whole[0] if whole else prompt
    if first[:1] == first[1:2] == [encoder.tokenizer.bos_token_id]:
        flags.add("bos")
    lead = encoder.leading_ids
    if first[: len(lead)] != lead:
        flags.add("no_bos")
    limit = encoder.max_length
    answers = tuple(ids[start:limit] for ids in whole)
    if len(answers) > 1 and answers[0] == answers[1]:
        flags.add("equal_answers")
    lengths = [len(ids) for ids in whole or [prompt]]
    cut = sum(max(0, length - limit) for length in lengths)
    return EncodedAnswers(prompt[:start][:limit], answers, max(lengths), cut, tuple(sorted(flags)))
