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

from benchmarks.steps import Benchmark, options_of
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
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer = Path(__file__).parents[1] / "demo" / "base"
        transformers.AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        base, _ = load(folder, LoadOptions(quantization="nf4"))
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    model.enable_input_require_grads()
    return model.train()


if __name__ == "__main__":
    chosen = options_of(__doc__)
    STEP.run(build(chosen.layers), chosen)
