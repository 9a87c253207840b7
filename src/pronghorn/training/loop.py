"""One leg of a run: builds the trainer, starts it fresh or from a checkpoint, and knows how far it came."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from pronghorn.patching.trl_head import fuse_trl_head
from pronghorn.training.callbacks import (
    FlowCallback,
    MeterCallback,
    MetricsCallback,
    RunContext,
    SealCallback,
    check_restored,
)
from pronghorn.training.checkpoint import Checkpoint
from pronghorn.training.config import RunConfig
from pronghorn.training.folder import RunFolder
from pronghorn.training.material import Material
from pronghorn.training.meter import Meter
from pronghorn.training.metrics import MetricsLog
from pronghorn.training.progress import Narrator, ProgressCallback
from pronghorn.training.signals import StopSignals
from pronghorn.training.trainer import LoopState, RunTrainer, Schedule, sft_arguments


class Loop(TrainerCallback):  # type: ignore[misc]
    """Holds the trainer and its callbacks for one call of ``train``."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        narrator: Narrator,
        stop: StopSignals,
        material: Material,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        schedule = Schedule.of(config, len(material.rows))
        self._state = LoopState(stop)
        self._context = RunContext(config, folder, schedule, self._state, material.eval_rows is not None)
        self._narrator = narrator
        self._start: Checkpoint | None = None
        self.total = schedule.total_steps
        metrics = MetricsLog(folder.metrics)
        self._seal = SealCallback(self._context, metrics)
        self._progress = ProgressCallback(config.logging, narrator, total=self.total)
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.root / "tensorboard"))
        self._trainer = RunTrainer(
            model=material.model,
            tokenizer=material.tokenizer,
            arguments=sft_arguments(config, schedule, folder.scratch, material.model),
            rows=material.rows,
            eval_rows=material.eval_rows,
            loop=self._state,
            callbacks=[
                self,
                FlowCallback(self._context),
                MeterCallback(self._context),
                MetricsCallback(self._context, metrics),
                self._seal,
                self._progress,
                *callbacks,
            ],
        )
        if config.training.accelerate:
            narrator.say(f"fused loss: {fuse_trl_head(material.model)}")

    @property
    def step(self) -> int:
        """Optimizer steps taken since the start of the run."""
        return int(self._trainer.state.global_step)

    @property
    def phase(self) -> str:
        """What the loop is doing: training, evaluation, saving."""
        return self._state.phase

    @property
    def last_sealed(self) -> int | None:
        """The step of the newest good checkpoint."""
        return self._seal.last_sealed

    @property
    def unfinished(self) -> bool:
        """Whether a stop request left steps or an evaluation to do."""
        return self.step < self.total or self._state.eval_due

    def run(self, start: Checkpoint | None, meter: Meter | None = None) -> None:
        """Train to the end, or until a stop request; ``meter`` measures the first step of a fresh run."""
        self._start = start
        self._state.meter = meter if start is None else None
        self._state.stop.in_loop = True
        if start is None:
            self._narrator.say(f"training {self.total} steps")
            self._trainer.train()
            return
        progress = start.progress()
        self._state.tokens, self._state.eval_due = progress["tokens"], progress["eval_due"]
        self._seal.last_sealed = self._progress.start = start.step
        self._narrator.say(
            f"resuming from {start.path}, {self.total - start.step} of {self.total} steps to go"
        )
        if start.step < self.total:
            epoch, steps = divmod(start.step, self._context.schedule.steps_per_epoch)
            if steps:
                passes = self._context.config.training.gradient_accumulation
                self._state.resumed_at = (epoch, steps * passes)
            self._trainer.train(resume_from_checkpoint=str(start.path))
        else:
            self._finish_from(start)

    def close(self) -> None:
        """Take the progress bar away."""
        self._progress.close()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Prove what was restored, and do the evaluation that is due before the next step."""
        if self._start is None:
            set_seed(self._context.config.seed)  # libraries draw numbers while they set up, some only once
        else:
            check_restored(model, self._start.progress()["weights"], self._start.path)
        at_start = self._start is None and self._context.has_eval and self._context.config.eval.at_start
        if at_start or self._state.eval_due:
            self._trainer.evaluate()

    def _finish_from(self, start: Checkpoint) -> None:
        """All steps are done: restore the adapter alone (the Trainer would take one step too many)."""
        model = self._trainer.model
        model.load_adapter(str(start.path), model.active_adapter, is_trainable=True)
        check_restored(model, start.progress()["weights"], start.path)
        self._trainer.state = TrainerState.load_from_json(str(start.path / "trainer_state.json"))
        if self._state.eval_due:
            self._trainer.evaluate()
