"""The peak of a cell as the plan of a run would predict it, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.gpu import contenders
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.shapes import BATCHES, SHAPES
from pronghorn.adapters.origin import base_of
from pronghorn.loading.blank import as_fake
from pronghorn.memory import recompute
from pronghorn.memory.budget import StepBytes, optimizer_bytes
from pronghorn.memory.counter import held_storages
from pronghorn.memory.shapes_only import ShapesOnly
from pronghorn.patching.assumed import accelerate_shapes
from pronghorn.training.depth import Depth
from pronghorn.training.rehearse import Arithmetic, BatchShape, rehearse

PREDICTED = ("pronghorn", "pronghorn-recompute", "peft", "peft-recompute")


def predicted_peak(cell: Cell) -> int | None:
    """Bytes of tensors at the peak of a step, None for a contender whose step is its own."""
    if cell.contender not in PREDICTED:
        return None
    cut, dtype = BATCHES[cell.batch], getattr(torch, cell.dtype)
    model = contenders.attach(contenders.base(SHAPES[cell.shape], "meta", dtype, cut.tokens)).train()
    shapes = ShapesOnly()
    as_fake(model, shapes)
    trained = [(tuple(p.shape), p.element_size()) for p in model.parameters() if p.requires_grad]
    held = sum(held_storages(model).values()) + optimizer_bytes("adamw", trained)
    depth = Depth(model)
    if cell.contender.startswith("pronghorn"):
        with depth.only(depth.rehearsed):
            accelerate_shapes(model, shapes)
    if cell.contender.endswith("-recompute"):
        recompute.enable(base_of(model))
        model.enable_input_require_grads()
    rows, tokens = (1, cut.tokens) if cut.packed else (cut.documents, cut.length)
    shape = BatchShape(rows=rows, tokens=tokens, packed=cut.packed)

    def run(layers: Sequence[int]) -> StepBytes:
        with depth.only(layers), shapes:
            return rehearse(model, shape, Arithmetic(fused_head=False, reads_logits=False))

    few = run(depth.few)
    peak = few.peak + sum(times * (run(more).peak - few.peak) for more, times in depth.repeated)
    return held + peak


def row_of(cell: Cell) -> dict[str, Any]:
    """The prediction for a row of results; empty where there is none."""
    found = predicted_peak(cell)
    return {} if found is None else {"predicted_peak_gib": found / 2**30}
