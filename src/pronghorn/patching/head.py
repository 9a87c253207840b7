"""The output head: it returns deferred logits, so that the loss never needs the matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pronghorn.patching.deferred import DeferredLogits
from pronghorn.patching.forwards import NO_GRADIENT, Declined, InstanceForward

# Without gradients, defer only where the matrix would be large: generation asks for a few rows and uses them
# all.
EVALUATION_BYTES = 64 * 2**20


class HeadForward(InstanceForward):
    """The last linear; ``self.declined`` also counts which operations made the true logits after all."""

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """``x [..., H]`` alone, to deferred logits ``[..., V]``."""
        if len(args) != 1 or kwargs:
            return Declined("called with more than the hidden states")
        x: Tensor = args[0]
        head: Any = self.module
        weight, bias = head.weight, head.bias
        grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not grad and x.numel() // x.shape[-1] * weight.shape[0] * 4 <= EVALUATION_BYTES:
            return NO_GRADIENT
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if weight.dtype != x.dtype or weight.device != x.device:
            return Declined(f"{weight.dtype} head with {x.dtype} input")
        return DeferredLogits(x, weight, bias, (), self.declined)


def find_head(model: Any) -> nn.Module | Declined:
    """The linear that makes the logits, seen through PEFT's wrapper for fully trained modules."""
    head = model.get_output_embeddings()
    if head is None:
        return Declined("the model names no output embeddings")
    if hasattr(head, "modules_to_save") and hasattr(head, "active_adapter"):
        active = head.active_adapter
        names = [active] if isinstance(active, str) else list(active)
        if len(names) != 1 or names[0] not in head.modules_to_save:
            return Declined("the head has no single trained copy that is active")
        head = head.modules_to_save[names[0]]
    if type(head) is not nn.Linear:
        origin = type(head).__module__.partition(".")[0]
        return Declined(f"the head is a {type(head).__name__} of {origin}, whose logits cannot be deferred")
    return head


class HeadLoss(nn.Module):
    """The head followed by its loss: what is compared when the head is proven."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden [rows, H]`` to the mean loss on fixed labels, a seventh of them ignored."""
        labels = torch.arange(hidden.shape[-2], device=hidden.device) * 7919 % self.head.out_features
        labels[::7] = -100
        logits = self.head(hidden).float()
        return functional.cross_entropy(logits.view(-1, self.head.out_features), labels)


class HeadLossForward(InstanceForward):
    """``HeadLoss`` through deferred logits, for the proof only."""

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, with the head's instance forward in place for this call."""
        subject: Any = self.module
        inner = HeadForward(subject.head)
        object.__setattr__(subject.head, "forward", inner)
        try:
            loss = type(subject).forward(subject, *args)
        finally:
            del subject.head.__dict__["forward"]
        if inner.declined or not inner.calls:
            return Declined(f"the true logits were needed ({', '.join(inner.declined) or 'not deferred'})")
        return loss
