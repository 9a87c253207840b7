"""Tiny adapted models for the patching tests."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny


def adapted(family: str = "llama", *, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A tiny model with LoRA on every linear and adapters that do something."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(tiny.model(family, dtype=dtype), LoraConfig(**options))
    make_generic(model)
    return model


def make_generic(model: Any) -> None:
    """Give every B values, so that no adapter gradient is zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def batch(rows: int = 2, tokens: int = 19) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 500, (rows, tokens), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def step(model: Any, **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of one training step."""
    model.train()
    model.zero_grad()
    loss = model(**(inputs or batch()), use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(
    ours: tuple[torch.Tensor, list[torch.Tensor]], plain: tuple[torch.Tensor, list[torch.Tensor]]
) -> None:
    assert torch.allclose(ours[0], plain[0], rtol=1e-5)
    assert len(ours[1]) == len(plain[1])
    for mine, theirs in zip(ours[1], plain[1], strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()) + 1e-9)
