"""Stacked experts: modules behind transformers' ``ExpertsInterface``, bare or inside PEFT's adapters.

The interface gives such a module a contract: ``gate_up_proj`` (or ``up_proj``) and ``down_proj`` of three
dimensions, ``has_gate``, ``has_bias``, ``is_transposed`` and ``_apply_gate``. The replacement stands in front
of the interface, on the outermost module, and reads that contract: PEFT adapts a parameter by adding a dense
product for all experts before the function in the interface is called, so a function registered there would
come too late. The implementation the configuration names stays the original it is proven against and falls
back to.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.ops import select
from pronghorn.ops.experts import ExpertsForm
from pronghorn.ops.mlp import GatedPieces
from pronghorn.ops.reference import activate, split
from pronghorn.ops.shapes import ACTIVATIONS, Activation, ExpertPart, MlpLayout
from pronghorn.patching.adapted import Factors, is_adapted_parameter, stacked_adapters
from pronghorn.patching.forwards import NO_GRADIENT, Declined, InstanceForward
from pronghorn.patching.mlps import SAME_FORMULA
from pronghorn.patching.proof import distance

# the method the interface gives to every class behind it; transformers before 5.0 has neither
GATE = "_apply_gate"
# experts of a copy that is proven: the formula is that of all, and all together may not fit twice
PROOF_EXPERTS = 8


class ExpertsForward(InstanceForward):
    """Experts of known form; ``form`` None: our products around their own gate, left to autograd."""

    def __init__(self, module: nn.Module, form: ExpertsForm | None, tile_rows: int | None = None) -> None:
        super().__init__(module)
        self.form = form
        self.tile_rows = tile_rows

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """``x [T, hidden]``, chosen experts and their weights ``[T, k]``, experts in an expressible state."""
        if len(args) != 3 or kwargs or args[0].dim() != 2 or args[1].shape != args[2].shape:
            return Declined("called with more than states, choices and weights")
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        x, index, routing = args
        found = stacked_adapters(self.module)
        if isinstance(found, Declined):
            return found
        base, adapters = found
        parts = _parts(base, adapters)
        if isinstance(parts, Declined):
            return parts
        weight, kind = parts[0].weight, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if weight.dtype != dtype:
            return Declined(f"the weights are {weight.dtype}, the computation is in {dtype}")
        if weight.device != x.device:
            return Declined("the weights are on another device than the input")
        form = self.form or ExpertsForm("gate_up", "silu", _own_gate(base))
        out = select.experts(x.to(dtype), index, routing, *parts, form, tile_rows=self.tile_rows)
        return out.to(x.dtype)


def _parts(base: Any, adapters: dict[str, Factors]) -> tuple[ExpertPart, ExpertPart] | Declined:
    """The first and the down linears of all experts as they are now."""
    if getattr(base, "_is_expert_parallel", False):
        return Declined("the experts are spread over several processes")
    parts = []
    for name in _names(base):
        weight, bias = getattr(base, name), getattr(base, f"{name}_bias", None)
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return Declined("the weights of the experts train")
        a, b, scale = adapters.get(name, (None, None, 1.0))
        right = weight if base.is_transposed else weight.transpose(1, 2)
        parts.append(ExpertPart(right, bias, a, b, scale))
    return parts[0], parts[1]


def _names(base: Any) -> tuple[str, str]:
    return ("gate_up_proj" if getattr(base, "has_gate", True) else "up_proj", "down_proj")


def _own_gate(base: Any) -> GatedPieces:
    """What the module itself computes between its linears."""

    def apply(outputs: Sequence[Tensor]) -> Tensor:
        gated: Tensor = base._apply_gate(outputs[0]) if base.has_gate else base.act_fn(outputs[0])
        return gated

    def forward(outputs: Sequence[Tensor], layout: MlpLayout, activation: Activation) -> Tensor:
        return apply(outputs)

    def backward(
        dh: Tensor, outputs: Sequence[Tensor], layout: MlpLayout, activation: Activation, spent: bool
    ) -> list[Tensor]:
        with torch.enable_grad():
            z = outputs[0].detach().requires_grad_()
            return list(torch.autograd.grad(apply([z]), [z], dh))

    return GatedPieces(forward, backward)


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the weights of many experts, stacked into three dimensions."""
    return sum(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False)) >= 2


