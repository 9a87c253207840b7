"""Rows of any known layout to one of three samples: a chat, a prompt with its completion, or plain text.

The layout is read from the columns. A row that cannot be used is refused here, or by the chat template.
Rows with several answers, or none, are read in ``preference.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pronghorn.data.options import Format
from pronghorn.data.rows import Row

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = MappingProxyType(
    {
        "human": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "bot": "assistant",
        "model": "assistant",
        "ai": "assistant",
        "observation": "tool",
        "tool_response": "tool",
        "function": "tool",
        "ipython": "tool",
    }
)
REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_FIELDS = (*REASONING, "name", "tool_call_id")


@dataclass(frozen=True)
class Chat:
    """Messages for the chat template; ``train[i]`` is what the row says of message i, None if nothing."""

    messages: list[dict[str, Any]]
    train: tuple[bool | None, ...]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion, both plain text; the completion and the end token train."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text; all of it and the end token train."""

    text: str


Sample = Chat | Pair | Text


class RowError(Exception):
    """A field of a row breaks a rule; becomes a ``BadRow``."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def layouts(columns: Mapping[str, Any]) -> list[Format]:
    """Every layout that a row with these columns fits; a column holding null does not count."""
    has = {name for name, value in columns.items() if value is not None}
    fits: list[Format] = []
    if "messages" in has:
        fits.append("messages")
    if "conversations" in has:
        fits.append("conversations")
    if {"prompt", "completion"} <= has:
        fits.append("prompt_completion")
    if {"instruction", "output"} <= has:
        fits.append("instruction")
    if {"chosen", "rejected"} <= has:
        fits.append("preference")
    if "text" in has:
        fits.append("text")
    if "prompt" in has and not {"completion", "chosen", "rejected"} & {*columns} and not fits:
        fits.append("prompt_only")
    return fits


def detect_format(row: Row) -> Format:
    """The layout of a row, by its columns.

    Raises:
        RowError: none or several fit.
    """
    fits = layouts(row.value)
    if len(fits) == 1:
        return fits[0]
    columns = ", ".join(map(str, row.value)) or "none"
    if fits:
        raise RowError("", f"its columns ({columns}) fit several formats: {' and '.join(fits)}")
    raise RowError("", f"its columns ({columns}) fit no format")


def to_sample(row: Row, layout: Format, system: str | None = None) -> Sample:
    """What a row of ``layout`` says to train on.

    Raises:
        RowError: a field is missing, empty, of the wrong type or has an unknown role.
    """
    if layout == "text":
        return Text(read_text(row.value, "text"))
    if layout == "prompt_completion" and isinstance(row.value.get("prompt"), str):
        return Pair(read_text(row.value, "prompt"), read_text(row.value, "completion"))
    chat = to_messages(row, layout)
    if system is not None and chat.messages[0]["role"] not in ("system", "developer"):
        first = {"role": "system", "content": system}
        chat = Chat([first, *chat.messages], (None, *chat.train), chat.tools)
    return chat


def to_messages(row: Row, layout: Format) -> Chat:
    """The messages of a row, in the keys chat templates read.

    Raises:
        RowError: a field is missing, empty, of the wrong type or has an unknown role.
    """
    value = row.value
    if layout == "prompt_completion":
        chat = _prompt_messages(value)
    elif layout == "instruction":
        chat = _instruction(value)
    else:
        chat = read_chat(value.get(layout), layout)
        if layout == "conversations" and isinstance(value.get("system"), str) and value["system"].strip():
            chat = _with_system(chat, value["system"])
    return Chat(chat.messages, chat.train, read_tools(value.get("tools")))


def _prompt_messages(value: Mapping[str, Any]) -> Chat:
    prompt = read_chat(value.get("prompt"), "prompt")
    completion = value.get("completion")
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    answer = read_chat(completion, "completion")
    if not any(message["role"] == "assistant" for message in answer.messages):
        raise RowError("completion", "has no assistant message")
    return Chat(prompt.messages + answer.messages, (False,) * len(prompt.messages) + answer.train)


def _instruction(value: Mapping[str, Any]) -> Chat:
    question = read_text(value, "instruction")
    extra = value.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError("input", f"must be text, this is {kind_of(extra)}")
    if extra and extra.strip():
        question = f"{question}\n\n{extra}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": read_text(value, "output")},
    ]
    chat = Chat(messages, (None, None))
    system = value.get("system")
    return _with_system(chat, system) if isinstance(system, str) and system.strip() else chat


def _with_system(chat: Chat, system: str) -> Chat:
    if chat.messages[0]["role"] == "system":
        raise RowError("system", "given as a column and as the first message")
    return Chat([{"role": "system", "content": system}, *chat.messages], (None, *chat.train))


def read_chat(turns: Any, field: str) -> Chat:
    """A list of messages, checked one by one.

    Raises:
        RowError: it is no list, it is empty, or a message breaks a rule.
    """
    turns = _parse_json(turns, field)
    if not isinstance(turns, list):
        raise RowError(field, f"must be a list of messages, this is {kind_of(turns)}")
    if not turns:
        raise RowError(field, "holds no message")
    messages, train = [], []
    for index, turn in enumerate(turns):
        where = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise RowError(where, f"must be an object with role and content, this is {kind_of(turn)}")
        messages.append(_message(turn, where))
        train.append(_trains(turn, where))
    return Chat(messages, tuple(train))


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": _role(turn, where)}
    calls = _tool_calls(turn.get("tool_calls"), f"{where}.tool_calls")
    content_field = "content" if "content" in turn or "value" not in turn else "value"
    content = _content(turn.get(content_field), f"{where}.{content_field}")
    if content is not None:
        message["content"] = content
    # An assistant that calls a tool says nothing, and a tool may return nothing; all others must speak.
    silent = (message["role"] == "assistant" and calls) or (message["role"] == "tool" and content is not None)
    if not silent and (content is None or not content.strip()):
        raise RowError(f"{where}.{content_field}", "is null or missing" if content is None else "is empty")
    if silent and content is None:
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    for name in _TEXT_FIELDS:
        if turn.get(name) is not None:
            if not isinstance(turn[name], str):
                raise RowError(f"{where}.{name}", f"must be text, this is {kind_of(turn[name])}")
            message[name] = turn[name]
    return message


def _role(turn: Mapping[str, Any], where: str) -> str:
    key = "role" if "role" in turn or "from" not in turn else "from"
    role = turn.get(key)
    if not isinstance(role, str):
        raise RowError(
            f"{where}.{key}", "is missing" if role is None else f"must be text, this is {kind_of(role)}"
        )
    known = _ALIASES.get(role.lower(), role)
    if known not in ROLES:
        raise RowError(f"{where}.{key}", f"{role!r} is no role; known are {', '.join((*ROLES, *_ALIASES))}")
    return known


def _content(content: Any, where: str) -> str | None:
    if content is None:
        return None
    if isinstance(content, str):
        return _encodable(content, where)
    if not isinstance(content, list):
        raise RowError(where, f"must be text, this is {kind_of(content)}")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif (
            isinstance(part, dict)
            and part.get("type", "text") == "text"
            and isinstance(part.get("text"), str)
        ):
            texts.append(part["text"])
        else:
            kind = part.get("type", "untyped") if isinstance(part, dict) else kind_of(part)
            raise RowError(f"{where}[{index}]", f"is a {kind} part; only text can be trained")
    return _encodable("".join(texts), where)


def _encodable(text: str, where: str) -> str:
    r"""JSON can spell half of a surrogate pair (``\ud800``), which is no character and no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                where, f"holds half a character at position {error.start} (a lone surrogate)"
            ) from error
    return text


