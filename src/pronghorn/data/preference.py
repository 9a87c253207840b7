"""Preference rows (a prompt, the answer chosen and the one rejected) and prompt-only rows, read and checked.

The prompt is a column of its own, or what both answers begin with. All come out in the one form that TRL's
DPOTrainer and GRPOTrainer take: prompt apart from the answers, all of them messages or all of them text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pronghorn.data.formats import RowError, read_chat, read_text, read_tools
from pronghorn.data.options import Format
from pronghorn.data.rows import Row
from pronghorn.data.spans import agreement

Messages = list[dict[str, Any]]
LAYOUTS: tuple[Format, ...] = ("preference", "prompt_only")
SIDES = ("chosen", "rejected")
_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Compared:
    """A prompt and its answers by name, all messages or all text; a prompt alone has no answers.

    ``others`` are further columns of a prompt-only row, which reward functions read.
    """

    prompt: Messages | str
    answers: Mapping[str, Messages | str]
    tools: list[dict[str, Any]] | None = None
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether it is written with the chat template."""
        return not isinstance(self.prompt, str)

    def row(self) -> dict[str, Any]:
        """The columns that TRL's trainers read, without ``others``."""
        tools = {"tools": self.tools} if self.tools else {}
        return {"prompt": self.prompt, **self.answers, **tools}


def is_chat(value: Mapping[str, Any]) -> bool:
    """Whether a row is made of messages; one column of messages is enough, as the others must then follow."""
    return any(_turns(value.get(name)) is not None for name in ("prompt", *SIDES))


def to_compared(row: Row, layout: Format, *, chat: bool, system: str | None = None) -> Compared:
    """What a row of ``layout`` asks, and its answers.

    Args:
        row: the row.
        layout: one of ``LAYOUTS``.
        chat: whether the rows of the run are made of messages, as the first one says.
        system: a system message for prompts that have none.

    Raises:
        RowError: a field is missing, empty, of the wrong type or role, or the answers share no prompt.
    """
    value = row.value
    made_of_messages = is_chat(value)
    if made_of_messages != chat and (
        made_of_messages or isinstance(value.get("prompt", value.get(SIDES[0])), str)
    ):
        this, first = ("messages", "text") if made_of_messages else ("text", "messages")
        raise RowError("", f"is made of {this}, and the first row of {first}: a run has rows of one kind")
    sides = SIDES if layout == "preference" else ()
    compared = _chat_row(value, sides, system) if chat else _text_row(value, sides)
    others = {name: each for name, each in value.items() if name not in ("prompt", "tools")}
    return compared if sides else replace(compared, others=others)


def _chat_row(value: Mapping[str, Any], sides: Sequence[str], system: str | None) -> Compared:
    answers = {side: _messages(value.get(side), side) for side in sides}
    prompt = _prompt(value, answers)
    for side, messages in answers.items():
        wrong = next((i for i, one in enumerate(messages) if one["role"] not in ("assistant", "tool")), None)
        if wrong is not None:
            raise RowError(
                f"{side}[{wrong}].role",
                f"is {messages[wrong]['role']!r} behind the prompt that both answers share: an answer holds "
                "assistant and tool messages only",
            )
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(
            f"prompt[{len(prompt) - 1}].role",
            f"is {prompt[-1]['role']!r}: a prompt ends with what is to be answered (user or tool)",
        )
    if system is not None and prompt[0]["role"] not in _SYSTEM:
        prompt = [{"role": "system", "content": system}, *prompt]
    return Compared(prompt, answers, read_tools(value.get("tools")))


def _messages(given: Any, field: str) -> Messages:
    """A list of messages, one message, or the text of an answer."""
    turns = _turns(given)
    if turns is None and isinstance(given, str):
        turns = [{"role": "assistant", "content": given}]
    chat = read_chat(given if turns is None else turns, field)
    marked = next((i for i, own in enumerate(chat.train) if own is not None), None)
    if marked is not None:
        raise RowError(f"{field}[{marked}].train", "has no effect here: the whole answers are compared")
    return chat.messages


def _prompt(value: Mapping[str, Any], answers: dict[str, Messages]) -> Messages:
    """The prompt's messages; those that the answers repeat are taken out of ``answers``."""
    given = value.get("prompt")
    if given is None and answers:
        return _shared_messages(answers)
    if not isinstance(given, str) or _turns(given) is not None:
        prompt = _messages(given, "prompt")
        if answers and all(messages[: len(prompt)] == prompt for messages in answers.values()):
            _without_start(answers, len(prompt))
        return prompt
    question = {"role": "user", "content": read_text(value, "prompt")}
    if not any(one["role"] == "user" for messages in answers.values() for one in messages):
        return [question]
    prompt = _shared_messages(answers)
    if question not in prompt:
        raise RowError(
            "prompt", "is none of the messages that both answers begin with; leave out one of them"
        )
    return prompt


def _shared_messages(answers: dict[str, Messages]) -> Messages:
    """What both begin with, up to the last message that asks; each keeps at least one message."""
    first, second = answers.values()
    shared = agreement(first[:-1], second[:-1])
    while shared and first[shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise RowError(
            SIDES[0],
            f"and {SIDES[1]} do not begin with the same question, so they answer no common prompt",
        )
    prompt = first[:shared]
    _without_start(answers, shared)
    return prompt


def _without_start(answers: dict[str, Messages], count: int) -> None:
    for side, messages in answers.items():
        if len(messages) == count:
            raise RowError(side, "holds the prompt and no answer")
        answers[side] = messages[count:]


def _text_row(value: Mapping[str, Any], sides: Sequence[str]) -> Compared:
    answers: dict[str, Messages | str] = {side: read_text(value, side) for side in sides}
    if value.get("tools"):
        raise RowError("tools", "need a chat template, and this row is plain text; write it as messages")
    if not sides or value.get("prompt") is not None:
        return Compared(read_text(value, "prompt"), answers)
    first, second = (str(answers[side]) for side in SIDES)
    shared = _shared_text(first, second)
    if not first[:shared].strip():
        raise RowError(
            SIDES[0],
            f"and {SIDES[1]} do not begin with the same text, so they answer no common prompt",
        )
    return Compared(first[:shared], {SIDES[0]: first[shared:], SIDES[1]: second[shared:]})


def _shared_text(first: str, second: str) -> int:
    """Where the prompt of two texts ends: before the space or line in front of the first word that differs.

    A word that only begins alike is not cut. Words that both answers begin with count as prompt, which
    changes no preference loss: they are as likely in one as in the other.
    """
    shared = agreement(first, second)
    whole = shared == len(first) == len(second)
    at_word = not whole and all(text[shared : shared + 1].strip() == "" for text in (first, second))
    if at_word and shared < min(len(first), len(second)):
        return shared
    gaps = [gap.start() for gap in re.finditer(r"\s+(?=\S)", first[: shared + (0 if whole else 1)])]
    return gaps[-1] if gaps else 0


def _turns(given: Any) -> list[Any] | None:
    """A list of messages, also of one, also as the JSON text that CSV files hold; None for other text."""
    if isinstance(given, str) and given.lstrip().startswith(("[", "{")):
        try:
            given = json.loads(given)
        except ValueError:
            return None  # text that begins like JSON, an answer in code for instance
        turns = given if isinstance(given, list) else [given]
        return turns if all(isinstance(turn, dict) and {"role", "from"} & {*turn} for turn in turns) else None
    if isinstance(given, Mapping):
        return [given]
    return given if isinstance(given, list) else None
