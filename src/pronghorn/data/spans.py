"""Where in a rendered conversation the text that trains begins and ends.

Found by rendering prefixes of the conversation and comparing, never by searching the text for markers: an
answer starts where "all messages before it, plus the opening of an assistant turn" ends, and closes where
"all messages up to it" ends. Both must be prefixes of the whole, which a template that rewrites turns fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.data.formats import REASONING, Chat, RowError
from pronghorn.data.options import LossOn
from pronghorn.data.templates import Prefix, Renderer, RenderError

_THINK = re.compile(r"</?think>")  # templates move inline thoughts about, and write their own tags
LONGEST_SPECIAL = 64  # characters; the longest special tokens in use have about 30


@dataclass(frozen=True)
class Located:
    """A rendered conversation and the ``[start, end)`` characters of each message that trains, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]
    flags: tuple[str, ...] = ()  # names of ROW_CHECKS that the row fails


@dataclass(frozen=True)
class RewrittenTurn:
    """The template writes message ``index`` differently once others follow it."""

    text: str
    index: int


def trained_messages(chat: Chat, loss_on: LossOn) -> list[int]:
    """Indices of the messages that train; a message's own ``train`` overrides ``loss_on``.

    Raises:
        RowError: none would.
    """
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    default: Sequence[int]
    if loss_on == "all":
        default = range(len(chat.messages))
    else:
        default = answers if loss_on == "assistant" else answers[-1:]
    chosen = [i for i, own in enumerate(chat.train) if own or (own is None and i in default)]
    if not chosen:
        reason = (
            "no message trains (train: false everywhere)"
            if answers
            else "has no assistant message to train on"
        )
        raise RowError("messages", reason)
    if chosen[0] == 0 and chat.messages[0]["role"] == "assistant" and loss_on != "all":
        raise RowError("messages[0].role", "a conversation cannot start with the answer")
    return chosen


def locate(
    template: Renderer, chats: Sequence[Chat], loss_on: LossOn, special: re.Pattern[str]
) -> list[Located | RewrittenTurn | RowError]:
    """Render each chat and find the text of its trained messages; ``special`` matches any special token."""
    jobs = [_Job.of(chat, loss_on, special) for chat in chats]
    prefixes = [prefix for job in jobs if isinstance(job, _Job) for prefix in job.prefixes]
    texts = iter(template.render(prefixes))
    found: list[Located | RewrittenTurn | RowError] = []
    for job in jobs:
        if isinstance(job, RowError):
            found.append(job)
            continue
        own = [next(texts) for _ in job.prefixes]
        errors = [text for text in own if isinstance(text, RenderError)]
        if errors:
            found.append(RowError("messages", errors[0].reason))
        else:
            found.append(job.compare(template, [str(text) for text in own]))
    return found


@dataclass(frozen=True)
class _Job:
    """The prefixes of one chat to render: the whole first, then opening and closing of each trained turn."""

    chat: Chat
    chosen: list[int]
    prefixes: list[Prefix]
    whole: bool
    special: re.Pattern[str]

    @classmethod
    def of(cls, chat: Chat, loss_on: LossOn, special: re.Pattern[str]) -> _Job | RowError:
        try:
            chosen = trained_messages(chat, loss_on)
        except RowError as error:
            return error
        prefixes = [Prefix(chat.messages, len(chat.messages), chat.tools)]
        whole = len(chosen) == len(chat.messages)
        if not whole:
            for index in chosen:
                answer = chat.messages[index]["role"] == "assistant" and loss_on != "all"
                prefixes.append(Prefix(chat.messages, index, chat.tools, prompt=answer))
                if index + 1 < len(chat.messages):  # the last turn closes where the whole does
                    prefixes.append(Prefix(chat.messages, index + 1, chat.tools))
        return cls(chat, chosen, prefixes, whole, special)

    def compare(self, template: Renderer, texts: list[str]) -> Located | RewrittenTurn | RowError:
        full = texts[0]
        if self.whole:
            return Located(full, ((0, len(full)),))
        spans, flags = [], set[str]()
        for position, index in enumerate(self.chosen):
            opening = texts[1 + 2 * position]
            closing = texts[2 + 2 * position] if index + 1 < len(self.chat.messages) else full
            end = self._closing_end(closing, full)
            if end < 0:
                return RewrittenTurn(full, index)
            start = len(opening)
            if not full.startswith(opening):
                flags.add("opening")
                start = self._agreed_opening(template, index, opening, full)
                if start < 0:
                    return RewrittenTurn(full, index)
            spans.append((start, end))
            if not holds(full[start:end], self.chat.messages[index]):
                flags.add("lost_text")
        return Located(full, tuple(spans), tuple(sorted(flags)))

    def _closing_end(self, closing: str, full: str) -> int:
        """Where the turn that ends ``closing`` ends in ``full``; -1 if the template has rewritten it.

        Some templates (Phi-3) end every conversation with one more special token, behind its last message.
        """
        if full.startswith(closing):
            return len(closing)
        agreed = agreement(closing, full)
        ends = [m.start() for m in self.special.finditer(closing, max(0, agreed - LONGEST_SPECIAL))]
        fitting = [at for at in ends if at <= agreed and full.endswith(closing[at:])]
        return fitting[-1] if fitting else -1

    def _agreed_opening(self, template: Renderer, index: int, opening: str, full: str) -> int:
        """Where the turn starts if a server's opening holds more than the text (an opened reasoning block).

        That is as far as both agree, which must lie behind all earlier messages; -1 if not.
        """
        before = template.render([Prefix(self.chat.messages, index, self.chat.tools)])[0]
        agreed = agreement(opening, full)
        if isinstance(before, RenderError) or not full.startswith(before) or agreed < len(before):
            return -1
        return agreed


def agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def holds(text: str, message: Mapping[str, Any]) -> bool:
    """Whether the rendered turn holds all that the message says, thinks and calls."""
    said = [part for name in ("content", *REASONING) for part in _THINK.split(message.get(name) or "")]
    called = [call.get("function", call)["name"] for call in message.get("tool_calls") or ()]
    return all(part.strip() in text for part in (*said, *called))


def marked_spans(template: Renderer, chat: Chat, chosen: Sequence[int]) -> Located | RowError | None:
    """The spans that the template itself marks as generated, of the ``chosen`` messages.

    None if the template has no marks, or if they cannot be told apart by message.
    """
    marked = template.marked(Prefix(chat.messages, len(chat.messages), chat.tools))
    if isinstance(marked, RenderError):
        return RowError("messages", marked.reason)
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(marked.spans) != len(answers) or not set(chosen) <= set(answers):
        return None
    spans = [span for index, span in zip(answers, marked.spans, strict=True) if index in chosen]
    lost = not all(
        holds(marked.text[start:end], chat.messages[index])
        for index, (start, end) in zip(chosen, spans, strict=True)
    )
    return Located(marked.text, tuple(spans), ("lost_text", "marks") if lost else ("marks",))
