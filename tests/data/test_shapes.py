"""Conversations filled in from their shape: exactly what rendering each of them gives, or not filled in
at all."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trl

from pronghorn.data.formats import Chat
from pronghorn.data.opaque import Conditions, conditions
from pronghorn.data.options import DataOptions, LossOn
from pronghorn.data.shapes import Shapes
from pronghorn.data.spans import Located, RewrittenTurn, locate
from pronghorn.data.templates import ChatTemplate, Prefix, RenderError, choose_template, library
from pronghorn.data.tokens import Encoder
from tests.data.families import FAMILIES, Family, family_tokenizer, tokenizer

SHIPPED = sorted(Path(trl.__file__).parent.rglob("*.jinja"))
PIECES = [
    *(
        "a",
        "Four.",
        "x y",
        "é 漢字 🎉",
        "100 %s %d %",
        "\n",
        " ",
        "\t",
        "\xa0",
        "\n\n### Response:\n",
        "{{ x }}",
    ),
    *(
        "<",
        ">",
        "<|",
        "|>",
        "[",
        "]",
        "<think>",
        "</think>",
        "</thi",
        "nk>",
        "user",
        "assistant",
        "\\n",
        "\0",
    ),
    *("<tool_response>", "</tool_response>", "<|channel|>final<|message|>", "start", "end", "s", "eot_id"),
]
TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


class Counting:
    """A renderer that counts what it renders."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.count = 0

    def render(self, prefixes: Any) -> list[str | RenderError]:
        self.count += len(prefixes)
        return self.template.render(prefixes)


def text(chosen: random.Random, special: list[str]) -> str:
    plain = "".join(
        chosen.choices(["Some words", " and", " more,\n\n", " 5 %", ".", "é"], k=chosen.randint(1, 6))
    ).strip()
    odd = "".join(chosen.choices([*PIECES, *special], k=chosen.randint(1, 4)))
    return plain if chosen.random() < 0.75 else odd


def conversation(chosen: random.Random, special: list[str]) -> Chat:
    roles = ["user", "assistant"] * chosen.randint(1, 3)
    if chosen.random() < 0.4:
        roles.insert(0, "system")
    if chosen.random() < 0.1:
        chosen.shuffle(roles)
    if chosen.random() < 0.1:
        roles = roles[:-1]
    messages: list[dict[str, Any]] = [{"role": role, "content": text(chosen, special)} for role in roles]
    tools = None
    if chosen.random() < 0.1:
        messages.append({"role": "assistant", "content": "", "tool_calls": CALL})
        messages.append({"role": "tool", "content": text(chosen, special)})
    if chosen.random() < 0.05:
        tools = [TOOL]
    if chosen.random() < 0.1 and messages:
        messages[-1]["reasoning_content"] = text(chosen, special)
    train = tuple(chosen.choice((None, None, None, True, False)) for _ in messages)
    return Chat(messages, train, tools)


def agree(template: ChatTemplate, special: list[str], loss_on: LossOn, seed: int, count: int) -> int:
    """Compare ``count`` conversations located both ways; how many of them were filled in."""
    chosen = random.Random(seed)
    chats = [chat for chat in (conversation(chosen, special) for _ in range(count)) if chat.messages]
    shapes = Shapes(template, template, loss_on, special)
    expected = locate(template, chats, loss_on, shapes.special)
    for chat, found, wanted in zip(chats, shapes.locate(chats), expected, strict=True):
        if isinstance(wanted, Located | RewrittenTurn):
            assert found == wanted, chat
        else:
            assert str(found) == str(wanted)
    return sum(shapes.filled(chat) is not None for chat in chats)


@pytest.mark.parametrize("name", library())
def test_library_templates(name: str) -> None:
    tok = family_tokenizer(name)
    template = choose_template(tok, None, {})
    special = [token.content for token in tok.added_tokens_decoder.values()]
    filled = 0
    for loss_on in ("assistant", "last_assistant", "all"):
        filled += agree(template, special, loss_on, seed=len(name), count=150)  # type: ignore[arg-type]
    assert filled > 50


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_templates_in_use(path: Path) -> None:
    """The templates that TRL ships; those that look into texts are rendered for each row."""
    special = ["<s>", "</s>", "<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|eot_id|>"]
    tok = tokenizer(Family("<s>", "</s>", tuple(special[2:]), "", ""), path.read_text())
    filled = agree(choose_template(tok, None, {}), special, "assistant", seed=7, count=60)
    assert filled == 0 or conditions(path.read_text()) is not None


def test_families_in_use_are_not_rendered_row_by_row() -> None:
    names = {path.stem for path in SHIPPED if conditions(path.read_text()) is not None}
    wanted = {"llama3", "qwen2_5", "qwen3", "gemma3", "phi3", "deepseekv3"}
    assert wanted & {path.stem for path in SHIPPED} <= names


