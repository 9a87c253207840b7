"""Measures one cell in this process: step times, peak memory, and the first losses and gradient norms.

python -m benchmarks.gpu.step '{"contender": "peft", ...}' result.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import contenders, predict
from benchmarks.gpu.cells import CONTENDERS, OURS, Cell
from benchmarks.gpu.shapes import BATCHES, SHAPES

LEARNING_RATE = 1e-4
CHECKED_STEPS = 3


class Clock:
    """Marks the ends of steps; on a device by events, so that the marks themselves wait for nothing."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Now, in the order of the device's work."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between the marks."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(loss, gradient norm) of one step, both left on the device."""
    loss = model(**batch).loss
    loss.backward()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm.detach()


def measure(cell: Cell) -> dict[str, Any]:
    """The row of a cell: figures, not yet judged."""
    began = time.perf_counter()
    dtype = getattr(torch, cell.dtype)
    model = contenders.build(cell.contender, cell.shape, cell.batch, cell.device, dtype)
    ready = time.perf_counter() - began
    run = _by_trl if cell.contender == "trl" else _by_hand
    seconds, losses, norms, first = run(cell, model)
    cut = BATCHES[cell.batch]
    middle = statistics.median(seconds)
    row = {
        "tokens_per_s": cut.tokens / middle,
        "step_s": middle,
        "step_s_min": min(seconds),
        "step_s_max": max(seconds),
        "useful_tflops": SHAPES[cell.shape].flops_per_token(cut.length) * cut.tokens / middle / 1e12,
        "first_step_s": first,
        "ready_s": ready,
        "losses": losses,
        "grad_norms": norms,
        "versions": versions(),
    }
    if cell.device.startswith("cuda"):
        row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["gpu"] = torch.cuda.get_device_name()
    return row | predict.row_of(cell)


Measured = tuple[list[float], list[float], list[float], float]


def _by_hand(cell: Cell, model: Any) -> Measured:
    batch = contenders.batch(
        SHAPES[cell.shape], BATCHES[cell.batch], cell.device, metadata=cell.contender in OURS
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=cell.device.startswith("cuda"))
    clock, results = Clock(cell.device), []
    began = time.perf_counter()
    for step in range(cell.warmup + cell.steps):
        if step == cell.warmup:
            if cell.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            clock.mark()
        results.append(train_step(model, optimizer, batch))
        if step == 0:
            first = float(results[0][0]) and time.perf_counter() - began
        if step >= cell.warmup:
            clock.mark()
    seconds = clock.seconds()
    return (
        seconds,
        [float(loss) for loss, _ in results[:CHECKED_STEPS]],
        [float(norm) for _, norm in results[:CHECKED_STEPS]],
        first,
    )


def _by_trl(cell: Cell, model: Any) -> Measured:
    """TRL's own trainer and loop, told to do the same: one batch, no shuffling, no schedule, no clipping."""
    import tempfile

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cut = BATCHES[cell.batch]
    made = contenders.batch(SHAPES[cell.shape], cut, "cpu", metadata=False)
    steps = cell.warmup + cell.steps
    data = Dataset.from_dict({name: made[name].tolist() * steps for name in ("input_ids", "labels")})
    clock = Clock(cell.device)
    began: list[float] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            began.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= cell.warmup:
                clock.mark()

    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=cut.documents, logging_steps=1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1e9,
            max_length=None, report_to=[], save_strategy="no", train_sampling_strategy="sequential",
            gradient_checkpointing=True, bf16=cell.dtype == "bfloat16", use_cpu=cell.device == "cpu",
            dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
        )  # fmt: skip
        shape = SHAPES[cell.shape]
        trainer = SFTTrainer(
            model=model,
            args=options,
            train_dataset=data,
            processing_class=contenders.tokenizer(shape),
            callbacks=[Marks()],
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry][:CHECKED_STEPS]
    losses, norms = ([float(entry[name]) for entry in logs] for name in ("loss", "grad_norm"))
    return clock.seconds(), losses, norms, began[1] - began[0]


def versions() -> dict[str, str]:
    """Of everything that may have taken part."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "unsloth", "pronghorn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Measure the cell given as JSON, write the row as JSON."""
    cell = Cell(**json.loads(sys.argv[1]))
    missing = [name for name in CONTENDERS[cell.contender] if not _importable(name)]
    row: dict[str, Any]
    if missing:
        row = {"status": "skipped", "why": f"{', '.join(missing)} cannot be imported"}
    else:
        try:
            row = {"status": "measured", **measure(cell)}
        except torch.cuda.OutOfMemoryError:
            row = {"status": "failed", "why": "out of memory"}
    Path(sys.argv[2]).write_text(json.dumps(row), encoding="utf-8")
    return 0


def _importable(name: str) -> bool:
    try:
        __import__(name)
    except Exception as error:
        print(
            f"{name}: {error}", file=sys.stderr
        )  # a peer may fail in many ways: all mean that it is not here
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
