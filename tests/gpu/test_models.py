"""Whole models on a device: what is replaced, against float32 truth, and that a step never waits."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import contenders, nf4
from benchmarks.gpu.shapes import SHAPES, Batch
from benchmarks.gpu.step import train_step
from pronghorn.ops import select
from pronghorn.ops.packed import Packed
from pronghorn.ops.triton import pieces
from pronghorn.patching.accelerate import accelerate
from pronghorn.quant import nf4 as quant_nf4
from pronghorn.quant.library import as_plain
from tests import tiny

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3")
ROWS = Batch(4, 48)


def adapted(family: str, dtype: torch.dtype, make: Callable[[Any], Any] | None = None) -> Any:
    """A tiny model with adapters whose B is not zero; ``make`` turns its linears into others."""
    base = tiny.model(family, dtype=dtype).to("cuda")
    model = contenders.attach(base if make is None else nf4.convert(base, make))
    contenders.fill(model)
    return model.train()


def batch() -> dict[str, Any]:
    return contenders.batch(SHAPES["tiny"], ROWS, "cuda", metadata=False)


def loss_and_grads(model: Any) -> list[Tensor]:
    """The loss and the gradient of every adapter, in the order of their names."""
    model.zero_grad()
    loss = model(**batch(), use_cache=False).loss
    loss.backward()
    trained = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return [loss.detach(), *(p.grad.clone() for _, p in trained)]


def distance(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Relative, over all gradients together."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, truth, strict=True))
    return (error / sum(float(b.double().square().sum()) for b in truth)) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_training_is_as_true_as_the_original(family: str, recompute: bool) -> None:
    truth = loss_and_grads(adapted(family, torch.float32))
    model = adapted(family, torch.bfloat16)
    plain = loss_and_grads(model)
    report = accelerate(model)
    for kind in ("norm", "mlp", "loss", "o"):
        found, replaced = report.count(kind)
        assert found == replaced > 0, str(report)
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = loss_and_grads(model)
    assert distance(ours[1:], truth[1:]) <= 1.5 * distance(plain[1:], truth[1:]) + 1e-5
    assert abs(float(ours[0] - truth[0])) <= 1.5 * abs(float(plain[0] - truth[0])) + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_4_bit_training_is_as_true_as_the_original(
    family: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes: Counter[int] = Counter()
    real = select.nf4_decode

    def counted(packed: Packed, out: Tensor) -> Tensor:
        decodes[packed.data.data_ptr()] += 1
        return real(packed, out)

    monkeypatch.setattr(select, "nf4_decode", counted)
    narrow = adapted(family, torch.bfloat16, nf4.PackedLinear)
    plain = loss_and_grads(narrow)
    wide = nn.Module.float(copy.deepcopy(narrow))
    with as_plain(wide, torch.float32):
        truth = loss_and_grads(wide)
    report = accelerate(narrow)
    for kind in ("mlp", "o", "qkv"):
        found, replaced = report.count(kind)
        assert found == replaced > 0, str(report)
    if recompute:
        narrow.enable_input_require_grads()
        narrow.gradient_checkpointing_enable({"use_reentrant": False})
    ours = loss_and_grads(narrow)
    assert distance(ours[1:], truth[1:]) <= 1.5 * distance(plain[1:], truth[1:]) + 1e-5
    # a mean over 188 tokens of bfloat16 logits
    assert abs(float(ours[0] - truth[0])) <= 1e-3 * float(truth[0])
    decodes.clear()
    loss_and_grads(narrow)
    assert decodes and max(decodes.values()) <= 2


def test_the_decode_kernel_gives_the_bits_of_torch() -> None:
    weight = quant_nf4.encode(torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16))
    out, twin = (torch.full((4096, 1024), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    select.nf4_decode(weight, out, using="triton")
    select.nf4_decode(weight, twin, using="torch")
    # a magnitude may be rounded once less: then a value is the next bfloat16
    assert torch.allclose(out.float(), twin.float(), rtol=2**-7, atol=0.0)
    assert float((out != twin).float().mean()) < 1e-3


def test_the_model_trains_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the launches themselves: a norm, an MLP or a loss that went another way would be missing."""
    model = adapted("llama", torch.bfloat16)
    accelerate(model)
    counts: dict[str, int] = {}

    def counted(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("norm_forward", "norm_backward"):
        counted(pieces.norm, name)
    for name in ("gated_forward", "gated_backward"):
        counted(pieces.gated, name)
    counted(pieces.cross_entropy, "cross_entropy_")
    loss_and_grads(model)
    assert counts["norm_backward"] >= 4 and counts["gated_backward"] == 2 and counts["cross_entropy_"] == 1
    assert counts["norm_forward"] >= 5 and counts["gated_forward"] >= 2


@pytest.mark.parametrize("make", [None, nf4.PackedLinear], ids=["16-bit", "nf4"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_never_waits_for_the_device(recompute: bool, make: Callable[[Any], Any] | None) -> None:
    model = adapted("llama", torch.bfloat16, make)
    accelerate(model)
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    made = batch()
    for _ in range(2):  # kernels are compiled and handles made
        train_step(model, optimizer, made)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(model, optimizer, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchron" in str(w.message)]
    # transformers asks once per forward whether the position ids are those of packed documents
    theirs = [wait for wait in waits if "masking_utils" in wait]
    assert len(theirs) <= 1
    assert [wait for wait in waits if wait not in theirs] == []


def test_the_check_for_waits_sees_one() -> None:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.ones(3, device="cuda").nonzero()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert any("synchron" in str(w.message) for w in caught)
