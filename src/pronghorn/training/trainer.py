"""The boundary to TRL: SFTTrainer through its public methods, from TRL 0.23 to 1.16, and its arguments.

What differs from plain SFTTrainer: a non-finite loss stops the run before the optimizer step, evaluation is
one token mean over the split and leaves the random state alone, and no usage ping is sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import skip_first_batches
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from pronghorn.errors import NonFiniteLossError
from pronghorn.training import ranks
from pronghorn.training.collate import TOKENS, RowCollator, wants_varlen
from pronghorn.training.config import RunConfig, TrainingSection
from pronghorn.training.evaluation import TokenTotals, add_batch
from pronghorn.training.signals import StopSignals

if TYPE_CHECKING:
    from pronghorn.training.meter import Meter

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "sgd": "sgd"}


@dataclass
class LoopState:
    """What the trainer and its callbacks tell each other while the loop runs."""

    stop: StopSignals = field(default_factory=StopSignals)
    phase: str = "training"  # or "evaluation", "saving": what an error that arrives now belongs to
    tokens: int = 0  # tokens seen since the start of the run, padding not counted
    meter: Meter | None = None  # of the first optimizer step
    eval_due: bool = False  # an evaluation was put off because the run had to stop
    resumed_at: tuple[int, int] | None = None  # an epoch resumed within, and its batches that are done
    step_loss: float | torch.Tensor = 0.0  # sum over the passes of the step at hand


@dataclass(frozen=True)
class Schedule:
    """How many optimizer steps a run has."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, config: RunConfig, rows: int) -> Schedule:
        """The schedule of ``config`` over ``rows`` training rows; a last partial batch counts as a batch."""
        training = config.training
        batches = math.ceil(rows / (training.batch_size * ranks.count()))
        per_epoch = math.ceil(batches / training.gradient_accumulation)
        total = training.max_steps or math.ceil(training.epochs * per_epoch)
        return cls(per_epoch, total, int(total * training.warmup_ratio))


def runs_in_bf16(training: TrainingSection, dtype: torch.dtype) -> bool:
    """Whether the forward pass runs under autocast to bfloat16, for a base held in ``dtype``."""
    return training.precision == "bf16" or (training.precision == "auto" and dtype == torch.bfloat16)


def sft_arguments(config: RunConfig, schedule: Schedule, scratch: Path, model: Any) -> SFTConfig:
    """TRL's arguments for ``config``; evaluation, saving and stopping are driven by our callbacks instead.

    Args:
        config: The run.
        schedule: Its steps.
        scratch: Where the Trainer may write.
        model: Asked for its device and dtype.
    """
    training = config.training
    known = {item.name for item in dataclasses.fields(SFTConfig)}
    on_cpu = model.device.type == "cpu"
    bf16 = runs_in_bf16(training, model.dtype)
    # transformers 5.22 renamed gradient_checkpointing*; the old names warn there
    recompute = (
        "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    )
    options: dict[str, Any] = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": config.eval.batch_size or training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "max_steps": schedule.total_steps,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if training.schedule == "constant" else training.schedule,
        "warmup_steps": schedule.warmup_steps,
        "optim": _OPTIMIZERS[training.optimizer],
        "weight_decay": training.weight_decay,
        "adam_beta1": training.beta1,
        "adam_beta2": training.beta2,
        "adam_epsilon": training.epsilon,
        "max_grad_norm": training.max_grad_norm,
        "bf16": bf16,
        "fp16": False,
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        recompute: bool(training.recompute),
        f"{recompute}_kwargs": {"use_reentrant": False} if training.recompute else None,
        "average_tokens_across_devices": True,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": list(config.logging.report_to),
        "run_name": config.logging.run_name or config.output.folder.name,
        "logging_dir": str(
            config.output.folder / "tensorboard"
        ),  # transformers 5 takes it from the environment
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,  # TRL's own; our bins arrive packed
        "remove_unused_columns": False,  # the lengths of bins are used, by the collator
        "router_aux_loss_coef": 0.0,  # a mean per forward pass: it would depend on how the batch is cut
    }
    if _fused_head() is None:
        options["loss_type"] = "nll"  # from 1.4 to 1.14 TRL's own default takes the place of the model's loss
    optional = {"logging_dir", "router_aux_loss_coef", "loss_type"}
    with _mixed_precision(bf16):
        return SFTConfig(
            **{name: value for name, value in options.items() if name in known or name not in optional}
        )


