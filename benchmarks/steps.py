"""Training steps of one model with pronghorn's replacements on and off, in turn: seconds and memory.

Time is process CPU seconds (wall time on a shared machine is noise). Memory is the peak of resident memory
above what the process holds before the step: weights and the optimizer's state are in neither figure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from transformers import LlamaConfig

from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.report import PatchReport

RESULTS = Path(__file__).parent / "results"
OURS = "pronghorn"
M_MMAP_THRESHOLD = -3  # its number in malloc.h
Figures = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Benchmark:
    """What is compared. ``goals``: what is to be reached."""

    name: str
    title: str
    model: str
    peer: str
    goals: str
    modules: tuple[ModuleType, ...]

    def run(self, model: Any, options: argparse.Namespace) -> None:
        """Measure, print, and write results/NAME.md and NAME.json where asked to."""
        return_freed_memory()
        ids = torch.randint(0, 128_000, (1, options.tokens), generator=torch.Generator().manual_seed(1))
        report = accelerate(model)
        print(report)
        rows = summary(measure(model, report, ids, options.steps, self.peer), self.peer)
        for row in rows:
            print(" | ".join(str(value) for value in row.values()))
        if options.write:
            self.write(rows, options)

    def write(self, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
        """results/NAME.json and NAME.md."""
        versions = {module.__name__: module.__version__ for module in self.modules}
        cpu, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        load = round(os.getloadavg()[2], 1)
        result = {"versions": versions, "cpu": cpu, "threads": threads, "load_average": load} | vars(options)
        del result["write"]
        (RESULTS / f"{self.name}.json").write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")
        heads = list(rows[0])
        table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        table += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
        text = f"""# {self.title}

{self.model}, LoRA r16 on all linears, AdamW, {options.layers} layers, batch 1, {options.tokens} tokens.
Medians of {options.steps} steps taken in turn. Ratios are to {self.peer} in the same process; memory is the
peak of resident memory above what the process holds before the step.

{chr(10).join(table)}

To reach: {self.goals}.

{cpu}, {threads} thread(s), load average {load};
{", ".join(f"{name} {version}" for name, version in versions.items())}.

Made by `python -m benchmarks.{self.name} --write`.
"""
        (RESULTS / f"{self.name}.md").write_text(text)


def llama(layers: int) -> LlamaConfig:
    """0.38 B parameters with 16 layers."""
    return LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )


def with_adapters(base: Any) -> Any:
    """LoRA r16 on every linear, ready to train as every trainer with adapters makes it."""
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    model.enable_input_require_grads()
    return model.train()


def options_of(description: str | None) -> argparse.Namespace:
    """The options of both benchmarks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="put Markdown and JSON into benchmarks/results")
    return parser.parse_args()


def measure(model: Any, report: PatchReport, ids: torch.Tensor, steps: int, peer: str) -> Figures:
    """(CPU seconds, MB above the weights) of each step, by configuration; a first round is dropped."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    found: Figures = {}
    for turn in range(steps + 1):
        for recompute in (False, True):
            if recompute:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for name in (peer, OURS):
                label = name + (" + recompute" if recompute else "")
                drop_decoded(report)
                with report.disabled() if name == peer else nullcontext():
                    *figures, loss = step(model, optimizer, ids)
                print(label, *(f"{value:.3f}" for value in (*figures, loss)), flush=True)
                if turn:
                    found.setdefault(label, []).append((figures[0], figures[1]))
            model.gradient_checkpointing_disable()
    return found


def drop_decoded(report: PatchReport) -> None:
    """Give back the buffers of decoded 4-bit weights, so that the next step's peak counts them."""
    for switch in report.switches:
        if switch.kind == "decode":
            switch.buffer.rooms.clear()


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


def return_freed_memory() -> None:
    """Blocks of 1 MiB and more go back to the system when freed, for both peers alike.

    Left to itself glibc raises that limit up to 32 MiB as a program runs, keeps what lies below, and resident
    memory counts it: 600 MB where the tensors of a step with recompute are 260 MB.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


class Peak:
    """The highest resident memory seen inside the block, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        gc.collect()
        # what the last step freed must not count as held before this one
        ctypes.CDLL(None).malloc_trim(0)
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


def resident() -> int:
    """Bytes of resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def summary(found: Figures, peer: str) -> list[dict[str, Any]]:
    """Medians, and their ratios to the peer."""
    middle = {
        label: [statistics.median(run[place] for run in runs) for place in (0, 1)]
        for label, runs in found.items()
    }
    rows = []
    for label, (seconds, memory) in middle.items():
        against = middle[label.replace(OURS, peer)]
        rows.append(
            {
                "configuration": label,
                "CPU seconds": round(seconds, 2),
                "MB above weights": round(memory),
                "time ratio": round(seconds / against[0], 3),
                "memory ratio": round(memory / against[1], 3),
            }
        )
    return rows
