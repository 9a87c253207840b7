"""Merges of adapters that were trained on a base in 4-bit, onto its decoded or its original values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pronghorn import LoadOptions, LoraOptions, attach_lora, export, load, verify
from pronghorn.errors import ConfigError, ExportError, VerificationError
from pronghorn.export import files, run
from pronghorn.export.onto import MergeFormat
from pronghorn.export.verify_quant import through_nf4
from pronghorn.ops.packed import decode
from pronghorn.quant import nf4
from pronghorn.quant.library import decode_weight, linears_4bit
from pronghorn.serving.compare import drift_candidates
from pronghorn.weights.folder import open_weights
from tests import four_bit
from tests.stack import experts_are_stacked

IDS = torch.arange(5, 37).view(1, -1)


def trained(folder: Path, base: Path, **lora: Any) -> Path:
    model = attach_lora(load(base, LoadOptions(quantization="nf4"))[0], LoraOptions(r=4, **lora))
    four_bit.randomise(model, 0.05)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()}


@torch.no_grad()
def divergence(folder: Path, adapter: Path, dtype: torch.dtype = torch.bfloat16) -> float:
    """KL from the trained model (4-bit base + adapter) to a merged folder, nats a token."""
    truth, _ = load(adapter, LoadOptions(dtype=dtype), say=None)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    merged.set_attn_implementation(truth.config._attn_implementation)  # see load: soft caps
    one = truth(input_ids=IDS).logits.float().log_softmax(-1)
    other = merged(input_ids=IDS).logits.float().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral"])
def test_merged_onto_the_decoded_values(tmp_path: Path, family: str, stored: bool) -> None:
    write = four_bit.write_base if stored else four_bit.write_full
    base = write(tmp_path / "base", family)
    adapter = trained(tmp_path / "adapter", base, targets=("q_proj", "v_proj"))
    report = export(adapter, tmp_path / "merged")
    assert report.verified is True
    # as modules, experts are in 4-bit too, and in a stored folder the routers
    experts = 0 if experts_are_stacked() else 2 * 4 * 3 + (2 if stored else 0)
    count = 8 + experts if family == "mixtral" else 14
    assert report.onto == f"merged onto the decoded NF4 values of {count} tensors: the model that was trained"
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    # bfloat16 alone makes 1e-3 of Gemma 2 on transformers 4, which starts its norms at twice the size
    # and sends tokens of Mixtral to other experts
    wide = family == "gemma2" or (family == "mixtral" and not experts_are_stacked())
    dtype = torch.float32 if wide else torch.bfloat16
    assert divergence(tmp_path / "merged", adapter, dtype) < 1e-3
    # a linear layer without an adapter is written as it decodes, too
    merged, model = tensors(tmp_path / "merged"), load(base, LoadOptions(quantization="nf4"), say=None)[0]
    name = "model.layers.1.self_attn.o_proj"
    assert torch.equal(merged[f"{name}.weight"], decode_weight(model.get_submodule(name).weight))


def test_merged_onto_the_original_values(tmp_path: Path) -> None:
    base = four_bit.write_full(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base, targets=("q_proj", "v_proj"))
    report = export(adapter, tmp_path / "original", format=MergeFormat(onto="original"))
    assert report.verified is True
    assert "not the model that was trained" in str(report.onto)
    export(adapter, tmp_path / "decoded", verify=False)
    ours, before = tensors(tmp_path / "original"), tensors(base)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(ours[name], before[name])
    assert divergence(tmp_path / "original", adapter) > 20 * divergence(tmp_path / "decoded", adapter)


def test_a_stored_4_bit_base_is_merged_onto_the_model_it_was_made_from(tmp_path: Path) -> None:
    base = four_bit.write_base(tmp_path / "base")
    full = tmp_path / "base-full"
    adapter = trained(tmp_path / "adapter", base, targets=("q_proj", "v_proj"))
    report = export(adapter, tmp_path / "merged", base=full, format=MergeFormat(onto="original"))
    assert report.verified is True
    assert (report.base, report.trained_on) == (full, base)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(tensors(tmp_path / "merged")[name], tensors(full)[name])
    told, merged, *other = drift_candidates(adapter, base, tmp_path / "merged", "original")
    assert (told.options.base, merged.path, other) == (base, tmp_path / "merged", [])
    other_model = four_bit.write_full(tmp_path / "other", seed=5)
    with pytest.raises(ExportError, match=r"is not the 16-bit model that .*weight is 1\.\d+ off") as caught:
        export(adapter, tmp_path / "no", base=other_model, format=MergeFormat(onto="original"))
    assert str(other_model) in str(caught.value)


def test_a_bfloat16_base_that_was_held_in_float32_and_4_bit(tmp_path: Path) -> None:
    base = four_bit.write_full(tmp_path / "base", dtype=torch.bfloat16)
    options = LoadOptions(quantization="nf4", dtype="float32")
    model = attach_lora(load(base, options)[0], LoraOptions(r=4, targets=("q_proj", "v_proj")))
    four_bit.randomise(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "merged")
    assert report.verified is True
    assert report.changed_share == pytest.approx(1 / 6, rel=0.02)  # of q and v, a sixth of what was in NF4
    assert divergence(tmp_path / "merged", tmp_path / "adapter") < 1e-3


def test_verification_tells_the_two_apart(tmp_path: Path) -> None:
    base = four_bit.write_full(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base)
    export(adapter, tmp_path / "original", format=MergeFormat(onto="original"), verify=False)
    assert verify(tmp_path / "original", deep=True, against=adapter, base=base, onto="original").passed
    failure = verify(tmp_path / "original", deep=True, against=adapter, base=base).first_failure
    assert failure is not None
    assert failure.name == "weights equal base + adapter, rounded once"


def test_several_files_and_an_index(tmp_path: Path) -> None:
    base = four_bit.write_base(tmp_path / "base", shard="60KB")
    adapter = trained(tmp_path / "adapter", base)
    assert export(adapter, tmp_path / "merged").verified
    listed = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    assert listed.keys() == tensors(tmp_path / "merged").keys()
    assert len(set(listed.values())) > 1


@pytest.mark.parametrize("method", ["merged_4bit", "merged_4bit_forced"])
@pytest.mark.parametrize("kind", ["stored", "encoded", "full"])
def test_merged_again_in_4_bit(tmp_path: Path, kind: str, method: str) -> None:
    base = (four_bit.write_base if kind == "stored" else four_bit.write_full)(tmp_path / "base")
    adapter = tmp_path / "adapter"
    if kind == "full":
        model = attach_lora(load(base)[0], LoraOptions(r=4))
        four_bit.randomise(model, 0.05)
        model.save_pretrained(adapter)
    else:
        trained(adapter, base)
    report = export(adapter, tmp_path / "any-name", format=method)
    assert report.verified is True
    assert any("vllm-bnb-plugin, export w4a16" in line for line in report.warnings)
    export(adapter, tmp_path / "merged", verify=False)
    merged = tensors(tmp_path / "merged")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "any-name", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    layers = dict(linears_4bit(theirs))
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(decode_weight(layer.weight), decode(nf4.encode(merged[f"{name}.weight"])))
    assert torch.equal(theirs.lm_head.weight, merged["lm_head.weight"])
    again, _ = load(tmp_path / "any-name", LoadOptions(quantization="nf4"))
    assert torch.equal(again(input_ids=IDS).logits, theirs.eval()(input_ids=IDS).logits)
    assert not list(tmp_path.glob(".any-name*"))


def test_requests_that_cannot_be_met(tmp_path: Path) -> None:
    base = four_bit.write_base(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base)
    with pytest.raises(ExportError, match="holds its weights in NF4 only") as caught:
        export(adapter, tmp_path / "merged", format=MergeFormat(onto="original"))
    assert "name the 16-bit model with base=PATH (--base)" in str(caught.value)
    with pytest.raises(ConfigError, match="onto is 'both'"):
        MergeFormat(onto="both")  # type: ignore[arg-type]
    assert not (tmp_path / "merged").exists()


def test_a_4_bit_export_that_fails_names_the_folder_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = four_bit.write_full(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base)
    real = run.write_shards

    def damaged(shards: Any, adapter: Any, staging: Path, *told: Any) -> Any:
        counts = real(shards, adapter, staging, *told)
        with next(staging.glob("*.safetensors")).open("r+b") as file:
            file.seek(-2, 2)
            file.write(b"xx")
        return counts

    monkeypatch.setattr(run, "write_shards", damaged)
    with pytest.raises(VerificationError, match=rf"^{tmp_path / 'wanted'} was not written"):
        export(adapter, tmp_path / "wanted", format="merged_4bit")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with pytest.raises(ExportError, match=rf"^{tmp_path / 'wanted'} needs"):
        export(adapter, tmp_path / "wanted", format="merged_4bit")
    assert not list(tmp_path.glob("*wanted*"))


def test_a_tensor_quantised_at_training_is_missing(tmp_path: Path) -> None:
    base = four_bit.write_full(tmp_path / "base")
    adapter = trained(tmp_path / "adapter", base)
    record = json.loads((adapter / "pronghorn.json").read_text())
    record["quantised"].append("model.layers.9.mlp.up_proj.weight")
    (adapter / "pronghorn.json").write_text(json.dumps(record))
    with pytest.raises(ExportError, match=r"layers\.9\.mlp\.up_proj\.weight was in NF4 at training"):
        export(adapter, tmp_path / "merged")


def test_a_base_that_is_not_finite_is_named(tmp_path: Path) -> None:
    base, name = four_bit.write_full(tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    adapter = trained(tmp_path / "adapter", base)
    shard, entry = open_weights(base).tensors[name]
    with shard.path.open("r+b") as file:
        file.seek(entry.start)  # the fingerprint reads pages in the middle of tensors
        file.write(torch.tensor([torch.nan], dtype=torch.bfloat16).view(torch.uint8).numpy().data)
    with pytest.raises(ExportError, match=rf"^{name} of {base} holds NaN or infinity"):
        export(adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_verifiers_own_arithmetic_agrees(dtype: torch.dtype) -> None:
    weight = torch.randn(200, 320, generator=torch.Generator().manual_seed(1)).to(dtype) / 30
    assert torch.equal(through_nf4(weight).to(dtype), decode(nf4.encode(weight)))
