"""Chat: one folder in, streamed text out, ended by the model's end token."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pronghorn.errors import DataError, SourceError
from pronghorn.serving.chat import Chat
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("chat") / "base", "llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return tiny.write_adapter(base.parent / "adapter", base)


def greedy(model: torch.nn.Module, messages: list[dict[str, str]], tokens: int) -> str:
    tokenizer = tiny.tokenizer()
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    for _ in range(tokens):
        token = int(model(ids).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    start = len(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def test_answer_is_the_models_own_and_streams(base: Path) -> None:
    session = Chat(base, system="Be brief.", max_new_tokens=12)
    pieces = list(session.ask("Hello"))
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert "".join(pieces) == greedy(model, asked, 12)
    assert len(pieces) > 1
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]


def test_adapter_folder_answers_like_base_plus_adapter(base: Path, adapter: Path) -> None:
    """Its base is found through adapter_config.json, or both are named."""
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    expected = greedy(wrapped, [{"role": "user", "content": "Hello"}], 12)
    assert "".join(Chat(adapter, max_new_tokens=12).ask("Hello")) == expected
    assert "".join(Chat(adapter, base=base, max_new_tokens=12).ask("Hello")) == expected
    assert "".join(Chat(base, max_new_tokens=12).ask("Hello")) != expected


def test_it_stops_at_an_end_token(base: Path) -> None:
    session = Chat(base, max_new_tokens=12)
    whole = "".join(session.ask("Hello"))
    inputs = session.tokenizer.apply_chat_template(
        session.messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = session.model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    again = Chat(base, max_new_tokens=12)
    again.model.generation_config.eos_token_id = [3, int(made[4])]
    short = "".join(again.ask("Hello"))
    assert whole.startswith(short.rstrip("\ufffd"))
    assert 0 < len(short) < len(whole)


def test_bad_folders_are_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has neither config\.json nor"):
        Chat(tmp_path)
    run = tmp_path / "run"
    moved = shutil.copytree(adapter, run / "adapter")
    with pytest.raises(SourceError, match=r"use .*/run/adapter"):
        Chat(run)
    (moved / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace(str(base), str(tmp_path / "gone/away"))
    )
    with pytest.raises(SourceError, match=r"there is no folder '.*gone/away'"):
        Chat(moved)
    assert Chat(moved, base=base).tokenizer.eos_token_id == 3
    bare = tiny.write_base(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        Chat(bare)


def test_an_error_while_generating_reaches_the_reader(base: Path) -> None:
    session = Chat(base, max_new_tokens=4)
    session.model.generation_config.num_beams = 2  # streaming serves one beam only
    with pytest.raises(ValueError, match="streamer"):
        list(session.ask("Hello"))
