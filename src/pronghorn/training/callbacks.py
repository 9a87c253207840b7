"""Our side of the loop: when to evaluate, save and stop; metrics; sealing."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pronghorn.errors import TrainingError
from pronghorn.training import ranks
from pronghorn.training.checkpoint import rotate, seal
from pronghorn.training.config import RunConfig
from pronghorn.training.folder import RunFolder, extend_json
from pronghorn.training.metrics import MetricsLog, row_from_logs
from pronghorn.training.trainer import LoopState, Schedule, first_names


@dataclass(frozen=True)
class RunContext:
    """What the callbacks of a run share."""

    config: RunConfig
    folder: RunFolder
    schedule: Schedule
    loop: LoopState
    has_eval: bool


class FlowCallback(TrainerCallback):  # type: ignore[misc]
    """Decides after each step what follows, and turns a stop request into a checkpoint and an end."""

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Set the flags the Trainer acts on."""
        config, step = self.context.config, state.global_step
        if step % self.context.schedule.steps_per_epoch == 0:
            state.epoch = step / self.context.schedule.steps_per_epoch  # empty batches were counted too
        control.should_evaluate = self.context.has_eval and self._due(step, config.eval.every_steps)
        control.should_save = self._due(step, config.checkpoints.every_steps)
        return self._obey_stop(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """An evaluation may have been cut short by a stop request."""
        return self._obey_stop(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse an epoch that lost a step (transformers 4.56: the partial last one, on resume)."""
        planned = self.context.schedule.steps_per_epoch
        if state.global_step % planned and not control.should_training_stop:
            raise TrainingError(
                f"an epoch of {planned} steps ended after step {state.global_step}: transformers "
                f"{transformers.__version__} loses the partial last step of an epoch it resumes",
                fix="pip install -U transformers, then run the same command again; the checkpoints are good",
            )

    def _due(self, step: int, every: int | None) -> bool:
        schedule = self.context.schedule
        return step >= schedule.total_steps or step % (every or schedule.steps_per_epoch) == 0

    def _obey_stop(self, control: TrainerControl) -> TrainerControl:
        loop = self.context.loop
        if ranks.total([bool(loop.stop.requested)])[0]:
            loop.stop.requested = loop.stop.requested or "a signal to another process"
            loop.eval_due = loop.eval_due or control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True
        return control


class MetricsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl."""

    def __init__(self, context: RunContext, metrics: MetricsLog) -> None:
        self.context = context
        self.metrics = metrics
        self._began = time.monotonic()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the step, and its loss."""
        self._began = time.monotonic()
        self.context.loop.step_loss = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """One row per step and evaluation."""
        row = row_from_logs(logs or {}, state.global_step)
        if row is None or not ranks.is_first():
            return
        if "loss" in row:
            row["loss"] = float(self.context.loop.step_loss)  # transformers 4.56 rounds its own to 4 decimals
            row["tokens"] = self.context.loop.tokens
            row["seconds"] = round(time.monotonic() - self._began, 4)
        self.metrics.append(row)


class MeterCallback(TrainerCallback):  # type: ignore[misc]
    """After the first optimizer step: predicted beside measured into the manifest, and no more measuring."""

    def __init__(self, context: RunContext) -> None:
        self.context = context

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called after each optimizer step."""
        meter, self.context.loop.meter = self.context.loop.meter, None
        if meter is not None and ranks.is_first():
            extend_json(self.context.folder.manifest, "memory", meter.summary(optimizer))


class SealCallback(TrainerCallback):  # type: ignore[misc]
    """Turns each folder the Trainer has written into a sealed checkpoint, and rotates the old ones."""

    def __init__(self, context: RunContext, metrics: MetricsLog) -> None:
        self.context = context
        self.metrics = metrics
        self.last_sealed: int | None = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called when the Trainer's own files are complete."""
        loop, folder = self.context.loop, self.context.folder
        progress = {
            "step": state.global_step,
            "tokens": loop.tokens,
            "eval_due": loop.eval_due,
            "weights": weight_digests(model),
        }
        ranks.wait()  # each has written its random state
        if ranks.is_first():
            self.metrics.sync()
            written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seal(written, folder.checkpoints, state.global_step, progress)
            rotate(folder.checkpoints, self.context.config.checkpoints.keep)
        ranks.wait()
        self.last_sealed = state.global_step
        loop.phase = "training"


def weight_digests(model: Any) -> dict[str, str]:
    """sha256 of each trainable tensor's bytes, by name."""
    digests = {}
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            plain = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            digests[name] = hashlib.sha256(plain.numpy().tobytes()).hexdigest()
    return digests


def check_restored(model: Any, sealed: dict[str, str], checkpoint: Path) -> None:
    """Prove that the weights in the model are those that were sealed.

    Raises:
        TrainingError: names the tensors that are missing, new or different.
    """
    now = weight_digests(model)
    different = sorted(name for name in {*now, *sealed} if now.get(name) != sealed.get(name))
    if different:
        raise TrainingError(
            f"{checkpoint} was not restored exactly: {len(different)} trained tensors differ"
            f"{first_names(different)}",
            fix="go on with the library versions in manifest.json, or start a new run folder",
        )
