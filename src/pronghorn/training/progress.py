"""What a person sees while it runs: a bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console, ConsoleRenderable
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pronghorn.training.config import LoggingSection


class Narrator:
    """Prints lines to stdout; with ``quiet`` it keeps silent."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def say(self, line: str) -> None:
        """One line, shown at once."""
        if not self.quiet:
            print(line, flush=True)

    def show(self, report: ConsoleRenderable) -> None:
        """A report that draws itself."""
        if not self.quiet:
            Console(file=sys.stdout).print(report)


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Shows each logged step that is due, and every evaluation."""

    def __init__(self, options: LoggingSection, narrator: Narrator, *, total: int) -> None:
        self.options = options
        self.narrator = narrator
        self.start = 0  # steps taken by earlier legs of the run
        self.total = total
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, if there is a terminal to draw it on."""
        if self.options.progress == "auto" and sys.stdout.isatty() and not self.narrator.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task("training", total=self.total, completed=self.start)
            self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print a line for an evaluation, for the first and last step, and each N steps."""
        logs, step = logs or {}, state.global_step
        if "eval_loss" in logs:
            accuracy = logs["eval_mean_token_accuracy"]
            self._print(
                f"step {step}/{self.total}  eval loss {logs['eval_loss']:.4f}  accuracy {accuracy:.3f}"
            )
        elif "loss" in logs and (
            step in (self.start + 1, self.total) or step % self.options.every_steps == 0
        ):
            # older transformers log the norm only when they clip
            norm = f"  grad norm {logs['grad_norm']:.3f}" if "grad_norm" in logs else ""
            rate = f"lr {logs['learning_rate']:.2e}"
            self._print(f"step {step}/{self.total}  loss {logs['loss']:.4f}  {rate}{norm}")

    def close(self) -> None:
        """Take the bar away; also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            self.narrator.say(line)
