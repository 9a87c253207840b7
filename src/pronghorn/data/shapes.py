"""Conversations of equal roles, rendered once with placeholders and then filled in, where that is proven
exact.

``opaque`` reads from a template under which conditions it cannot tell one text from another. A row that
meets them
gets the text and the spans that ``spans.locate`` would give it, without another rendering: a tenth of
the time.
All other rows, and all rows of other templates, go through ``spans.locate``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from pronghorn.data.formats import Chat, RowError
from pronghorn.data.opaque import ROLES, Conditions, conditions
from pronghorn.data.options import LossOn
from pronghorn.data.spans import Located, RewrittenTurn, locate
from pronghorn.data.templates import ChatTemplate, Marked, Prefix, Renderer, RenderError

_FIRST = 0xE000  # placeholders are single characters of Unicode's private use area, which no template writes
_MOST = 256  # messages of a conversation, and shapes of a run; whatever is beyond is rendered
_PLACEHOLDER = re.compile(f"[{chr(_FIRST)}-{chr(_FIRST + _MOST - 1)}]")
_Key = tuple[tuple[str, ...], tuple[bool | None, ...]]
_Result = Located | RewrittenTurn | RowError


class Shapes:
    """Finds what ``locate`` finds, for the conversations of one template, and what trains of them.

    Args:
        template: the template, for its syntax.
        renderer: renders it, here or in another process.
        loss_on: which messages train.
        specials: texts of all special tokens.
    """

    def __init__(
        self, template: ChatTemplate, renderer: Renderer, loss_on: LossOn, specials: Iterable[str]
    ) -> None:
        names = sorted(specials, key=len, reverse=True)
        self.renderer = renderer
        self.loss_on = loss_on
        self.special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        found = conditions(template.text) if template.single and template.plain else None
        known = found is not None and not _PLACEHOLDER.search(
            "".join([template.text, str(template.options), *names])
        )
        self.texts = _Free(found, names) if found is not None and known else None
        self._shapes: dict[_Key, _Shape | None] = {}

    def locate(self, chats: Sequence[Chat]) -> list[_Result]:
        """As ``spans.locate``."""
        found: list[_Result | None] = [self.filled(chat) for chat in chats]
        rest = [index for index, item in enumerate(found) if item is None]
        rendered = locate(self.renderer, [chats[index] for index in rest], self.loss_on, self.special)
        for index, item in zip(rest, rendered, strict=True):
            found[index] = item
        return [item for item in found if item is not None]

    def filled(self, chat: Chat) -> Located | None:
        """The conversation without rendering it; None if it must be rendered."""
        messages = chat.messages
        if self.texts is None or chat.tools is not None or any(len(message) != 2 for message in messages):
            return None
        key = (tuple([message["role"] for message in messages]), chat.train)
        shape = self._shapes.get(key, self)
        if shape is self:
            shape = self._learn(key)
        if not isinstance(shape, _Shape):
            return None
        contents = [message["content"] for message in messages]
        return shape.fill(contents) if all(map(self.texts.hold, contents)) else None

    def _learn(self, key: _Key) -> _Shape | None:
        if len(self._shapes) >= _MOST:
            return None
        self._shapes[key] = self._of(key)
        return self._shapes[key]

    def _of(self, key: _Key) -> _Shape | None:
        roles, train = key
        if len(roles) > _MOST or not {*roles} <= {*ROLES}:
            return None
        messages = [{"role": role, "content": chr(_FIRST + index)} for index, role in enumerate(roles)]
        recorder = _Recorder(self.renderer)
        (item,) = locate(recorder, [Chat(messages, train)], self.loss_on, self.special)
        if not isinstance(item, Located) or not {*item.flags} <= {"opening"}:
            return None
        if not all(_same_for_all_texts(text, item) for text in recorder.texts):
            return None
        return _Shape.of(item)


class _Recorder:
    """Keeps all that was rendered on the way to a result."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self.texts: list[str] = []

    def render(self, prefixes: Sequence[Prefix]) -> list[str | RenderError]:
        rendered = self.renderer.render(prefixes)
        self.texts += [text for text in rendered if isinstance(text, str)]
        return rendered

    def marked(self, prefix: Prefix) -> Marked | RenderError:
        return self.renderer.marked(prefix)


def _same_for_all_texts(text: str, item: Located) -> bool:
    """Whether a prefix agrees with the whole equally far whatever stands for the placeholders.

    Where they part, both must be fixed text. A turn that closes before that point does so at a special
    token (see
    ``spans``), which must have fixed text only behind it.
    """
    whole = item.text
    at = next((i for i, (a, b) in enumerate(zip(text, whole, strict=False)) if a != b), None)
    if at is None:
        return len(text) <= len(whole)
    if _PLACEHOLDER.match(text, at) or _PLACEHOLDER.match(whole, at):
        return False
    opened = any(start == at for start, _ in item.spans)
    return opened or any(end <= at and not _PLACEHOLDER.search(text, end) for _, end in item.spans)


class _Free:
    """Which texts meet the conditions of a template and a set of special tokens."""

    def __init__(self, found: Conditions, specials: Sequence[str]) -> None:
        needles = sorted({*found.needles, *specials}, key=len, reverse=True)
        self.longest = max(map(len, needles), default=0)
        self.needles = "\0".join(needles)
        self.inside = re.compile("|".join(map(re.escape, needles)) or "(?!)")
        # A needle that reaches over the end of a text begins within it, with the needle's first character.
        self.beginning = re.compile(
            f"[{re.escape(''.join({each[0] for each in needles}))}]" if needles else "(?!)"
        )
        self.end = re.compile(
            f"[{re.escape(''.join({each[-1] for each in needles}))}]" if needles else "(?!)"
        )
        self.ends = "".join(found.ends)
        self.trims = found.trims

    def hold(self, text: str) -> bool:
        """Whether the text neither holds nor touches a needle, and begins and ends with nothing that is
        cut."""
        if not text or text.isspace() or (self.trims and (text[0].isspace() or text[-1].isspace())):
            return False
        if self.ends and (text[0] in self.ends or text[-1] in self.ends):
            return False
        reach = self.longest - 1
        return not (
            self.inside.search(text)
            or self.beginning.search(text, max(0, len(text) - reach))
            or self.end.search(text, 0, reach)
            or (len(text) < self.longest and text in self.needles)
        )


@dataclass(frozen=True)
class _Shape:
    """Rendered text with holes: which message fills each, and where spans begin and end.

    A place is ``(fixed characters before it, holes before it)``.
    """

    form: str  # for the % operator
    order: tuple[int, ...]
    spans: tuple[tuple[int, int, int, int], ...]
    flags: tuple[str, ...]

    @classmethod
    def of(cls, item: Located) -> _Shape:
        text = item.text
        holes = [match.start() for match in _PLACEHOLDER.finditer(text)]

        def place(at: int) -> tuple[int, int]:
            before = sum(hole < at for hole in holes)
            return at - before, before

        form = "%s".join(part.replace("%", "%%") for part in _PLACEHOLDER.split(text))
        spans = tuple((*place(start), *place(end)) for start, end in item.spans)
        return cls(form, tuple(ord(text[hole]) - _FIRST for hole in holes), spans, item.flags)

    def fill(self, contents: Sequence[str]) -> Located:
        """The conversation with these texts."""
        texts = tuple([contents[index] for index in self.order])
        before = list(accumulate(map(len, texts), initial=0))
        spans = tuple([(a + before[b], c + before[d]) for a, b, c, d in self.spans])
        return Located(self.form % texts, spans, self.flags)
