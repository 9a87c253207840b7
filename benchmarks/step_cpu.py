"""Time and memory of a training step on CPU beside plain transformers + PEFT, in one process.

    python -m benchmarks.step_cpu [--tokens 1024] [--layers 16] [--steps 5] [--write]

A Llama of 0.38 B parameters (hidden 1024, 16 layers, vocabulary 128k, tied), bf16, LoRA r16 on all linears,
AdamW, batch 1; the peer is the same model with pronghorn's replacements switched off.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from transformers import LlamaForCausalLM

from benchmarks.steps import Benchmark, llama, options_of, with_adapters

STEP = Benchmark(
    name="step_cpu",
    title="A LoRA step on CPU beside transformers + PEFT",
    model="A Llama of hidden 1024 and a tied vocabulary of 128k, bf16",
    peer="PEFT",
    goals="time 0.83, memory 0.32, and 0.20 with recompute",
    modules=(torch, transformers, peft),
)


def build(layers: int) -> Any:
    """The base, once for all configurations."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = LlamaForCausalLM(llama(layers))
    finally:
        torch.set_default_dtype(torch.float32)
    return with_adapters(base)


if __name__ == "__main__":
    chosen = options_of(__doc__)
    STEP.run(build(chosen.layers), chosen)
