"""Time and memory of a QLoRA training step on CPU beside PEFT + bitsandbytes, in one process.

    python -m benchmarks.qlora_cpu [--tokens 1024] [--layers 16] [--steps 5] [--write]

A Llama of 0.38 B parameters (hidden 1024, 16 layers, vocabulary 128k, tied), linears in NF4 with double
quantisation, the rest bf16, LoRA r16 on all linears, AdamW, batch 1. The peer is the same model with
pronghorn's replacements switched off; pronghorn's decode buffer counts as memory of its step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers

from benchmarks.steps import Benchmark, llama, options_of, with_adapters
from pronghorn import LoadOptions, load

STEP = Benchmark(
    name="qlora_cpu",
    title="A QLoRA step on CPU beside PEFT + bitsandbytes",
    model="A Llama of hidden 1024 and a tied vocabulary of 128k, linears in NF4",
    peer="PEFT + bitsandbytes",
    goals="time 0.9, memory 0.35",
    modules=(torch, transformers, peft, bitsandbytes),
)


def build(layers: int) -> Any:
    """Random 16-bit weights on disk, loaded in NF4, with fresh adapters."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        base = transformers.AutoModelForCausalLM.from_config(llama(layers), dtype=torch.bfloat16)
        base.save_pretrained(folder)
        tokenizer = Path(__file__).parents[1] / "demo" / "base"
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        loaded, _ = load(folder, LoadOptions(quantization="nf4"))
    return with_adapters(loaded)


if __name__ == "__main__":
    chosen = options_of(__doc__)
    STEP.run(build(chosen.layers), chosen)
