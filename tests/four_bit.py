"""Tiny bases whose linear layers can be held in 4-bit, also written as 4-bit folders by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from tests import tiny

WIDTH = 128  # a multiple of NF4's block of 64, which tiny's own 96 is not


def write_full(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A 16-bit base."""
    return tiny.write_base(folder, family, **{"intermediate_size": WIDTH, **overrides})


def write_base(folder: Path, family: str = "llama", *, shard: str = "5GB", **overrides: Any) -> Path:
    """A 4-bit base, quantised and saved by transformers and bitsandbytes alone."""
    full = write_full(folder.parent / f"{folder.name}-full", family, **overrides)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def randomise(model: Any, scale: float = 0.2) -> None:
    """Give every trainable tensor noise, so that B*A is not zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


class StoppedError(Exception):
    """A run ended from outside, as if it had been killed."""


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Raise ``StoppedError`` after some optimizer steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        if state.global_step >= self.steps:
            raise StoppedError
