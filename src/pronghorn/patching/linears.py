"""Adapted linears outside the MLPs; those that receive one tensor (q, k, v) are computed together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.ops import select
from pronghorn.patching.adapted import lora_parts
from pronghorn.patching.forwards import NO_GRADIENT, Declined, InstanceForward


class Together:
    """The results the first linear of a group has computed for the others, until they ask for them."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.x: Tensor | None = None
        self.version = 0
        self.waiting: dict[int, Tensor] = {}

    def put(self, x: Tensor, outputs: tuple[Tensor, ...]) -> None:
        """Keep the results of all but the first module for this very input."""
        self.x, self.version = x, x._version
        self.waiting = dict(enumerate(outputs))
        del self.waiting[0]
        if not self.waiting:
            self.x = None

    def take(self, index: int, x: Tensor) -> Tensor | None:
        """The result of module ``index`` if ``x`` is the tensor it was made from, unchanged since."""
        if self.x is not x or self.version != x._version:
            return None
        out = self.waiting.pop(index, None)
        if not self.waiting:
            self.x = None
        return out

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without waiting results."""
        return {"modules": self.modules, "x": None, "version": 0, "waiting": {}}


class LinearForward(InstanceForward):
    """One adapted linear; the first of its group computes for all of them."""

    def __init__(self, module: nn.Module, index: int, together: Together) -> None:
        super().__init__(module)
        self.index = index
        self.together = together

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """``x [..., in]`` alone, the adapter in a state the fused form can express."""
        if len(args) != 1 or kwargs:
            return Declined("called with more than the hidden states")
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        x: Tensor = args[0]
        if self.index:
            ready = self.together.take(self.index, x)
            return ready if ready is not None else self._compute(x, [self.module])
        group = self.together.modules
        out = self._compute(x, group)
        if isinstance(out, Declined) and len(group) > 1:
            return self._compute(x, [self.module])
        return out

    def _compute(self, x: Tensor, modules: list[nn.Module]) -> Tensor | Declined:
        state = lora_parts(modules, x)
        if isinstance(state, Declined):
            return state
        outputs = select.lora_linears(*state)
        if self.index == 0 and len(modules) == len(self.together.modules):
            self.together.put(x, outputs)
        return outputs[0]


def group_forwards(modules: list[nn.Module]) -> list[InstanceForward]:
    """Forwards for linears that receive one tensor, in the order in which the model calls them."""
    together = Together(modules)
    return [LinearForward(module, index, together) for index, module in enumerate(modules)]