def outermost(name: str, modules: dict[str, nn.Module]) -> str:
    """The name of the adapter of parameters that the model calls in place of the experts ``name``."""
    parent, _, child = name.rpartition(".")
    inside = child == "base_layer" and is_adapted_parameter(modules[parent])
    return outermost(parent, modules) if inside else name


def fit_experts(base: Any) -> ExpertsForm | Declined | None:
    """Layout and activation that reproduce the module's gate, None where only its own will do, or why not."""
    if not hasattr(base, GATE):
        return Declined("not behind transformers' ExpertsInterface")
    if getattr(base, "has_post_expert_norm", False):
        return Declined("has a norm behind each expert")
    if not all(isinstance(getattr(base, name, None), nn.Parameter) for name in _names(base)):
        return Declined(f"has no {' and '.join(_names(base))}")
    first = getattr(base, _names(base)[0])
    width = first.shape[2 if base.is_transposed else 1]
    z = torch.randn((5, width), generator=torch.Generator().manual_seed(0)).to(first.device)
    layouts: tuple[MlpLayout, ...] = ("gate_up", "up_gate") if base.has_gate else ("plain",)
    with torch.no_grad():
        truth = _own_gate(base).forward([z], "gate_up", "silu")
        for layout in layouts:
            gate, up = split([z], layout)
            for activation in ACTIVATIONS:
                inner = activate(gate, activation)
                inner = inner if up is None else inner * up
                if inner.shape == truth.shape and distance(inner, truth) <= SAME_FORMULA:
                    return ExpertsForm(layout, activation)
    return None


class Routed(nn.Module):
    """Some of the experts with a routing made from the input: what is compared when experts are proven."""

    def __init__(self, experts: nn.Module, choices: int) -> None:
        super().__init__()
        self.experts = experts
        self.choices = choices

    def forward(self, x: Tensor) -> Tensor:
        """``x [rows, hidden]`` through distinct experts of each row, weighed by its first columns."""
        base: Any = self.experts
        while is_adapted_parameter(base):
            base = base.base_layer
        rows = torch.arange(x.shape[0], device=x.device)
        index = (7 * rows[:, None] + torch.arange(self.choices, device=x.device)) % base.num_experts
        routing = torch.softmax(x[:, : self.choices], dim=-1)
        if x.dtype == torch.float64:  # which the grouped products of torch refuse
            base.config._experts_implementation = "eager"
        return self.experts(x, index, routing)  # type: ignore[no-any-return]


class RoutedForward(InstanceForward):
    """``Routed`` through our experts, for the proof only."""

    def __init__(self, module: Any, form: ExpertsForm | None, tile_rows: int | None) -> None:
        super().__init__(module)
        self.inner = ExpertsForward(module.experts, form, tile_rows)

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """The result, with the instance forward of the experts in place for this call."""
        subject: Any = self.module
        object.__setattr__(subject.experts, "forward", self.inner)
        try:
            out = type(subject).forward(subject, *args)
        finally:
            del subject.experts.__dict__["forward"]
        return Declined(next(iter(self.inner.declined))) if self.inner.declined else out


def some_experts(module: nn.Module, count: int) -> nn.Module:
    """A copy with the first ``count`` experts; the others are not copied on the way."""
    memo: dict[int, Any] = {}
    layer: Any = module
    while is_adapted_parameter(layer):
        for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
            total = layer.num_experts
            memo[id(a.weight)] = _first(a.weight, a.weight.shape[0] // total * count)
            columns = b.weight.detach().view(b.weight.shape[0], -1, total)[..., :count]
            memo[id(b.weight)] = nn.Parameter(columns.flatten(1).clone(), b.weight.requires_grad)
        layer = layer.base_layer
    for p in layer.parameters(recurse=False):
        memo[id(p)] = _first(p, count)
    clone = copy.deepcopy(module, memo)
    parts: Any = clone.modules()
    for part in parts:
        if hasattr(part, "num_experts"):
            part.num_experts = count
    return clone


def _first(p: Tensor, count: int) -> nn.Parameter:
    return nn.Parameter(p.detach()[:count].clone(), p.requires_grad)
