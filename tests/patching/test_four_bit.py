"""Models in 4-bit: the same parts are replaced, as true as PEFT and bitsandbytes, with few decodes."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pronghorn import LoadOptions, load
from pronghorn.memory.counter import saved_bytes
from pronghorn.memory.layers import layers_of
from pronghorn.ops import select
from pronghorn.ops.packed import Packed
from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.places import SLOT
from pronghorn.patching.proof import distance
from pronghorn.patching.whole import loss_and_grads
from pronghorn.quant.library import as_plain, linears_4bit
from tests import four_bit
from tests.patching.build import batch, make_generic, step

NF4 = LoadOptions(quantization="nf4")
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(folder: Path, family: str = "llama", *, lora: dict[str, Any] | None = None, **shape: Any) -> Any:
    """A tiny model in NF4 with adapters that do something."""
    base, _ = load(four_bit.write_full(folder / "base", family, **shape), NF4, say=None)
    model = get_peft_model(base, LoraConfig(**(LORA | (lora or {}))))
    make_generic(model)
    model.enable_input_require_grads()
    return model.train()


class Decodes:
    """Counts the decodes of each weight, by the address of its codes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[int] = Counter()
        self.real = select.nf4_decode
        monkeypatch.setattr(select, "nf4_decode", self)

    def __call__(self, packed: Packed, out: torch.Tensor) -> torch.Tensor:
        self.count[packed.data.data_ptr()] += 1
        return self.real(packed, out)


def median_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).abs().median())


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral"])
def test_parts_are_replaced_and_gradients_as_true_as_those_of_peft(tmp_path: Path, family: str) -> None:
    model = adapted(tmp_path, family)
    twin = torch.nn.Module.float(copy.deepcopy(model))
    inputs = batch(rows=16)  # of few rows, one token that rounding sends to another expert decides
    with as_plain(twin, torch.float32):
        truth = loss_and_grads(twin, inputs)
    plain = loss_and_grads(model, inputs)
    kinds = ["norm", "attention", "qkv", "o", "loss", *([] if family == "mixtral" else ["mlp"])]
    report = accelerate(model, strict=kinds)
    for kind in kinds:
        found, replaced = report.count(kind)
        assert found == replaced > 0, str(report)
    assert f"4-bit: {len(list(linears_4bit(model)))} weights, decoded into one buffer of" in str(report)
    ours = loss_and_grads(model, inputs)
    assert set(report.fallbacks()) <= {"loss"}  # the losses of single tokens ask for the logits
    assert len(ours) == len(plain) == len(truth)
    together = [torch.cat([t.flatten().double() for t in one[1:-1]]) for one in (ours, plain, truth)]
    assert distance(together[0], together[2]) <= 1.5 * distance(together[1], together[2])
    # the losses of tokens that rounding sends to another expert are few and far off
    off = median_error if family == "mixtral" else distance
    assert off(ours[0], truth[0]) <= 1.5 * off(plain[0], truth[0])


