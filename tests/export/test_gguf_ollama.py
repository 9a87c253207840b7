"""The Modelfile's Go template, rendered by a small reading of Go's rules, is the chat template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pronghorn.errors import NotSupportedError
from pronghorn.export import verify_render
from pronghorn.export.gguf_ollama import find_pieces, modelfile
from pronghorn.export.gguf_tokens import plan_tokens
from pronghorn.export.run import export
from tests import tiny, tokenizer_forms
from tests.export.test_verify_render import LOOP, WRITES

CHATS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Which animal is it?"),),
    (("user", "One\n\ntwo"), ("assistant", "three { } four"), ("user", "five")),
    (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
)
_TAG = re.compile(r"\{\{ (.*?) \}\}")


def go(template: str, messages: tuple[tuple[str, str], ...]) -> str:
    """Render the part of Go's template language that the Modelfile uses; anything else is an error."""
    words = _TAG.split(template)  # text, tag, text, tag, ..., text
    position = 0

    def block(scope: dict[str, Any], live: bool) -> tuple[str, str]:
        nonlocal position
        said = ""
        while position < len(words):
            said += words[position] if live else ""
            if position + 1 == len(words):
                position += 1
                return said, "stop"
            tag, position = words[position + 1], position + 2
            if tag == "end" or tag.startswith("else"):
                return said, tag
            if tag == ".Content":
                said += scope["content"] if live else ""
            elif tag.startswith("range"):
                begin = position
                for number, (role, content) in enumerate(messages):
                    position = begin
                    last = number == len(messages) - 1
                    said += block({"role": role, "content": content, "last": last}, live)[0]
            elif tag.startswith("if "):
                said += branches(tag.removeprefix("if "), scope, live)
            elif tag != "$last := eq (len (slice $.Messages $i)) 1":
                raise AssertionError(f"unknown tag {tag!r}")
        return said, "stop"

    def branches(condition: str, scope: dict[str, Any], live: bool) -> str:
        said, done = "", False
        while True:
            taken = live and not done and holds(condition, scope)
            part, end = block(scope, taken)
            said, done = said + part, done or taken
            if end == "end":
                return said
            assert end.startswith("else"), "an if without its end"
            condition = end.removeprefix("else").strip().removeprefix("if ") or "always"

    def holds(condition: str, scope: dict[str, Any]) -> bool:
        system = any(role == "system" for role, _ in messages)
        known = {
            "always": True,
            "not .System": not system,
            "not $last": not scope.get("last"),
            'and $last (ne .Role "assistant")': scope.get("last") and scope.get("role") != "assistant",
        }
        if condition in known:
            return bool(known[condition])
        matched = re.fullmatch(r'eq \.Role "(\w+)"', condition)
        assert matched, f"unknown condition {condition!r}"
        return bool(scope["role"] == matched[1])  # fmt: skip

    text, end = block({}, True)
    assert end == "stop", "more ends than blocks"
    return text


def rendered(fast: Any, chat: tuple[tuple[str, str], ...]) -> str:
    """The chat template's text, without the start token that the tokenizer adds by itself."""
    messages = [{"role": role, "content": said} for role, said in chat]
    text: str = fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    adds = fast.bos_token and fast("a")["input_ids"][0] == fast.bos_token_id
    return text.removeprefix(fast.bos_token) if adds else text


@pytest.mark.parametrize("form", tokenizer_forms.FORMS)
def test_the_go_template_says_what_the_chat_template_says(form: str) -> None:
    fast = tokenizer_forms.FORMS[form]()
    pieces = find_pieces(fast, fast.chat_template)
    assert pieces is not None
    chats = [*CHATS, *((("system", "Be brief."), *chat) for chat in CHATS if pieces.system is not None)]
    assert (pieces.system is None) == (form == "gemma")
    for chat in chats:
        assert go(pieces.go(), chat) == rendered(fast, chat)


def test_the_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    tokenizer_forms.write_form(tmp_path, "llama3")
    lines = modelfile("model-Q8_0.gguf", plan_tokens(tmp_path)).splitlines()
    assert lines[0] == "FROM ./model-Q8_0.gguf"
    assert lines[1].startswith('TEMPLATE """{{ range $i, $_ := .Messages }}')
    assert lines[-2:] == ['PARAMETER stop "<|eot_id|>"', 'PARAMETER stop "<|end_of_text|>"']


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}",  # nothing fixed around the messages
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}",  # other each time
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_without_fixed_pieces_is_left_to_ollama(template: str, tmp_path: Path) -> None:
    fast = tokenizer_forms.smollm()
    fast.chat_template = template
    assert find_pieces(fast, template) is None
    fast.save_pretrained(tmp_path)
    text = modelfile("m.gguf", plan_tokens(tmp_path))
    assert 'TEMPLATE """' not in text
    assert "Ollama takes the one in the file" in text


@pytest.mark.parametrize(
    ("template", "seconds", "told"),
    [(LOOP, 0.5, "did not finish within 0.5 s"), (WRITES, 60.0, "wrote more than 1,048,576 characters")],
    ids=["loops", "writes on"],
)
def test_a_hostile_template_ends_the_export_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, seconds: float, told: str
) -> None:
    monkeypatch.setattr(verify_render, "SECONDS", seconds)
    base = tiny.write_base(tmp_path / "base")
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    (base / "chat_template.jinja").write_text(template)
    for source in (base, adapter):
        with pytest.raises(NotSupportedError, match=f"chat template does not render .*: it {told}") as caught:
            export(source, tmp_path / "out" / "gguf", format="gguf-f16", verify=False)
        assert "chat template of the base" in caught.value.fix
        assert not (tmp_path / "out").exists()