def _trains(turn: Mapping[str, Any], where: str) -> bool | None:
    """``train: true/false``, or OpenAI's ``weight: 0/1``."""
    for key, allowed in (("train", (True, False)), ("weight", (0, 1))):
        value = turn.get(key)
        if value is not None:
            if value not in allowed or (key == "train" and not isinstance(value, bool)):
                raise RowError(
                    f"{where}.{key}", f"must be {' or '.join(map(str, allowed))}, this is {value!r}"
                )
            return bool(value)
    return None


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(where, "must be a list of objects")
    parsed = []
    for index, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}[{index}]", "has no function name")
        # OpenAI sends arguments as JSON text; templates write them with `tojson` and would quote it twice.
        function = {
            **function,
            "arguments": _parse_json(function.get("arguments", {}), f"{where}[{index}].arguments"),
        }
        parsed.append({**call, "function": function} if "function" in call else function)
    return parsed


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The column ``tools``, which may be JSON text; None if it is empty.

    Raises:
        RowError: it is no list of objects.
    """
    tools = _parse_json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools", "must be a list of objects")
    return tools


def _parse_json(value: Any, field: str) -> Any:
    """Columns that differ in structure from row to row are kept as JSON text in CSV and Arrow files."""
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(field, f"is text that is not JSON: {error}") from error


def read_text(value: Mapping[str, Any], field: str) -> str:
    """A column that must hold text.

    Raises:
        RowError: it is missing, null, empty or of another type.
    """
    text = value.get(field)
    if text is None:
        raise RowError(field, "is null" if field in value else "is missing")
    if not isinstance(text, str):
        raise RowError(field, f"must be text, this is {kind_of(text)}")
    if not text.strip():
        raise RowError(field, "is empty")
    return _encodable(text, field)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {list: "a list", dict: "an object", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
