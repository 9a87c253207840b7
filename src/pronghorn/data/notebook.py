"""The dataset and template functions that notebooks already call, over this room's own templates."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pronghorn.data.templates import library_template
from pronghorn.errors import DataError

# names used elsewhere for formats of the library that are equal token for token
_SAME = MappingProxyType(
    {
        "llama": "llama-2",
        "llama3": "llama-3",
        "gemma2": "gemma",
        "gemma-2": "gemma",
        "gemma3": "gemma",
        "gemma-3": "gemma",
        "phi-3.5": "phi-3",
        "qwen2.5": "qwen-2.5",
        "qwen25": "qwen-2.5",
        "qwen-25": "qwen-2.5",
        "qwen3": "qwen-3",
    }
)
_KEYS = MappingProxyType({"role": "role", "content": "content", "user": "user", "assistant": "assistant"})
_SLOT = re.compile(r"\{([^{}]+)\}")
_OPTIONAL = re.compile(r"\[\[(.+?)\]\]", re.DOTALL)


def standardize_data_formats(
    dataset: Any,
    tokenizer: Any = None,
    aliases_for_system: Sequence[str] = ("system",),
    aliases_for_user: Sequence[str] = ("user", "human", "input"),
    aliases_for_assistant: Sequence[str] = ("gpt", "assistant", "output"),
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Any:
    """Conversations of any keys (from/value, role/content) and role names, with the keys role and content.

    Args:
        dataset: a ``datasets.Dataset`` with a column ``conversations`` or ``messages``; others stay so.
        tokenizer: not needed; accepted because notebooks pass it.
        aliases_for_system: names that mean the role system; likewise for user and assistant.
        batch_size: rows converted at once.
        num_proc: processes, as in ``Dataset.map``.

    Raises:
        DataError: a turn has no known keys, or a role is in none of the lists.
    """
    column = next((name for name in ("conversations", "messages") if name in dataset.column_names), None)
    if column is None:
        return dataset
    roles = dict.fromkeys(aliases_for_system, "system")
    roles |= dict.fromkeys(aliases_for_user, "user") | dict.fromkeys(aliases_for_assistant, "assistant")

    def convert(batch: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        numbered = zip(batch[column], indices, strict=True)
        return {column: [[_turn(turn, roles, index + 1) for turn in turns] for turns, index in numbered]}

    return dataset.map(
        convert,
        batched=True,
        with_indices=True,
        batch_size=batch_size,
        num_proc=num_proc,
        remove_columns=[column],
    )


standardize_sharegpt = standardize_data_formats


def _turn(turn: Mapping[str, Any], roles: Mapping[str, str], row: int) -> dict[str, str]:
    for role_key, content_key in (("role", "content"), ("from", "value")):
        if turn.get(role_key) is not None and turn.get(content_key) is not None:
            if turn[role_key] not in roles:
                raise DataError(
                    f"row {row}: {turn[role_key]!r} is no known role",
                    fix="name it in aliases_for_user or the like",
                )
            return {"role": roles[turn[role_key]], "content": turn[content_key]}
    raise DataError(
        f"row {row}: a turn has the keys {', '.join(turn)}", fix="give role and content, or from and value"
    )


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """Make a column ``conversations`` (from/value) out of columns of text.

    Args:
        dataset: a ``datasets.Dataset``.
        merged_prompt: the question, with ``{column}`` slots; a part in ``[[double brackets]]`` is left out
            where a column in it is empty. Without it the question is the column ``merged_column_name``.
        merged_column_name: see ``merged_prompt``.
        output_column_name: the column with the answer.
        remove_unused_columns: keep only ``conversations``.
        conversation_extension: questions per conversation; further ones are drawn from other rows.
        random_state: seed of that draw.

    Raises:
        DataError: a column is missing.
    """
    wanted = {output_column_name, *(_SLOT.findall(merged_prompt) if merged_prompt else [merged_column_name])}
    if missing := sorted(wanted - {*dataset.column_names}):
        raise DataError(
            f"no column {', '.join(missing)}; there are {', '.join(dataset.column_names)}",
            fix="check merged_prompt and output_column_name",
        )
    count = len(dataset)
    others = []
    for extension in range(conversation_extension - 1):
        order = list(range(count))
        random.Random(random_state + extension).shuffle(order)
        others.append(order)

    def build(row: dict[str, Any], index: int) -> dict[str, Any]:
        turns = []
        for each in [row, *(dataset[order[index]] for order in others)]:
            question = _merge(merged_prompt, each) if merged_prompt else str(each[merged_column_name])
            turns.append({"from": "human", "value": question})
            turns.append({"from": "gpt", "value": str(each[output_column_name])})
        return {"conversations": turns}

    dropped = dataset.column_names if remove_unused_columns else None
    return dataset.map(build, with_indices=True, remove_columns=dropped)


def _merge(prompt: str, row: Mapping[str, Any]) -> str:
    def fill(text: str) -> str:
        return _SLOT.sub(lambda slot: "" if row[slot[1]] is None else str(row[slot[1]]), text)

    def optional(part: re.Match[str]) -> str:
        full = all(row[name] not in (None, "") for name in _SLOT.findall(part[1]))
        return fill(part[1]) if full else ""

    # Filled part by part, so that brackets and braces inside a row stay text.
    parts, end = [], 0
    for part in _OPTIONAL.finditer(prompt):
        parts += [fill(prompt[end : part.start()]), optional(part)]
        end = part.end()
    return "".join([*parts, fill(prompt[end:])])


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapping[str, str] = _KEYS,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """Give a tokenizer a chat template of the library; it is changed in place and returned.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: a name of ``templates.library()``, or a template and the token that ends a turn.
        mapping: keys and role names of your rows, e.g. ``{"role": "from", "content": "value",
            "user": "human", "assistant": "gpt"}``. Role and content are read as well, as serving sends them.
        map_eos_token: make the token that ends a turn the tokenizer's eos token.
        system_message: system message for conversations that have none.

    Raises:
        DataError: no such template, or the tokenizer lacks the token that ends its turns.
    """
    if isinstance(chat_template, str):
        text = library_template(_SAME.get(chat_template, chat_template))
        end = _end_token(tokenizer, text)
    else:
        text, end = chat_template
    if tokenizer.convert_tokens_to_ids(end) in (None, tokenizer.unk_token_id):
        raise DataError(
            f"the template ends turns with {end!r}, which is no token of this tokenizer",
            fix="choose a template that uses its eos token (vicuna, alpaca, zephyr), or add the token first",
        )
    tokenizer.chat_template = _preamble(mapping, system_message) + text
    if map_eos_token:
        tokenizer.eos_token = end
    return tokenizer


def _end_token(tokenizer: Any, text: str) -> str:
    """What the template writes right behind an answer."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    rendered = tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False)
    tail = rendered[rendered.rindex("answer") + len("answer") :].strip()
    if tokenizer.eos_token and tail.startswith(tokenizer.eos_token):
        return str(tokenizer.eos_token)
    return tail.split()[0] if tail else ""


def _preamble(mapping: Mapping[str, str], system_message: str | None) -> str:
    """Jinja that brings messages into role and content before the template reads them."""
    keys = {**_KEYS, **mapping}
    text = ""
    if keys != dict(_KEYS):
        roles = json.dumps({keys["user"]: "user", keys["assistant"]: "assistant"})
        role, content = json.dumps(keys["role"]), json.dumps(keys["content"])
        text += (
            f"{{%- set own = namespace(messages=[]) -%}}{{%- set roles = {roles} -%}}"
            "{%- for message in messages -%}"
            f"{{%- set role = message[{role}] if {role} in message else message.role -%}}"
            f"{{%- set content = message[{content}] if {content} in message else message.content -%}}"
            "{%- set own.messages = own.messages + [{'role': roles.get(role, role), 'content': content}] -%}"
            "{%- endfor -%}{%- set messages = own.messages -%}"
        )
    if system_message is not None:
        first = json.dumps({"role": "system", "content": system_message})
        text += (
            "{%- if not messages or messages[0].role != 'system' -%}"
            f"{{%- set messages = [{first}] + messages -%}}{{%- endif -%}}"
        )
    return text
