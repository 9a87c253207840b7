"""What ``accelerate`` would do to a model that has shapes and no numbers: found alike, assumed proven.

For the plan of a run. Norms and MLPs are still told apart by their numbers, on small real copies of them;
what is fitted counts as replaced, because the proof needs weights. A model with numbers is never treated so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from typing import Any

import torch
from torch import nn

from pronghorn.adapters.origin import base_of
from pronghorn.memory.shapes_only import ShapesOnly
from pronghorn.ops.experts import ExpertsForm
from pronghorn.patching import experts, mlps, norms
from pronghorn.patching.accelerate import Prover, find_and_replace, put_recompute
from pronghorn.patching.adapted import linear_shape, lora_part
from pronghorn.patching.forwards import Declined, InstanceForward
from pronghorn.patching.linears import LinearForward
from pronghorn.patching.proof import Build
from pronghorn.patching.report import Choice, PatchReport
from pronghorn.patching.trace import sample_batch

ASSUMED = "assumed: shapes have no numbers to prove it by"
# the narrow copy of an MLP keeps at least this much of its greatest common width
LEAST_WIDTH = 8


class ShapeProver(Prover):
    """Fits what can be fitted on small copies and takes the rest as proven."""

    def _fit_norm(
        self, module: nn.Module, shape: tuple[int, ...]
    ) -> tuple[norms.NormForward, str] | Declined:
        return norms.fit_norm(_real(module), shape)

    def _fit_mlp(self, module: nn.Module, shape: tuple[int, ...]) -> mlps.MlpForm | Declined:
        narrow, by = _narrow(module)
        return mlps.fit_mlp(narrow, (*shape[:-1], shape[-1] // by))

    def _prove_experts(
        self, name: str, inner: str, form: ExpertsForm | None, tile: int | None
    ) -> tuple[str, list[InstanceForward]]:
        return ASSUMED, [experts.ExpertsForward(self.modules[name], form, tile)]

    def _prove(
        self, name: str, subject: nn.Module, build: Build, forwards: list[InstanceForward]
    ) -> tuple[str, list[InstanceForward]]:
        del name, subject, build
        for forward in forwards:
            if isinstance(forward, LinearForward):
                state = lora_part(forward.module, training=True)
                if isinstance(state, Declined):
                    return str(state), []
        return ASSUMED, forwards


def accelerate_shapes(model: Any, shapes: ShapesOnly) -> PatchReport:
    """Put in place what ``accelerate`` is expected to put in place in a model whose tensors are fake."""
    base = base_of(model)
    report = PatchReport()
    with shapes:
        batch = sample_batch(base)
    find_and_replace(base, report, Choice(), batch, ShapeProver, shapes)
    report.model_check = ASSUMED
    return report


@contextmanager
def recomputing(model: Any, shapes: ShapesOnly, mode: str, activation_bytes: int | None) -> Iterator[None]:
    """Inside the block the accelerated model recomputes as ``accelerate(recompute=mode)`` would have it.

    Args:
        model: after ``accelerate_shapes``.
        shapes: the mode under which it is computed with.
        mode: "full", "unsloth" or "auto".
        activation_bytes: the budget of "auto".
    """
    base = base_of(model)
    report = PatchReport()
    with shapes:
        put_recompute(base, report, Choice(recompute=mode, activation_bytes=activation_bytes))
    base.enable_input_require_grads()  # as TRL does for an adapter with recompute
    try:
        yield
    finally:
        base.disable_input_require_grads()
        for switch in report.switches:
            switch.off()


def _real(module: nn.Module) -> nn.Module:
    """A copy of a module without children, with numbers."""
    clone = copy.copy(module)
    clone._parameters = {
        name: None if p is None else nn.Parameter(torch.ones(p.shape, dtype=p.dtype))
        for name, p in module._parameters.items()
    }
    clone._buffers = {
        name: None if b is None else torch.ones(b.shape, dtype=b.dtype) for name, b in module._buffers.items()
    }
    return clone


def _narrow(module: nn.Module) -> tuple[nn.Module, int]:
    """(a copy of an MLP whose linears are real and narrower by a common factor, the factor)."""
    shapes = {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}
    common = gcd(*(width for shape in shapes.values() for width in shape))
    by = max(1, common // LEAST_WIDTH)
    by = by if common % by == 0 else 1
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    for name, (inputs, outputs) in shapes.items():
        bias = getattr(module._modules[name], "bias", None) is not None
        clone._modules[name] = nn.Linear(inputs // by, outputs // by, bias=bias)
    return clone, by
