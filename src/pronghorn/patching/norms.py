"""Norms: recognised by their numbers, replaced by one that saves only its input."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pronghorn.ops import select
from pronghorn.ops.reference import norm as plain_norm
from pronghorn.ops.shapes import NormForm
from pronghorn.patching.forwards import NO_GRADIENT, Declined, InstanceForward
from pronghorn.patching.proof import distance, randomise

# float32 results of the same formula in another order of operations differ by less; another formula by far
# more
SAME_FORMULA = 1e-5


class NormForward(InstanceForward):
    """A norm of known form."""

    def __init__(self, module: nn.Module, form: NormForm, names: tuple[str, ...], *, mixed: bool) -> None:
        super().__init__(module)
        self.form = form
        self.names = names
        self.mixed = mixed

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """``x [..., H]`` alone, in the dtype of the weight unless the mixed case was proven too."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return Declined("called with more than the hidden states")
        x = args[0]
        weight, bias = _weights(self.module, self.names)
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        if weight is not None and weight.dtype != x.dtype and not self.mixed:
            return Declined(f"{weight.dtype} weight with {x.dtype} input")
        if weight is not None and weight.device != x.device:
            return Declined("the weights are on another device than the input")
        if self.form.centered and torch.is_autocast_enabled(x.device.type):
            return Declined("autocast runs LayerNorm in float32")
        return select.norm(x, weight, bias, self.form)


def _weights(module: nn.Module, names: tuple[str, ...]) -> tuple[Tensor | None, Tensor | None]:
    found = [getattr(module, name) for name in names]
    return (found[0] if found else None), (found[1] if len(found) > 1 else None)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is worth a probe: at most two small parameters, no parameters below, an epsilon."""
    own = list(module.parameters(recurse=False))
    below = [p for child in module.children() for p in child.parameters()]
    return len(own) <= 2 and all(p.dim() <= 2 for p in own) and not below and bool(_epsilons(module))


def _epsilons(module: nn.Module) -> list[float]:
    return sorted({v for v in vars(module).values() if isinstance(v, float) and 0 < v <= 1e-2})


def looks_like_norm(module: nn.Module) -> bool:
    """Whether a person would call it a norm; such a module is reported even when it is not worth a probe."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def fit_norm(module: nn.Module, shape: tuple[int, ...]) -> tuple[NormForward, str] | Declined:
    """A forward for ``module`` whose form reproduces its numbers (yet to be proven), or why none does."""
    names = tuple(name for name, _ in module.named_parameters(recurse=False))
    clone = copy.deepcopy(module).float()
    randomise(clone)
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in clone.parameters()), torch.device("cpu"))
    x = (torch.randn((2, *shape[1:]), generator=generator) * 1.7 + 0.3).to(device)
    with torch.no_grad():
        try:
            truth = type(clone).forward(clone, x)
        except (TypeError, RuntimeError, AttributeError) as error:
            return Declined(f"cannot be called with hidden states alone ({type(error).__name__})")
        if not isinstance(truth, Tensor) or truth.shape != x.shape:
            return Declined("does not return a tensor of the shape of its input")
        weight, bias = _weights(clone, names)
        offsets = (0.0, 1.0) if weight is not None else (0.0,)
        tried = [
            (distance(plain_norm(x, weight, bias, form), truth), form)
            for eps, centered, offset in itertools.product(_epsilons(module), (False, True), offsets)
            for form in (NormForm(eps=eps, centered=centered, offset=offset, cast="late"),)
        ]
        off, form = min(tried, key=lambda pair: pair[0])
        if off > SAME_FORMULA:
            return Declined(
                f"no formula fits: best of {len(tried)} is {off:.1e} off, bound {SAME_FORMULA:.0e}"
            )
        form = _rounding(clone.bfloat16(), names, x.bfloat16(), form)
        mixed = _mixed(clone.float(), names, x.bfloat16(), form)
    return NormForward(module, form, names, mixed=mixed), str(form)


def _rounding(clone: nn.Module, names: tuple[str, ...], x: Tensor, form: NormForm) -> NormForm:
    """The place of the cast and the kind of root, from which bits come out in bfloat16."""
    truth = type(clone).forward(clone, x)
    weight, bias = _weights(clone, names)
    casts: tuple[Literal["early", "late"], ...] = ("early", "late")
    roots: tuple[Literal["rsqrt", "pow"], ...] = ("rsqrt", "pow")
    forms = [replace(form, cast=cast, root=root) for root in roots for cast in casts]
    return min(forms, key=lambda f: distance(plain_norm(x, weight, bias, f), truth))


def _mixed(clone: nn.Module, names: tuple[str, ...], x: Tensor, form: NormForm) -> bool:
    """Whether a float32 weight with a bfloat16 input gives the same dtype and values too."""
    try:
        truth = type(clone).forward(clone, x)
    except RuntimeError:
        return False
    ours = plain_norm(x, *_weights(clone, names), form)
    return ours.dtype == truth.dtype and torch.equal(ours, truth)
