"""What a failure inside the loop means to the person who started the run."""

from __future__ import annotations

import torch

from pronghorn.errors import OutOfMemoryError, TrainingError
from pronghorn.training.config import RunConfig

# how torch's CPU allocator says it; CUDA and others raise torch.OutOfMemoryError
_CPU_MEMORY_MESSAGES = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device, or the machine, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MEMORY_MESSAGES)


def out_of_memory(config: RunConfig, step: int, phase: str) -> OutOfMemoryError:
    """The error for no memory left in ``phase`` of ``step``; names the setting that helps first."""
    training = config.training
    eval_batch = config.eval.batch_size or training.batch_size
    if phase == "loading":
        return OutOfMemoryError(
            f"out of memory while loading {config.model.name}",
            fix=f"model.dtype is {config.model.dtype}: set it to bfloat16, or choose a smaller base",
        )
    if phase == "evaluation" and eval_batch > 1:
        fix = f"eval.batch_size is {eval_batch}: set it to {eval_batch // 2} (the result does not change)"
    elif not training.recompute:
        fix = "training.recompute is false: set it to true (the result does not change)"
    elif training.batch_size > 1:
        half = training.batch_size // 2
        fix = (
            f"training.batch_size is {training.batch_size}: set it to {half}, and "
            f"training.gradient_accumulation from {training.gradient_accumulation} to "
            f"{training.gradient_accumulation * training.batch_size // half} for the same rows per step"
        )
    else:
        length = config.model.max_seq_length or "not set"
        fix = f"model.max_seq_length is {length}: set it to less, or lower lora.r"
    return OutOfMemoryError(f"out of memory in {phase} of step {step}", fix=fix)


def save_failed(error: BaseException, step: int, last: int | None) -> TrainingError:
    """The error for a checkpoint that could not be written, e.g. on a full disk."""
    kept = (
        f"the last good checkpoint is step {last}" if last is not None else "there is no earlier checkpoint"
    )
    return TrainingError(
        f"the checkpoint of step {step} could not be written ({error}); {kept}",
        fix="make room on the disk of output.folder, then run the same command again",
    )
