"""An instance forward on a leaf module, and how it is put on and taken off.

The forward is an object that refers to its module: ``copy.deepcopy`` and ``pickle`` then carry both over
together, where a closure would keep computing with the module it was made for. What it cannot take it hands
to ``type(module).forward``, call by call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Declined(str):
    """Why a call runs the original forward."""


NO_GRADIENT = Declined("nothing to differentiate")


class InstanceForward:
    """Base of the replacements: ``fast`` answers a call or declines it with a reason, which is counted."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.enabled = True
        self.calls = 0
        self.declined: dict[str, int] = {}

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement's result, or a :class:`Declined`."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module, in place of ``type(module).forward``."""
        if self.enabled and not torch.compiler.is_compiling():
            result = self.fast(*args, **kwargs)
            if not isinstance(result, Declined):
                self.calls += 1
                return result
            if result is not NO_GRADIENT:
                self.declined[str(result)] = self.declined.get(str(result), 0) + 1
        return type(self.module).forward(self.module, *args, **kwargs)


def blocked(module: nn.Module) -> str | None:
    """Why no instance forward can be put on ``module``, or None."""
    there = module.__dict__.get(_slot(module))
    if there is None or isinstance(there, InstanceForward) or _slot(module) == "_old_forward":
        return None
    return f"another library has set its forward ({getattr(there, '__qualname__', type(there).__name__)})"


def install(forward: InstanceForward) -> None:
    """Make ``forward`` the module's own; below an accelerate hook if there is one, so that the hook keeps
    working.
    """
    object.__setattr__(forward.module, _slot(forward.module), forward)


def remove(forward: InstanceForward) -> None:
    """Give the module its class forward back, also where another library has wrapped ours meanwhile."""
    forward.enabled = False
    for slot in ("forward", "_old_forward"):
        if forward.module.__dict__.get(slot) is forward:
            if slot == "forward":
                del forward.module.__dict__[slot]
            else:
                original = type(forward.module).forward.__get__(forward.module)
                object.__setattr__(forward.module, slot, original)


def _slot(module: nn.Module) -> str:
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` would run anything besides its forward, which a fused parent would skip."""
    foreign = module.__dict__.get("forward")
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (foreign is not None and not isinstance(foreign, InstanceForward))
    )
