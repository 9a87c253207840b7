"""Measures in the first optimizer step what the plan predicted: saved, peak and the optimizer's bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from pronghorn.loading.report import dtype_bytes
from pronghorn.memory.budget import StepBytes
from pronghorn.memory.counter import LiveStorages, held_storages, storage_key
from pronghorn.training.plan import Plan, Planner
from pronghorn.training.rehearse import BatchShape


class Meter:
    """Watches the micro-steps of one optimizer step; the largest of them is compared with the plan."""

    def __init__(self, planner: Planner, made: Plan) -> None:
        self.planner = planner
        self.plan = made
        self.found: list[tuple[BatchShape, bool, StepBytes]] = []
        self._saved = 0
        self._live: LiveStorages | None = None
        self._held = 0
        self._before = 0

    @contextmanager
    def micro_step(self, model: Any, inputs: dict[str, Any]) -> Iterator[None]:
        """Around forward and backward of one micro-batch."""
        shape = _shape_of(inputs)
        held = held_storages(model)
        there = _tensor_bytes([p.grad for p in model.parameters()])
        self._held = sum(dtype_bytes(model).values())
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() - there
            yield
            peak = torch.cuda.max_memory_allocated() - self._before
        else:
            with LiveStorages(held) as self._live:
                yield
            peak, self._live = self._live.peak + there, None
            self._saved += there
        self.found.append((shape, there > 0, StepBytes(self._saved, peak)))

    def forward_done(self) -> None:
        """Between forward and backward."""
        alive = torch.cuda.memory_allocated() - self._before if self._live is None else self._live.alive()
        self._saved = alive

    def summary(self, optimizer: Any) -> dict[str, Any]:
        """Predicted beside measured, for the manifest.

        Args:
            optimizer: torch's, after its first step.
        """
        shape, accumulates, measured = max(self.found, key=lambda one: (one[0].all_tokens, one[1]))
        stage, setting = self.planner.stage, self.planner.config.training.recompute
        predicted = self.planner.step(shape, setting, accumulates=accumulates)
        state = _tensor_bytes(v for one in optimizer.state.values() for v in one.values())
        need = self.plan.chosen.need
        return {
            "step": 1,
            "batch": asdict(shape),
            "basis": "upper estimate" if stage.upper else "rehearsed on shapes",
            "saved_bytes": {"predicted": predicted.saved, "measured": measured.saved},
            "peak_bytes": {"predicted": predicted.peak, "measured": measured.peak},
            "optimizer_bytes": {"predicted": need.optimizer, "measured": state},
            "held_bytes": {"predicted": need.weights + need.adapters, "measured": self._held},
        }


def _tensor_bytes(values: Iterable[Any]) -> int:
    """Bytes of the distinct storages among values: gradients may be parts of one product."""
    found = {storage_key(v): v.untyped_storage().nbytes() for v in values if isinstance(v, torch.Tensor)}
    return sum(found.values())


def _shape_of(inputs: dict[str, Any]) -> BatchShape:
    rows, tokens = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    return BatchShape(
        rows=rows,
        tokens=tokens,
        packed="position_ids" in inputs,
        padded=mask is not None and not bool(mask.all()),
    )