def test_a_proven_template_renders_once_for_each_shape() -> None:
    renderer = Counting(choose_template(family_tokenizer("llama-3"), None, {}))
    shapes = Shapes(renderer.template, renderer, "assistant", [])
    chats = [
        Chat([{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}], (None, None))
        for n in range(1000)
    ]
    assert all(isinstance(item, Located) for item in shapes.locate(chats))
    assert renderer.count == 2  # the whole, and the opening of the answer


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("{{ message.content }}", Conditions()),
        ("{{ message['content'] | trim }}", Conditions(trims=True)),
        ("{{ message.content.lstrip('\\n') }}", Conditions(ends={"\n"})),
        ("{% if '</think>' in message.content %}x{% endif %}", Conditions({"</think>"})),
        ("{{ message.content.split('#')[-1] }}", Conditions({"#"})),
        ("{% if message.content is string %}x{% else %}{{ message.content[0] }}{% endif %}", Conditions()),
        ("{% if message.role == 'tool' %}{{ message.content | tojson }}{% endif %}", Conditions()),
        ("{% if message.tool_calls %}{{ message.content | tojson }}{% endif %}", Conditions()),
        ("{% generation %}{{ message.content }}{% endgeneration %}", Conditions()),
        ("{% if message.role == 'user' %}{{ message.content | tojson }}{% endif %}", None),
        ("{{ message.content | length }}", None),
        ("{{ message.content | upper }}", None),
        ("{{ message.content[0] }}", None),
        ("{{ message.content is upper }}", None),
        ("{{ message.content > 'a' }}", None),
        ("{{ message.content.count('a') }}", None),
        ("{{ 'a %s' % message.content }}", None),
        ("{{ message | tojson }}", None),
        ("{{ message.values() | list }}", None),
        ("{{ message['con' ~ 'tent'] }}", None),
        ("{{ messages | map(attribute='content') | join }}", None),
        ("{% for c in message.content %}{{ c }}{% endfor %}", None),
        ("{{ {message.content: 1} }}", None),
        ("{{ [message.content] | length }}", None),
        ("{% set x = message.content %}{% if x == message.role %}y{% endif %}", None),
        ("{% set ns = namespace(x=message.content) %}{{ ns['x'] | upper }}", None),
        ("{% set ns = namespace(x=message.content) %}{% set other = ns %}{{ other.x | upper }}", None),
        ("{% macro f(x) %}{{ x | upper }}{% endmacro %}{{ f(message.content) }}", None),
        ("{% macro f() %}{{ message.content }}{% endmacro %}{% set g = f %}{{ g() | upper }}", None),
        ("{% set x %}{{ message.content }}{% endset %}{{ x | length }}", None),
        ("{{ self }}", None),
        ("{{ message.content", None),
    ],
)  # fmt: skip
def test_what_a_template_may_do_with_a_text(part: str, found: Conditions | None) -> None:
    assert conditions("{% for message in messages %}" + part + "{% endfor %}") == found


@pytest.mark.parametrize(
    "text",
    ["<|eot_id|>", "a <", "> a", "eot", "a<|eot_", " a", "a\n", "\xa0a", "", "   ", "x" * 5 + "</think>"],
)
def test_texts_that_are_rendered(text: str) -> None:
    """Each holds or touches a special token or is cut; the same conversation without it is filled in."""
    part = "{{ '<|' ~ m.role ~ '|>' ~ (m.content | trim).split('</think>')[-1] ~ eos_token }}"
    template = "{% for m in messages %}" + part + "{% endfor %}"
    tok = tokenizer(FAMILIES["llama-3"], template)
    renderer = choose_template(tok, None, {})
    shapes = Shapes(
        renderer, renderer, "all", Encoder(tok, renderer, DataOptions(train="x"), 9).special_texts
    )
    plain = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert shapes.filled(Chat(plain, (None, None))) is not None
    assert shapes.filled(Chat([plain[0], {"role": "assistant", "content": text}], (None, None))) is None


def test_several_templates_or_code_of_its_own_are_rendered() -> None:
    tok = family_tokenizer("chatml")
    chat = Chat([{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], (None, None))
    tok.chat_template = {"default": tok.chat_template, "tool_use": tok.chat_template}
    template = choose_template(tok, None, {})
    assert Shapes(template, template, "assistant", []).filled(chat) is None

    class Own(type(tok)):  # type: ignore[misc]
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return super().apply_chat_template(*args, **kwargs)

    tok = family_tokenizer("chatml")
    tok.__class__ = Own
    template = choose_template(tok, None, {})
    assert Shapes(template, template, "assistant", []).filled(chat) is None
    assert template.render([Prefix(chat.messages, 2)])[0]
