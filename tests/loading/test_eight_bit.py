"""Bases in 8-bit: bitsandbytes' own layers, told as such, trained on, merged onto the original values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn import FastLanguageModel, LoadOptions, LoraOptions, attach_lora, export, load, train
from pronghorn.adapters.origin import origin_of
from pronghorn.errors import ConfigError, ExportError
from pronghorn.export.onto import MergeFormat
from pronghorn.loading.report import LoadReport
from pronghorn.patching.accelerate import accelerate
from pronghorn.quant.library import linears_8bit
from tests import four_bit, tiny

IDS = torch.arange(5, 37).view(1, -1)
INT8 = LoadOptions(quantization="int8")


def step(model: Any) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [one.grad.clone() for one in model.parameters() if one.requires_grad]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits.float()
    return found


def test_the_base_is_in_8_bit_and_said_to_be(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")  # a width of 96: 8-bit has no blocks
    said: list[str] = []
    model, _ = load(base, INT8, say=said.append)
    assert len(list(linears_8bit(model))) == 14
    (line,) = said
    assert "14 modules in 8-bit (bitsandbytes' own code runs them), left in 16-bit: the output head" in line
    origin = origin_of(model)
    assert origin is not None and isinstance(origin.report, LoadReport)
    values = sum(module.in_features * module.out_features for _, module in linears_8bit(model))
    rows = sum(module.out_features for _, module in linears_8bit(model))
    assert origin.report.dtype_bytes["int8"] == values
    assert origin.report.dtype_bytes["float32"] >= 4 * rows
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert origin.report.full_bytes == sum(2 * one.numel() for one in full.parameters())
    off = float((logits(model) - logits(full)).norm() / logits(full).norm())
    assert 1e-4 < off < 0.05


def test_its_layers_are_left_to_bitsandbytes_and_the_rest_is_replaced(tmp_path: Path) -> None:
    model, _ = load(tiny.write_base(tmp_path / "base"), INT8, say=None)
    model = attach_lora(model, LoraOptions(r=4))
    four_bit.randomise(model, 0.02)
    plain = step(model)
    report = accelerate(model)
    assert report.left("qkv") == report.left("mlp") == {"the base layer is a Linear8bitLt": 2}
    assert report.count("norm") == (5, 5) and report.count("loss") == (1, 1)
    ours = step(model)
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.any()
        assert float((mine - theirs).norm()) < 0.1 * float(theirs.norm())
    logits(model)
    assert all(torch.equal(a, b) for a, b in zip(ours, step(model), strict=True))


def test_a_run_is_kept_and_merged_onto_the_original_values(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"number {i}", "completion": f"is {i * i}"} for i in range(8)]
    rows.write_text("\n".join(json.dumps(line) for line in lines))
    result = train(
        {
            "model": {"name": str(base), "quantization": "int8", "max_seq_length": 64},
            "data": {"train": str(rows)},
            "training": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2},
            "output": {"folder": str(tmp_path / "run")},
        }
    )
    record = json.loads((result.adapter / "pronghorn.json").read_text())
    assert (record["quantization"], record["quantised_dtype"]) == ("int8", "bfloat16")
    again, _ = load(result.adapter, say=None)
    assert len(list(linears_8bit(again))) == 14
    with pytest.raises(ExportError, match="trained on a base in 8-bit"):
        export(result.adapter, tmp_path / "merged")
    report = export(result.adapter, tmp_path / "merged", format=MergeFormat(onto="original"))
    assert report.verified is True
    assert "of 14 tensors that were in 8-bit at training: not the model" in str(report)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert float((logits(again) - logits(merged)).norm() / logits(merged).norm()) < 0.05


def test_8_bit_of_a_4_bit_folder_is_refused(tmp_path: Path) -> None:
    base = four_bit.write_base(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"8-bit weights were asked for, but .* holds 14 weights in NF4"):
        FastLanguageModel.from_pretrained(base, load_in_8bit=True)
