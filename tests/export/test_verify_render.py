"""Chat templates of foreign folders: rendered as transformers renders them, and never for long."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pronghorn.export import verify_render
from pronghorn.export.verify import check_files
from pronghorn.export.verify_engines import MEANING
from pronghorn.export.verify_model import CHAT, chat_ids
from pronghorn.export.verify_render import EndlessError, RenderError, rendered
from tests import tiny

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILLS = "{% set n = namespace(t='x') %}{% for a in range(50) %}{% set n.t = n.t + n.t %}{% endfor %}"
POWER = "{% set n = namespace(t=9) %}{% for a in range(50) %}{% set n.t = n.t ** n.t %}{% endfor %}"
WRITES = "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}"
RICH = (
    "{{ bos_token }}{% if tools is none and documents is none %}{% for m in messages %}\n"
    "    {% generation %}<|{{ m.role }}|>{{ m | tojson }}{{ ['<é>'] | tojson(indent=1) }}\n"
    "{% endgeneration %}\n"
    "{% if loop.first %}{% continue %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", ["own", RICH, "{{ raise_exception('no tools') }}"])
def test_the_same_text_as_in_transformers(template: str) -> None:
    tokenizer = tiny.tokenizer()
    if template != "own":
        tokenizer.chat_template = template
    try:
        text = tokenizer.apply_chat_template(list(CHAT), add_generation_prompt=True, tokenize=False)
    except Exception as error:
        with pytest.raises(RenderError, match=str(error)):
            chat_ids(tokenizer)
        return
    assert chat_ids(tokenizer) == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "seconds", "told"),
    [
        (LOOP, 1.0, "did not finish within 1 s"),
        (POWER, 1.0, "did not finish within 1 s"),
        (FILLS, 60.0, "more than 1 GiB"),
        (WRITES, 60.0, "wrote more than 1,048,576 characters"),
    ],
    ids=["loops", "computes", "fills the memory", "writes on"],
)
def test_a_template_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, template: str, seconds: float, told: str
) -> None:
    monkeypatch.setattr(verify_render, "SECONDS", seconds)
    with pytest.raises(EndlessError, match=told):
        rendered(template, CHAT, {}, prompt=False)


def test_a_folder_whose_template_loops_is_told_and_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verify_render, "SECONDS", 1.0)
    folder = shutil.copytree(tiny.write_base(tmp_path / "base", "llama"), tmp_path / "folder")
    (folder / "chat_template.jinja").write_text(LOOP)
    report = check_files(folder, None)
    failure = report.first_failure
    assert failure is not None
    assert "does not render a short chat: it did not finish within 1 s" in failure.detail
    assert {report.engine(name).outcome for name in ("transformers 5", "vllm")} == {"endless chat"}
    assert MEANING["endless chat"] in str(report)
