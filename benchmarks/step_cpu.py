"""Time and memory of a training step on CPU beside plain transformers + PEFT, in one process.

    python benchmarks/step_cpu.py [--tokens 1024] [--layers 16] [--steps 3] [--write
    benchmarks/results/step_cpu.json]

A Llama of 0.38 B parameters (hidden 1024, 16 layers, vocabulary 128k, tied), bf16, LoRA r16 on all linears,
AdamW, batch 1. Time is process CPU seconds (wall time on a shared machine is noise), the least of the steps,
configurations taken in turn. Memory is the peak of resident memory above what the process holds before the
step.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from pronghorn.patching.accelerate import accelerate


def build(layers: int) -> Any:
    """The base, once for all configurations."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    model.enable_input_require_grads()
    return model.train()


def resident() -> int:
    """Bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """The highest resident memory seen inside the block, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.peak = resident()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> tuple[float, float, float]:
    """(CPU seconds, MB above the weights, loss) of one optimizer step."""
    with Peak() as peak:
        start = time.process_time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.process_time() - start
    return seconds, (peak.peak - peak.before) / 2**20, float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    model = build(options.layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, 128_000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    report = accelerate(model)
    print(report)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(options.steps):
        for recompute in (False, True):
            if recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for name in ("peft", "pronghorn"):
                label = name + (" + recompute" if recompute else "")
                if name == "peft":
                    with report.disabled():
                        found.setdefault(label, []).append(step(model, optimizer, ids))
                else:
                    found.setdefault(label, []).append(step(model, optimizer, ids))
                print(label, *(f"{v:.3f}" for v in found[label][-1]), flush=True)
            model.gradient_checkpointing_disable()
    rows = []
    for label, runs in found.items():
        peer = found[label.replace("pronghorn", "peft")]
        seconds, memory = min(r[0] for r in runs), min(r[1] for r in runs)
        rows.append(
            {
                "configuration": label,
                "CPU seconds": round(seconds, 2),
                "MB above weights": round(memory),
                "time vs peft": round(seconds / min(r[0] for r in peer), 3),
                "memory vs peft": round(memory / min(r[1] for r in peer), 3),
            }
        )
        print(" | ".join(str(v) for v in rows[-1].values()))
    if options.write:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        result = {
            "versions": versions,
            "threads": torch.get_num_threads(),
            "tokens": options.tokens,
            "rows": rows,
        }
        options.write.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
