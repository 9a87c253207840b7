"""MLPs: two or three linears and an activation, whose roles come out of their numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.ops import select
from pronghorn.ops.reference import activate, split
from pronghorn.ops.shapes import ACTIVATIONS, Activation, MlpLayout
from pronghorn.patching.adapted import linear_shape, lora_parts
from pronghorn.patching.forwards import NO_GRADIENT, Declined, InstanceForward
from pronghorn.patching.proof import distance, randomise
from pronghorn.quant.library import compute_in

# float32 results of the same formula in another order of operations differ by less; another formula by far
# more
SAME_FORMULA = 1e-5


@dataclass(frozen=True)
class MlpForm:
    """Which child plays which part."""

    first: tuple[str, ...]
    down: str
    layout: MlpLayout
    activation: Activation


class MlpForward(InstanceForward):
    """An MLP of known form, with or without adapters on its linears."""

    def __init__(self, module: nn.Module, form: MlpForm, tile_rows: int | None = None) -> None:
        super().__init__(module)
        self.form = form
        self.tile_rows = tile_rows

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """``x [..., hidden]`` alone, every linear in a state the fused form can express."""
        if len(args) != 1 or kwargs:
            return Declined("called with more than the hidden states")
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        children = [getattr(self.module, name) for name in (*self.form.first, self.form.down)]
        state = lora_parts(children, args[0])
        if isinstance(state, Declined):
            return state
        x, parts = state
        return select.mlp(
            x, parts[:-1], parts[-1], self.form.layout, self.form.activation, tile_rows=self.tile_rows
        )


def is_mlp(module: nn.Module) -> bool:
    """Whether ``module`` is worth a probe: it holds two or three linears, and nothing else has parameters."""
    linears = [child for child in module.children() if linear_shape(child)]
    others = [child for child in module.children() if not linear_shape(child)]
    return (
        len(linears) in (2, 3)
        and not list(module.parameters(recurse=False))
        and not any(True for child in others for _ in child.parameters())
        and any(_candidates(module))
    )


def odd_mlp(module: nn.Module) -> str | None:
    """Why something that is an MLP by name is not worth a probe, or None."""
    linears = [child for child in module.children() if getattr(child, "weight", None) is not None]
    if "mlp" not in type(module).__name__.lower() or len(linears) < 2 or is_mlp(module):
        return None
    odd = next((child for child in linears if not linear_shape(child)), None)
    if odd is not None and not isinstance(odd, nn.Linear):
        base = getattr(odd, "base_layer", odd)
        return f"has a {type(base).__name__} with weights of its own"
    others = list(module.parameters(recurse=False))
    others += [p for child in module.children() if not linear_shape(child) for p in child.parameters()]
    if others:
        return "has parameters besides those of its linears (a norm or a trained activation)"
    return f"has {len(linears)} linears whose shapes fit no layout"


def _candidates(module: nn.Module) -> list[tuple[tuple[str, ...], str, MlpLayout]]:
    """(first linears, down, layout) that the shapes allow."""
    shapes = {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}
    found: list[tuple[tuple[str, ...], str, MlpLayout]] = []
    for down, (inner, hidden) in shapes.items():
        rest = [name for name in shapes if name != down]
        widths = [shapes[name] for name in rest]
        if len(rest) == 2 and all(width == (hidden, inner) for width in widths):
            found += [((rest[0], rest[1]), down, "gated"), ((rest[1], rest[0]), down, "gated")]
        if len(rest) == 1 and widths[0] == (hidden, 2 * inner):
            found += [((rest[0],), down, "gate_up"), ((rest[0],), down, "up_gate")]
        if len(rest) == 1 and widths[0] == (hidden, inner):
            found.append(((rest[0],), down, "plain"))
    return found


def fit_mlp(module: nn.Module, shape: tuple[int, ...]) -> MlpForm | Declined:
    """The roles and activation that reproduce the module's numbers in train mode, or why none do."""
    clone = copy.deepcopy(module).float().train()
    compute_in(clone, torch.float32)
    randomise(clone)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 5, *shape[2:]) if len(shape) > 2 else (5, *shape[1:]), generator=generator)
    x = x.to(next(clone.parameters()).device)
    tried: list[tuple[float, MlpForm]] = []
    with torch.no_grad():
        try:
            truth = type(clone).forward(clone, x)
        except (TypeError, RuntimeError, AttributeError) as error:
            return Declined(f"cannot be called with hidden states alone ({type(error).__name__})")
        if not isinstance(truth, Tensor):
            return Declined("does not return one tensor")
        for first, down, layout in _candidates(module):
            if (linear_shape(getattr(clone, first[0])) or (0, 0))[0] != shape[-1]:
                continue
            gate, up = split([getattr(clone, name)(x) for name in first], layout)
            for activation in ACTIVATIONS:
                inner = activate(gate, activation)
                out = getattr(clone, down)(inner if up is None else inner * up)
                if out.shape == truth.shape:
                    tried.append((distance(out, truth), MlpForm(first, down, layout, activation)))
    if not tried:
        return Declined("no candidate has the shape of the result")
    off, form = min(tried, key=lambda pair: pair[0])
    if off > SAME_FORMULA:
        return Declined(f"no formula fits: best of {len(tried)} is {off:.1e} off, bound {SAME_FORMULA:.0e}")
    return form