@pytest.mark.parametrize("recompute", [None, "full", "unsloth"])
@pytest.mark.parametrize("tile", [None, 16])
def test_at_most_two_decodes_of_a_weight_in_a_step(
    tmp_path: Path, recompute: str | None, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes = Decodes(monkeypatch)
    model = adapted(tmp_path, num_hidden_layers=3)
    report = accelerate(model, recompute=recompute, mlp_tile_tokens=tile)
    assert report.model_check.startswith("equal"), str(report)
    step(model)
    decodes.count.clear()
    step(model)
    assert report.fallbacks() == {}
    weights = {module.weight.data_ptr() for _, module in linears_4bit(model)}
    assert set(decodes.count) == weights
    assert max(decodes.count.values()) == 2
    # what the first layer's backward and the last one's forward have decoded is used by what comes next
    assert sorted(decodes.count.values()) == [1] * 14 + [2] * 7


def test_the_buffer_is_one_layer(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    accelerate(model)
    step(model)
    layer = layers_of(model)[0]
    values = sum(m.in_features * m.out_features for _, m in linears_4bit(layer))
    buffers = {id(vars(m)[SLOT].buffer): vars(m)[SLOT].buffer for _, m in linears_4bit(model)}
    (buffer,) = buffers.values()
    (room,) = buffer.rooms.values()
    assert (room.memory.numel(), room.memory.dtype) == (values, torch.bfloat16)


def test_saved_bytes_are_those_of_16_bit(tmp_path: Path) -> None:
    kept = []
    for options in (NF4, LoadOptions()):
        base, _ = load(four_bit.write_full(tmp_path / str(options.quantization)), options, say=None)
        model = get_peft_model(base, LoraConfig(**LORA))
        model.enable_input_require_grads()
        accelerate(model)
        model.train()
        kept.append(saved_bytes(model, lambda m=model: m(**batch(1, 64), use_cache=False).loss))
    assert kept[0] == kept[1]


def test_gradients_after_an_evaluation_equal_those_before(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    accelerate(model)
    before = step(model)
    assert all(grad.any() for grad in before[1])
    with torch.no_grad():
        model.eval()
        model(**batch())
    after = step(model)
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def test_a_model_loaded_by_transformers_keeps_its_gradients_too(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(four_bit.write_base(tmp_path / "base"), dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(**LORA))
    make_generic(model)
    layer = next(module for _, module in linears_4bit(model))
    flag = layer.support_avx512bf16_for_cpu
    report = accelerate(model)
    before = step(model)
    with torch.no_grad():
        model.eval()
        model(**batch())
    after = step(model)
    assert all(torch.equal(a, b) and b.any() for a, b in zip(before[1], after[1], strict=True))
    assert report.fallbacks() == {}
    report.undo()
    assert layer.support_avx512bf16_for_cpu == flag


def test_4_bit_linears_without_an_adapter_are_replaced_too(tmp_path: Path, monkeypatch: Any) -> None:
    decodes = Decodes(monkeypatch)
    model = adapted(tmp_path, lora={"target_modules": ["down_proj"]})
    report = accelerate(model, strict=["qkv", "o", "mlp"])
    decodes.count.clear()
    step(model)
    assert set(decodes.count) == {module.weight.data_ptr() for _, module in linears_4bit(model)}
    assert report.fallbacks() == {}


def test_a_wrong_decode_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tmp_path)
    real = select.nf4_decode
    monkeypatch.setattr(select, "nf4_decode", lambda packed, out: real(packed, out).mul_(1.02))
    report = accelerate(model)
    for kind in ("qkv", "o", "mlp"):
        assert report.count(kind)[1] == 0
        assert all("from the truth, bound" in reason for reason in report.left(kind))
    assert report.count("norm") == (5, 5)


def test_undo_and_copies(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    plain = step(model)
    before = {id(m): m.__dict__.keys() for m in model.modules()}
    report = accelerate(model)
    twin = copy.deepcopy(model)
    ours = step(model)
    again = step(twin)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], again[1], strict=True))
    rooms = [vars(m)[SLOT].buffer for one in (model, twin) for _, m in linears_4bit(one)]
    assert len({id(room) for room in rooms}) == 2
    report.undo()
    assert all(m.__dict__.keys() == before[id(m)] for m in model.modules())
    back = step(model)
    assert all(torch.equal(a, b) for a, b in zip(back[1], plain[1], strict=True))


def test_a_weight_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    model = adapted(tmp_path)
    plain = copy.deepcopy(model)
    report = accelerate(model)
    step(model)
    for one in (model, plain):
        one.merge_adapter()
        one.unmerge_adapter()  # packs every weight anew, a little different
    assert torch.allclose(step(model)[0], step(plain)[0], rtol=1e-2)
    assert report.fallbacks() == {}


def test_fp4_is_left_with_the_reason(tmp_path: Path) -> None:
    folder = four_bit.write_full(tmp_path / "base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=settings)
    model = get_peft_model(base, LoraConfig(**LORA))
    report = accelerate(model)
    assert report.left("mlp") == {"its weight is fp4": 2}
    assert report.left("o") == {"its weight is fp4": 2}
    assert report.model_check.startswith("equal")