@contextlib.contextmanager
def _mixed_precision(bf16: bool) -> Iterator[None]:
    """What the run says holds, whatever the environment says, and nothing of it stays there.

    accelerate takes the precision from this variable where it is given none, and transformers 4 leaves that
    of a run in it: the next run of the process, in float32, would be one in bfloat16.
    """
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    os.environ[name] = "bf16" if bf16 else "no"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class RunTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """SFTTrainer on rows that are token ids and labels already."""

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        arguments: SFTConfig,
        rows: Any,
        eval_rows: Any,
        loop: LoopState,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.loop = loop
        self._resumed: Iterator[Any] | None = None
        self._rest: Iterator[Any] = iter(())
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with _kept_as_loaded(model), _mixed_precision(arguments.bf16):
            super().__init__(
                model=model,
                args=arguments,
                data_collator=RowCollator(pad or 0, wants_varlen(model)),
                train_dataset=rows,
                eval_dataset=eval_rows,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        self.remove_callback(PrinterCallback)
        if ranks.count() > 1:
            self.train_dataset = ranks.Filled(rows, pad or 0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if ranks.count() == 1:
            return super()._get_train_sampler(*([] if train_dataset is None else [train_dataset]))
        return ranks.SharedOrder(
            len(self.train_dataset), self.args.data_seed, self.args.per_device_train_batch_size
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The split; with several processes, this one's share of it."""
        if ranks.count() == 1:
            return super().get_eval_dataloader(eval_dataset)
        return ranks.own_share(self.eval_dataset, self.args.per_device_eval_batch_size, self.data_collator)

    def _send_telemetry(self) -> None:
        """TRL pings the hub once per trainer unless CI is set; ours sends nothing and touches no global."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: TRL writes one into the output folder at every checkpoint."""

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of a step; a step that got too few is filled up with empty ones.

        Up to 4.57 transformers asks for a full step at the end of an epoch it resumes within, and takes the
        optimizer step only when that many have come: a partial last step would be lost.
        """
        if self.loop.resumed_at is not None:
            self._resumed = epoch_iterator
            self._rest = self._rest_of_epoch(*self.loop.resumed_at, epoch_iterator)
            self.loop.resumed_at = None
        if epoch_iterator is self._resumed:
            epoch_iterator = self._rest
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            batches += [{"input_ids": torch.empty(0)}] * (num_batches - len(batches))
        return batches, items

    def _rest_of_epoch(self, epoch: int, done: int, skipped: Iterator[Any]) -> Iterator[Any]:
        """What the Trainer skipped to, if that is in the order of ``epoch``.

        A loader of accelerate 1.10 that skips batches forgets the epoch: the rest would be that of the first.
        """
        loader = self.callback_handler.train_dataloader
        loader.set_epoch(epoch)
        if skip_first_batches(loader, done).iteration == epoch:
            return skipped
        return itertools.islice(loader, done, None)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch.

        Raises:
            NonFiniteLossError: the loss or a gradient is NaN or infinite; the optimizer has not taken the
            step.
        """
        self.loop.phase = "training"
        if not inputs["input_ids"].numel():
            return torch.zeros((), device=self.args.device)
        seen = inputs.pop(TOKENS).sum() if TOKENS in inputs else inputs["attention_mask"].sum()
        self.loop.tokens += int(ranks.total([int(seen)])[0])
        meter = self.loop.meter
        with contextlib.nullcontext() if meter is None else meter.micro_step(self.model, inputs):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise non_finite("loss", loss.item(), self.state.global_step + 1)
        self._require_finite_gradients()
        # of several processes each has its own share, times their number
        self.loop.step_loss += loss if ranks.count() == 1 else ranks.total([float(loss)])[0] / ranks.count()
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; what is alive after it is what backward needs."""
        result = super().compute_loss(*args, **kwargs)
        if self.loop.meter is not None:
            self.loop.meter.forward_done()
        return result

    def _require_finite_gradients(self) -> None:
        """Before clipping: it would spread a NaN over all tensors, and scale an overflowed norm to 0."""
        gradients = {
            name: tensor.grad for name, tensor in self.model.named_parameters() if tensor.grad is not None
        }
        norm = float(torch.nn.utils.get_total_norm(gradients.values()))
        if not math.isfinite(norm):
            bad = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
            raise non_finite("gradient norm", norm, self.state.global_step + 1, first_names(bad))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter of a checkpoint; from here until on_save, an error means that saving failed."""
        self.loop.phase = "saving"
        super().save_model(output_dir, _internal_call)
        ranks.wait()  # the adapter is written into an empty folder, and then all add their random states

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and accuracy as token means over the whole split; a stop request ends it between batches.

        The random state is restored after: a run with and one without evaluation train on the same numbers.
        """
        self.loop.phase = "evaluation"
        totals = TokenTotals()
        self.model.eval()
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        with torch.random.fork_rng(devices=[]), torch.no_grad(), self.compute_loss_context_manager():
            for batch in dataloader:
                if self.loop.stop.requested and ranks.count() == 1:
                    self.loop.eval_due = True
                    return EvalLoopOutput(predictions=None, label_ids=None, metrics={}, num_samples=0)
                add_batch(totals, self.model, base, batch)
        loss, correct, tokens = ranks.total([totals.loss, totals.correct, totals.tokens])
        totals = TokenTotals(loss, int(correct), int(tokens))
        metrics = totals.metrics(metric_key_prefix)
        if not math.isfinite(totals.loss):
            raise non_finite("evaluation loss", totals.loss, self.state.global_step)
        self.loop.eval_due = False
        rows = len(self.eval_dataset)
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)


@contextlib.contextmanager
def _kept_as_loaded(model: Any) -> Iterator[None]:
    """Adapters and embeddings keep their dtypes: TRL casts those of a model it sees to be quantised.

    It rounds float32 adapters to bfloat16 (1.x), or makes embeddings and norms float32 (0.x).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    flags = [name for name in ("is_loaded_in_4bit", "is_loaded_in_8bit") if getattr(base, name, False)]
    for name in flags:
        setattr(base, name, False)
    try:
        yield
    finally:
        for name in flags:
            setattr(base, name, True)


def non_finite(what: str, value: float, step: int, where: str = "") -> NonFiniteLossError:
    """The error for a number that is NaN or infinite."""
    return NonFiniteLossError(
        f"the {what} of step {step} is {value}{where}; nothing of this step was kept",
        fix="lower training.learning_rate, look at the rows of that step, or set training.precision to fp32; "
        "the last checkpoint is from before it",
    )


def first_names(names: list[str]) -> str:
    """The end of a sentence that names up to three tensors; empty for none."""
    return f", in {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else ""


def add_fused_head(base: Any) -> bool:
    """Put TRL's fused head on a model as its trainer does; False where TRL has none (before 1.15)."""
    add = _fused_head()
    if add is not None:
        add(base, outputs=("log_probs", "entropy", "is_top1"))
    return add is not None


def _fused_head() -> Any:
    """TRL's function for it, None where there is none."""
    try:
        from trl.trainer.utils import add_fused_lm_head
    except ImportError:
        return None
    return add_fused_lm_head


def read_for_metrics(logits: Any) -> None:
    """What TRL's trainer computes of the logits where it has no fused head: entropy, then accuracy."""
    from trl.trainer.utils import entropy_from_logits

    entropy_from_logits(logits)
    logits[..., :-1, :].contiguous().argmax(-1)
