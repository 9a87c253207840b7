"""A base with an image tower: its language model trains, the tower stays, and the result is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from pronghorn.adapters.attach import attach_lora
from pronghorn.errors import NotSupportedError
from pronghorn.export.text_only import TEXT_CLASSES
from pronghorn.fast.model import FastLanguageModel
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.sources.resolve import read_json
from pronghorn.training.run import train
from tests import multimodal
from tests.training.conftest import MakeConfig

FAMILIES = tuple(multimodal.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_alone_gets_an_adapter(family: str, tmp_path: Path) -> None:
    multimodal.require(family, "hub")
    base = multimodal.write_base(tmp_path / "base", family, dtype=torch.float32)
    model, _ = load(base, LoadOptions(max_seq_length=64), say=None)
    wrapped = attach_lora(model, say=None)
    names = wrapped.base_model.targeted_module_names
    assert len(names) == 14 and all("language_model.layers." in name for name in names)


@pytest.mark.parametrize(
    "family", ["gemma3", *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[1:])]
)
def test_a_run_from_rows_to_a_verified_folder(family: str, make_config: MakeConfig, tmp_path: Path) -> None:
    multimodal.require(family, "hub")
    base = multimodal.write_base(tmp_path / "base", family, dtype=torch.float32)
    result = train(make_config(model={"name": str(base)}, training={"max_steps": 2}))
    model, tokenizer = FastLanguageModel.from_pretrained(result.adapter)
    text_only = base_has_text_class(base)
    report = model.save_pretrained_merged(tmp_path / "merged", tokenizer, text_only=text_only)
    assert report.verified and report.tensors_merged == 14
    kind = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    merged = kind.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = torch.arange(5, 37)[None]
    with torch.no_grad():
        wanted, found = (one.eval()(input_ids=ids).logits for one in (model, merged))
    assert (wanted - found).abs().max() < 1e-4


def base_has_text_class(base: Path) -> bool:
    return read_json(base / "config.json")["text_config"]["model_type"] in TEXT_CLASSES


def test_a_multimodal_base_is_not_quantised(tmp_path: Path) -> None:
    base = multimodal.write_base(tmp_path / "base")
    with pytest.raises(NotSupportedError, match=r"multimodal model \(gemma3\), which is held in 16-bit only"):
        load(base, LoadOptions(quantization="nf4"), say=None)
