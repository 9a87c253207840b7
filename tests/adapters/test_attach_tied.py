"""Tied embeddings: the choice is asked for before training, and survives training, saving and reloading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import LoraOptions
from pronghorn.errors import AdapterError, NotSupportedError
from pronghorn.loading.load import load
from tests import tiny
from tests.stack import PEFT_KEEPS_TIED

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
EMBED, HEAD = "embed_tokens", "lm_head"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "qwen2", "qwen2")


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": [EMBED]},
        {"modules_to_save": [HEAD]},
        {"targets": [HEAD]},
        {"targets": ["q_proj", EMBED]},
    ],
    ids=str,
)
def test_the_choice_is_asked_for(base: Path, options: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match=r"uses one matrix for model\.embed_tokens and lm_head") as caught:
        attach_lora(load(base)[0], LoraOptions(**options), say=None)
    assert 'tied="keep"' in caught.value.fix and 'tied="untie"' in caught.value.fix


def test_nothing_is_asked_where_nothing_is_tied_or_touched(base: Path, tmp_path: Path) -> None:
    attach_lora(load(base)[0], LoraOptions(), say=None)
    attach_lora(tiny.model("llama"), LoraOptions(modules_to_save=[HEAD]), say=None)
    attach_lora(tiny.model("llama"), LoraOptions(modules_to_save=[HEAD], tied="untie"), say=None)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("named", [[EMBED], [HEAD], [EMBED, HEAD]], ids=str)
def test_kept_tied(base: Path, named: list[str], dtype: str, tmp_path: Path) -> None:
    options = LoraOptions(modules_to_save=named, tied="keep")
    if not PEFT_KEEPS_TIED:
        with pytest.raises(NotSupportedError, match='tied="keep" needs a newer peft'):
            attach_lora(load(base, _options(dtype))[0], options, say=None)
        return
    model = attach_lora(load(base, _options(dtype))[0], options, say=None)
    train(model)
    ends = _ends(model)
    assert ends[0] is ends[1], "embedding and head must stay one tensor"
    assert not torch.equal(ends[0], _original(model))
    _comes_back(model, base, tmp_path, dtype, "keep")
    again, _ = load(tmp_path / "adapter", _options(dtype), say=None)
    first, last = _ends(again)
    assert first is last and first.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": [HEAD]},
        {"modules_to_save": [EMBED]},
        {"modules_to_save": [EMBED, HEAD]},
        {"targets": ["q_proj", HEAD]},
        {"targets": ["q_proj", EMBED]},
        {"targets": ["q_proj", EMBED, HEAD]},
    ],
    ids=str,
)
def test_untied(base: Path, options: dict[str, Any], tmp_path: Path) -> None:
    model = attach_lora(load(base)[0], LoraOptions(**options, tied="untie"), say=None)
    train(model)
    _comes_back(model, base, tmp_path, "auto", "untie")


def test_kept_tied_with_factors_is_refused(base: Path) -> None:
    with pytest.raises(NotSupportedError, match="cannot be kept tied"):
        attach_lora(load(base)[0], LoraOptions(targets=["q_proj", HEAD], tied="keep"), say=None)


def _options(dtype: str) -> Any:
    from pronghorn.loading.options import LoadOptions

    return LoadOptions(dtype=dtype)


def _ends(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inner = model.get_base_model()
    found = []
    for module in (inner.get_input_embeddings(), inner.get_output_embeddings()):
        found.append(module.modules_to_save["default"].weight)
    return found[0], found[1]


def _original(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.get_base_model().get_input_embeddings().original_module.weight
    return weight


def _comes_back(model: Any, base: Path, folder: Path, dtype: str, tied: str) -> None:
    want = logits(model)
    model.save_pretrained(folder / "adapter")
    assert json.loads((folder / "adapter" / "pronghorn.json").read_text())["tied"] == tied
    again, _ = load(folder / "adapter", _options(dtype), say=None)
    assert torch.equal(logits(again), want)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=_options(dtype).torch_dtype())
    assert not torch.equal(logits(stock), want)
    assert torch.equal(logits(PeftModel.from_pretrained(stock, folder / "adapter")), want)
    again.save_pretrained(folder / "twice")
    assert json.loads((folder / "twice" / "pronghorn.json").read_text())["tied"] == tied
