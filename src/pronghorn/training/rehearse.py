"""One micro-step, counted: the bytes alive between forward and backward, and the highest within both.

The same code runs on a model of shapes only, before anything is loaded, and on a real one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pronghorn.attention.unmasked import masks_known
from pronghorn.memory.budget import StepBytes
from pronghorn.memory.counter import LiveStorages, held_storages
from pronghorn.ops.graph import is_fake
from pronghorn.training.trainer import read_for_metrics

# torch counts addmm but not its in-place form, by which adapters are added
_IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, *args, out_shape=None, **kwargs: 2 * a[0] * a[1] * b[1]}


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Rows and tokens of each; ``padded``: rows of unequal length, so that there is a mask."""

    rows: int
    tokens: int
    packed: bool = False
    padded: bool = False

    @property
    def all_tokens(self) -> int:
        """Of the whole micro-batch."""
        return self.rows * self.tokens

    def batch(self) -> dict[str, Tensor]:
        """Inputs as the collators make them, every label trained."""
        ids = torch.ones((self.rows, self.tokens), dtype=torch.long)
        made = {"input_ids": ids, "labels": ids.clone()}
        if self.packed:
            half = torch.arange(self.tokens) % max(1, self.tokens // 2)  # two rows in each bin
            return {**made, "position_ids": half.expand(self.rows, -1).contiguous()}
        if self.padded:
            mask = torch.ones_like(ids)
            mask[:, -1] = 0
            return {**made, "attention_mask": mask}
        return made


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """How the trainer runs the model."""

    bf16: bool = False
    """under autocast to bfloat16"""
    fused_head: bool = True
    """TRL's own fused head is on the model (from 1.15); before, TRL reads the logits for its metrics"""
    reads_logits: bool = True
    """without the fused head: for TRL's metrics"""
    accumulates: bool = False
    """gradients of an earlier micro-step are there already"""


def rehearse(model: Any, shape: BatchShape, how: Arithmetic) -> StepBytes:
    """Run one micro-step of ``model`` and count its bytes; with fake tensors, inside their mode."""
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = shape.batch()
    model.train()
    _set_gradients(trained, present=False)
    with LiveStorages(held_storages(model)) as live, _masks(model, shape):
        _set_gradients(trained, present=how.accumulates)
        loss = micro_loss(model, batch, how)
        saved = live.alive()
        loss.backward()  # type: ignore[no-untyped-call]
    _set_gradients(trained, present=False)
    return StepBytes(saved, live.peak)


def count_flops(model: Any, shape: BatchShape, how: Arithmetic) -> int:
    """Operations in the products of one micro-step, recompute included."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    # a pass of its own: torch's counter keeps tensors alive
    with FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as counter, _masks(model, shape):
        micro_loss(model, shape.batch(), how).backward()  # type: ignore[no-untyped-call]
    _set_gradients(trained, present=False)
    return int(counter.get_total_flops())


def _masks(model: Any, shape: BatchShape) -> AbstractContextManager[None]:
    """With numbers, transformers sees whether a batch needs a mask; without, it has to be told."""
    told = shape.packed or not is_fake(next(model.parameters()))
    return nullcontext() if told else masks_known(model, padded=shape.padded)


def _set_gradients(parameters: Iterable[Tensor], *, present: bool) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if present else None


def micro_loss(model: Any, batch: dict[str, Tensor], how: Arithmetic) -> Tensor:
    """The loss as TRL's trainer makes it."""
    kind = batch["input_ids"].device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=how.bf16):
        if how.fused_head:
            out = model(**batch, use_cache=False, fused_lm_head=True)
            fused: Tensor = -out.log_probs.sum() / batch["labels"].shape[0]
            return fused
        out = model(**batch, use_cache=False)
        if how.reads_logits:
            with torch.no_grad():
                read_for_metrics(out.logits.float() if how.bf16 else out.logits)
        loss: Tensor = out.loss
        return loss
