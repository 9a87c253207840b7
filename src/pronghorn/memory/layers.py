"""Recompute of decoder layers through transformers' own switch, with our function behind it.

transformers calls ``layer._gradient_checkpointing_func(forward, *inputs)`` for each layer. Ours is non-
reentrant, may move the layer's input to host memory, and decides layer by layer: with a byte budget the first
layers are recomputed and the rest kept. A trainer that switches checkpointing on again goes through the same
instance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pronghorn.errors import ConfigError
from pronghorn.hardware import free_host_bytes
from pronghorn.memory import recompute
from pronghorn.memory.counter import saved_bytes
from pronghorn.memory.offload import Offload

Mode = Literal["full", "unsloth", "auto"]
MODES: tuple[Mode, ...] = ("full", "unsloth", "auto")
# the method that every supported transformers calls, or forwards to, when it is set on the instance
OVERRIDDEN = "gradient_checkpointing_enable"
# what transformers sets on each module that it can recompute
SWITCH = ("gradient_checkpointing", "_gradient_checkpointing_func")
# of what is free when the run begins; the rest is for the loss, the optimizer and fragmentation
BUDGET_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class RecomputePlan:
    """What a layer keeps, per token, and what all of them may keep together."""

    mode: Mode
    layers: int
    kept_bytes: int = 0
    """saved for backward by one layer for one token when nothing is recomputed"""
    input_bytes: int = 0
    """the same when the layer is recomputed: its input"""
    budget_bytes: int = 0

    def recomputed(self, tokens: int) -> int:
        """How many layers, from the first, are recomputed for a batch of ``tokens``."""
        if self.mode != "auto":
            return self.layers
        for count in range(self.layers + 1):
            # while a layer is recomputed, it holds what a kept one holds
            kept = self.layers - count + (1 if count else 0)
            if tokens * (count * self.input_bytes + kept * self.kept_bytes) <= self.budget_bytes:
                return count
        return self.layers


class LayerFunction:
    """Stands behind one layer's ``_gradient_checkpointing_func``."""

    def __init__(self, plan: RecomputePlan, index: int, offload: Offload) -> None:
        self.plan = plan
        self.index = index
        self.offload = offload

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the layer: kept, or recomputed in backward."""
        states = next((a for a in args if isinstance(a, Tensor) and a.dim() > 1), None)
        tokens = 0 if states is None else states.numel() // states.shape[-1]
        if states is not None and self.index >= self.plan.recomputed(tokens):
            return function(*args, **kwargs)
        if self.plan.mode != "unsloth":
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self.offload.to_host, self.offload.from_host):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)


class RecomputeSwitch:
    """The instance override of ``gradient_checkpointing_enable``, and the way back."""

    kind = "recompute"

    def __init__(self, model: Any, plan: RecomputePlan) -> None:
        self.model = model
        self.plan = plan
        self.inputs_hooked = recompute.inputs_hooked(model)
        self.before = [(module, _own(module)) for module in model.modules() if hasattr(module, SWITCH[0])]

    def __call__(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """What transformers and trainers call; ours is always non-reentrant, whatever they ask for."""
        # the stock switch would come back to this override as long as it is there
        overridden = self.model.__dict__.pop(OVERRIDDEN, None)
        try:
            recompute.enable(self.model)
        finally:
            if overridden is not None:
                object.__setattr__(self.model, OVERRIDDEN, overridden)
        offload = Offload()
        for index, layer in enumerate(layers_of(self.model)):
            layer._gradient_checkpointing_func = LayerFunction(self.plan, index, offload)

    def on(self) -> None:
        """Recompute from now on."""
        object.__setattr__(self.model, OVERRIDDEN, self)
        self()

    def off(self) -> None:
        """Keep or recompute as before."""
        self.model.__dict__.pop(OVERRIDDEN, None)
        recompute.disable(self.model)
        if not self.inputs_hooked:
            recompute.unhook_inputs(self.model)
        for module, own in self.before:
            for name in SWITCH:
                module.__dict__.pop(name, None)
            module.__dict__.update(own)


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__[name] for name in SWITCH if name in module.__dict__}


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that transformers can recompute, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def make_plan(model: Any, mode: str, run: Callable[[int], Any], budget_bytes: int | None) -> RecomputePlan:
    """The plan for a model; "auto" measures what its layers save.

    Args:
        model: a transformers model, as it will train (after patching).
        mode: "full", "unsloth" (layer inputs in host memory) or "auto".
        run: makes the loss for a batch of so many tokens, with its graph.
        budget_bytes: for "auto", what all layers may keep together; by default half of the free memory.

    Raises:
        ConfigError: an unknown mode, or a model without layers that can be recomputed.
    """
    layers = len(layers_of(model))
    if mode not in MODES:
        raise ConfigError(f"recompute={mode!r}: unknown", fix=f"choose from {', '.join(MODES)}")
    if not layers:
        raise ConfigError(f"recompute={mode!r}: {type(model).__name__} has no layers that can be recomputed")
    if mode != "auto":
        return RecomputePlan(mode="unsloth" if mode == "unsloth" else "full", layers=layers)
    weight = model.get_input_embeddings().weight
    budget = free_bytes(weight.device) * BUDGET_SHARE if budget_bytes is None else budget_bytes
    few, many = (saved_bytes(model, partial(run, tokens)) for tokens in (64, 192))
    return RecomputePlan(
        mode="auto",
        layers=layers,
        kept_bytes=-(-(many - few) // (128 * layers)),
        input_bytes=weight.shape[1] * weight.element_size(),
        budget_bytes=int(budget),
    )


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()
