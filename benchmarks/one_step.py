"""What one optimizer step made of its rows: the loss, the gradient, and an evaluation before it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers


@dataclass
class Found:
    """What one way made of the rows: loss and evaluation, and the gradient of the adapter."""

    loss: float
    gradient: torch.Tensor
    evaluation: float | None


class Recorder(transformers.TrainerCallback):
    """Keeps the gradient as the optimizer gets it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The gradients of all passes of the step are in; nothing is clipped."""
        self.gradient = gradient_of(model)


def gradient_of(model: Any) -> torch.Tensor:
    named = sorted((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return torch.cat([gradient.flatten().double() for _, gradient in named])


def arguments_for_a_step(folder: Path, passes: int, batch: int) -> dict[str, Any]:
    """For the trainers of transformers and TRL: one step, unclipped, and nothing beside it."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": passes,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 42,
    }


def evaluated_and_stepped(trainer: Any, recorder: Recorder) -> Found:
    """Evaluate, take the step, and read what was logged."""
    evaluation = trainer.evaluate()["eval_loss"]
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return Found(loss, recorder.gradient, evaluation)


def line(cut: str, name: str, found: Found, truth: Found) -> str:
    """A line of a table: how far ``found`` is off, relative to the truth."""
    gradient = float((found.gradient - truth.gradient).norm() / truth.gradient.norm())
    assert truth.evaluation is not None and found.evaluation is not None
    cells = (found.loss / truth.loss - 1, gradient, found.evaluation / truth.evaluation - 1)
    return f"| {cut} | {name} | {' | '.join(f'{abs(cell):.0e}' for cell in cells)} |"
