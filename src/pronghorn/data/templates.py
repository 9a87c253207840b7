"""The chat template of a run: its origin, its hash, and messages rendered in transformers' sandbox."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pronghorn.errors import DataError

_LIBRARY = resources.files("pronghorn.data") / "chat_templates"
_SUFFIX = ".jinja"
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class RenderError:
    """A conversation the template raised on."""

    reason: str


@dataclass(frozen=True)
class Prefix:
    """The first ``end`` messages of a conversation; those of one conversation share ``messages``."""

    messages: Sequence[Mapping[str, Any]]
    end: int
    tools: Sequence[Mapping[str, Any]] | None = None
    prompt: bool = False  # end with the opening of an assistant turn (add_generation_prompt)


@dataclass(frozen=True)
class Marked:
    """A rendered conversation and the ``[start, end)`` characters inside its ``{% generation %}`` marks."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Renderer(Protocol):
    """Renders conversations, here or in another process."""

    def render(self, prefixes: Sequence[Prefix]) -> list[str | RenderError]:
        """Render each; those the template raises on become a ``RenderError``."""
        ...

    def marked(self, prefix: Prefix) -> Marked | RenderError:
        """Render one with the spans that the template marks as generated; none if it marks nothing."""
        ...


@dataclass(frozen=True)
class ChatTemplate:
    """One Jinja template, bound to the tokenizer whose special tokens it names.

    ``own``: it is the tokenizer's; transformers then picks among several (one for tools).
    """

    tokenizer: Any
    text: str
    origin: str
    own: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """sha256 of the template text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def plain(self) -> bool:
        """Whether the tokenizer renders as transformers does, not by code of its own."""
        return type(self.tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template

    @property
    def single(self) -> bool:
        """Whether all conversations are written with ``text``: transformers picks among several by name."""
        return not self.own or isinstance(self.tokenizer.chat_template, str)

    def render(self, prefixes: Sequence[Prefix]) -> list[str | RenderError]:
        """Render each; those the template raises on become a ``RenderError``."""
        texts: list[str | RenderError] = [""] * len(prefixes)
        groups: dict[tuple[bool, int], list[int]] = {}
        for index, prefix in enumerate(prefixes):
            groups.setdefault((prefix.prompt, id(prefix.tools)), []).append(index)
        # One call for many conversations: half the time per conversation of one call each.
        for members in groups.values():
            for index, text in zip(members, self._render_alike([prefixes[i] for i in members]), strict=True):
                texts[index] = text
        return texts

    def marked(self, prefix: Prefix) -> Marked | RenderError:
        """Render one with the spans that the template marks as generated; none if it marks nothing."""
        try:
            template = self.tokenizer.get_chat_template(None if self.own else self.text, prefix.tools)
            texts, spans = render_jinja_template(
                [prefix.messages[: prefix.end]],
                tools=prefix.tools,
                chat_template=template,
                return_assistant_tokens_mask=bool(_MARK.search(template)),
                **{**self.tokenizer.special_tokens_map, **self.options},
            )
        except Exception as error:  # a template may raise anything
            return RenderError(f"the chat template raised {type(error).__name__}: {error}")
        return Marked(texts[0], tuple((start, end) for start, end in (spans[0] if spans else ())))

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        prompt: bool = False,
    ) -> list[int]:
        """Token ids as a server makes them: ``apply_chat_template(tokenize=True)``."""
        return list(
            self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=None if self.own else self.text,
                add_generation_prompt=prompt,
                tokenize=True,
                return_dict=False,
                **self.options,
            )
        )

    def _render_alike(self, prefixes: list[Prefix]) -> list[str | RenderError]:
        first = prefixes[0]
        try:
            return list(self._apply([p.messages[: p.end] for p in prefixes], first.tools, first.prompt))
        except (
            Exception
        ) as error:  # a template may raise anything; here it only means: find out which one did
            if len(prefixes) == 1:
                return [RenderError(f"the chat template raised {type(error).__name__}: {error}")]
        half = len(prefixes) // 2
        return self._render_alike(prefixes[:half]) + self._render_alike(prefixes[half:])

    def _apply(self, conversations: list[Any], tools: Any, prompt: bool) -> list[str]:
        rendered: list[str] = self.tokenizer.apply_chat_template(
            conversations,
            tools=tools,
            chat_template=None if self.own else self.text,
            add_generation_prompt=prompt,
            tokenize=False,
            **self.options,
        )
        return rendered


def library() -> tuple[str, ...]:
    """Names of the templates that come with pronghorn, for bases that have none."""
    return tuple(
        sorted(entry.name[: -len(_SUFFIX)] for entry in _LIBRARY.iterdir() if entry.name.endswith(_SUFFIX))
    )


def library_template(name: str) -> str:
    """The text of a template of ``library()``.

    Raises:
        DataError: there is none of that name.
    """
    if name not in library():
        raise DataError(
            f"{name}: no such chat template", fix=f"known are {', '.join(library())}, or give a file"
        )
    return (_LIBRARY / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def choose_template(tokenizer: Any, name: str | None, options: Mapping[str, Any]) -> ChatTemplate:
    """The template of that name or file, else the tokenizer's own.

    Raises:
        DataError: the file cannot be read, or there is neither.
    """
    if name in library():
        return ChatTemplate(tokenizer, library_template(str(name)), str(name), False, options)
    if name is not None:
        file = Path(name).expanduser()
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(library())
            raise DataError(
                f"chat template {file}: {error}", fix=f"give data.template a file, or one of {known}"
            ) from error
        if not text.strip():
            raise DataError(f"chat template {file}: the file is empty", fix="check data.template")
        return ChatTemplate(tokenizer, text, str(file), False, options)
    if not tokenizer.chat_template:
        raise DataError(
            "these rows are conversations, and the tokenizer has no chat template to write them with",
            fix=f"set data.template to a file or to one of {', '.join(library())}; or use a base that has a "
            "template (usually named Instruct or Chat); or give rows with prompt and completion",
        )
    text = tokenizer.chat_template
    if isinstance(text, dict):
        text = json.dumps(text, sort_keys=True)
    return ChatTemplate(tokenizer, text, "tokenizer", True, options)
