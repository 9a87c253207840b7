"""Bases in NF4: quantised on the way in or stored so, loaded, trained on, saved and loaded again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn import FastLanguageModel, LoadOptions, LoraOptions, attach_lora, load, train
from pronghorn.adapters.origin import origin_of
from pronghorn.errors import ConfigError, NotSupportedError, SourceError
from pronghorn.loading.report import LoadReport, dtype_bytes
from pronghorn.ops.packed import decode
from pronghorn.quant import nf4
from pronghorn.quant.library import decode_weight, linears_4bit
from tests import four_bit, tiny
from tests.stack import experts_are_stacked

FAMILIES = ["llama", "gemma2", "qwen3", "mixtral"]
IDS = torch.arange(5, 37).view(1, -1)
NF4 = LoadOptions(quantization="nf4")


def report_of(model: Any) -> LoadReport:
    origin = origin_of(model)
    assert origin is not None
    assert isinstance(origin.report, LoadReport)
    return origin.report


def gradients(model: Any) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [one.grad.clone() for one in model.parameters() if one.requires_grad]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_16_bit_files_become_what_they_decode_to(tmp_path: Path, family: str) -> None:
    base = four_bit.write_full(tmp_path / "base", family)
    model, _ = load(base, NF4)
    twin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    twin.set_attn_implementation(model.config._attn_implementation)  # see load: soft caps
    names = [name for name, _ in linears_4bit(model)]
    experts = 0 if experts_are_stacked() else 2 * 4 * 3
    assert len(names) == (8 + experts if family == "mixtral" else 14)
    with torch.no_grad():
        for name in names:
            weight = twin.get_submodule(name).weight
            weight.copy_(decode(nf4.encode(weight)))
    for name in names:
        assert torch.equal(decode_weight(model.get_submodule(name).weight), twin.get_submodule(name).weight)
    assert torch.equal(logits(model), logits(twin))


@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_files_load_as_they_are(tmp_path: Path, family: str) -> None:
    base = four_bit.write_base(tmp_path / "any-name", family)
    model, _ = load(base)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert [name for name, _ in linears_4bit(model)] == [name for name, _ in linears_4bit(theirs)]
    for name, module in linears_4bit(theirs):
        assert torch.equal(decode_weight(model.get_submodule(name).weight), decode_weight(module.weight))
    asked, _ = load(base, NF4)
    assert torch.equal(logits(model), logits(asked))


def test_what_is_not_in_4_bit_has_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    """transformers 5.17 leaves routers and experts in that of the files."""
    base = four_bit.write_base(tmp_path / "base", "mixtral")
    model, _ = load(base, LoadOptions(dtype="float32"))
    assert {one.dtype for one in model.parameters()} == {torch.uint8, torch.float32}
    assert bool(torch.isfinite(logits(model)).all())


def test_the_report_counts_storages(tmp_path: Path) -> None:
    said: list[str] = []
    model, _ = load(four_bit.write_full(tmp_path / "base", "mixtral"), NF4, say=said.append)
    report = report_of(model)
    stacked = experts_are_stacked()
    kept = {"stacked experts, not linear modules": 4} if stacked else {"a router": 2}
    assert report.left == {"the output head": 1, **kept}
    experts = 0 if stacked else 4 * 3
    assert len(report.quantised) == 2 * (4 + experts)
    # q and o 64 x 64, k and v 32 x 64, experts 128 x 64, two layers: packed, 8-bit magnitudes
    packed = 2 * (2 * 64 * 64 + 2 * 32 * 64 + experts * 128 * 64) // 2
    assert report.dtype_bytes["uint8"] == packed + packed * 2 // 64
    assert report.total_bytes == sum(dtype_bytes(model).values())
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert report.full_bytes == sum(2 * one.numel() for one in full.parameters())
    assert report.total_bytes < report.full_bytes
    assert report.resident_bytes is None or report.resident_bytes > 10**8
    (line,) = said
    held = ", ".join(
        f"{reason} x{count}" for reason, count in sorted(report.left.items(), key=lambda x: -x[1])
    )
    assert f"{len(report.quantised)} modules in NF4, left in 16-bit: {held}" in line


def test_the_report_of_a_16_bit_load(tmp_path: Path) -> None:
    model, _ = load(tiny.write_base(tmp_path / "base", "qwen2"), say=None)
    report = report_of(model)
    assert report.quantised == ()
    assert "nothing quantised" in str(report)
    assert report.dtype_bytes["bfloat16"] == report.full_bytes  # a tied head counts once


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = tiny.model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.inf
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(
        SourceError, match=r"layers\.1\.mlp\.up_proj\.weight in .* holds NaN or infinity"
    ) as caught:
        load(tmp_path / "base", NF4)
    assert "download the base again" in str(caught.value)


def test_a_width_off_the_block_stays_16_bit(tmp_path: Path) -> None:
    model, _ = load(tiny.write_base(tmp_path / "base"), NF4)  # down_proj reads 96
    assert report_of(model).left == {"the output head": 1, "a width that is no multiple of 64": 2}
    stored = four_bit.write_base(tmp_path / "stored", intermediate_size=96)
    with pytest.raises(
        NotSupportedError, match=r"down_proj has a width of 96, no multiple of its block size 64"
    ):
        load(stored)


def test_requests_that_contradict_the_content(tmp_path: Path) -> None:
    base = four_bit.write_base(tmp_path / "base")
    with pytest.raises(ConfigError, match="holds 14 weights in NF4"):
        FastLanguageModel.from_pretrained(base, load_in_16bit=True)
    with pytest.raises(ConfigError, match="quantization is 'int3'"):
        LoadOptions(quantization="int3")


def test_nothing_to_quantise_is_an_error(tmp_path: Path) -> None:
    odd = tiny.write_base(
        tmp_path / "base", hidden_size=48, intermediate_size=96, num_attention_heads=4, head_dim=12
    )
    with pytest.raises(SourceError, match=r"none of its modules can be quantised \(a width"):
        load(odd, NF4)


def test_a_broken_4_bit_folder_is_named_before_loading(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = four_bit.write_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight.absmax"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"layers\.1\.mlp\.down_proj\.weight\.absmax is missing"):
        load(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_after_an_evaluation_equal_those_before(tmp_path: Path, family: str) -> None:
    model, _ = load(four_bit.write_full(tmp_path / "base", family), NF4)
    model = attach_lora(model, LoraOptions(r=4))
    four_bit.randomise(model)
    before = gradients(model)
    assert all(one.abs().sum() > 0 for one in before)
    logits(model)
    assert all(torch.equal(one, other) for one, other in zip(before, gradients(model), strict=True))
    assert not any(module.support_avx512bf16_for_cpu for _, module in linears_4bit(model))


def test_dtypes_are_those_asked_for(tmp_path: Path) -> None:
    base = four_bit.write_full(tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(str(base), load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4)
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_base_model().model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [False, True])
def test_saved_and_loaded_again_bit_for_bit(tmp_path: Path, stored: bool) -> None:
    base = four_bit.write_base(tmp_path / "base") if stored else four_bit.write_full(tmp_path / "base")
    model = attach_lora(load(base, NF4)[0], LoraOptions(r=4))
    four_bit.randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "pronghorn.json").read_text())
    assert (record["quantization"], record["quantised_dtype"], len(record["quantised"])) == (
        "nf4",
        "bfloat16",
        14,
    )
    again, _ = load(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    first, second = gradients(model), gradients(again)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    if not stored:
        said: list[str] = []
        load(tmp_path / "adapter", LoadOptions(quantization="none"), say=said.append)
        assert any("differs from training: quantization: nf4 at training, None now" in line for line in said)


@pytest.mark.parametrize("stored", [False, True])
def test_a_run_in_4_bit_resumes_bit_for_bit(tmp_path: Path, stored: bool) -> None:
    base = four_bit.write_base(tmp_path / "base") if stored else four_bit.write_full(tmp_path / "base")
    rows = [{"prompt": f"number {i}", "completion": f"is {i * i}"} for i in range(24)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))

    def config(name: str, **training: Any) -> dict[str, Any]:
        return {
            "model": {"name": str(base), "max_seq_length": 64, "quantization": "nf4"},
            "data": {"train": str(data), "eval_fraction": 0.25},
            "lora": {"r": 4},
            "training": {"max_steps": 4, "batch_size": 2, "gradient_accumulation": 1, **training},
            "eval": {"every_steps": 2},
            "checkpoints": {"every_steps": 2},
            "logging": {"progress": "none"},
            "output": {"folder": str(tmp_path / name)},
        }

    whole = train(config("whole"))
    stop = four_bit.StopAfter(3)
    with pytest.raises(four_bit.StoppedError):
        train(config("parts"), callbacks=[stop])
    parts = train(config("parts"))
    assert parts.resumed_from == 2
    assert parts.losses == whole.losses
    one, other = (path / "adapter_model.safetensors" for path in (whole.adapter, parts.adapter))
    assert one.read_bytes() == other.read_bytes()
    before, after = (path / "pronghorn.json" for path in (whole.adapter, parts.adapter))
    assert json.loads(before.read_text())["quantised"] == json.loads(after.read_text())["quantised"]
