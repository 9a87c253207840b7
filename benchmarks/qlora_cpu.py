"""Time and memory of a QLoRA training step on CPU beside PEFT + bitsandbytes, in one process.

    python -m benchmarks.qlora_cpu [--tokens 1024] [--layers 16] [--steps 5] [--write]

A Llama of 0.38 B parameters (hidden 1024, 16 layers, vocabulary 128k, tied), linears in NF4 with double
quantisation, the rest bf16, LoRA r16 on all linears, AdamW, batch 1. The peer is the same model with
pronghorn's replacements switched off. Time is process CPU seconds (wall time on a shared machine is noise),
configurations taken in turn, medians. Memory is the peak of resident memory above what the process holds
before the step; pronghorn's decode buffer is given back before each step, so it counts. ``--write`` puts
Markdown and JSON into benchmarks/results.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers

from benchmarks.step_cpu import step
from pronghorn import LoadOptions, load
from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.report import PatchReport

RESULTS = Path(__file__).parent / "results"
TIME_LIMIT, MEMORY_LIMIT = 0.9, 0.35
PEER, OURS = "PEFT + bitsandbytes", "pronghorn"


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


def measure(
    model: Any, report: PatchReport, ids: torch.Tensor, steps: int
) -> dict[str, list[tuple[float, float, float]]]:
    """(CPU seconds, MB above the weights, loss) of each step, by configuration; a first round is dropped."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for turn in range(steps + 1):
        for recompute in (False, True):
            if recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for name in (PEER, OURS):
                label = name + (" + recompute" if recompute else "")
                for switch in report.switches:
                    if switch.kind == "decode":
                        switch.buffer.rooms.clear()
                ctypes.CDLL(None).malloc_trim(0)
                if name == PEER:
                    with report.disabled():
                        one = step(model, optimizer, ids)
                else:
                    one = step(model, optimizer, ids)
                if turn:
                    found.setdefault(label, []).append(one)
                    print(label, *(f"{value:.3f}" for value in one), flush=True)
            model.gradient_checkpointing_disable()
    return found


def summary(found: dict[str, list[tuple[float, float, float]]]) -> list[dict[str, Any]]:
    """Medians, and their ratios to the peer."""
    middle = {
        label: [statistics.median(run[place] for run in runs) for place in (0, 1)]
        for label, runs in found.items()
    }
    rows = []
    for label, (seconds, memory) in middle.items():
        peer = middle[label.replace(OURS, PEER)]
        rows.append(
            {
                "configuration": label,
                "CPU seconds": round(seconds, 2),
                "MB above weights": round(memory),
                "time ratio": round(seconds / peer[0], 3),
                "memory ratio": round(memory / peer[1], 3),
            }
        )
    return rows


def write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """results/qlora_cpu.json and .md."""
    modules = (torch, transformers, peft, bitsandbytes)
    versions = {module.__name__: module.__version__ for module in modules}
    result = {
        "versions": versions, "processor": platform.processor() or platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
        "tokens": options.tokens, "layers": options.layers, "steps": options.steps, "rows": rows,
    }  # fmt: skip
    (RESULTS / "qlora_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    heads = list(rows[0])
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    table += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    text = (
        "# A QLoRA step on CPU beside PEFT + bitsandbytes\n\n"
        f"A Llama of hidden 1024 with {options.layers} layers, NF4, LoRA r16 on all linears, "
        f"{options.tokens} tokens; medians of {options.steps} steps taken in turn. Ratios are to PEFT + "
        "bitsandbytes\nin the same process; memory is the peak above the weights, the decode buffer included."
        f"\n\n{chr(10).join(table)}\n\nTo reach: time {TIME_LIMIT}, memory {MEMORY_LIMIT}. "
        f"{result['cpu']}, {result['threads']} thread(s); "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.\n\n"
        "Made by `python -m benchmarks.qlora_cpu --write`.\n"
    )
    (RESULTS / "qlora_cpu.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    model = build(options.layers)
    ids = torch.randint(0, 128_000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
    report = accelerate(model)
    print(report)
    rows = summary(measure(model, report, ids, options.steps))
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))
    if options.write:
        write(rows, options)


if __name__ == "__main__":
    main()
