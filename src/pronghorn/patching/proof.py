"""Is a replacement as true as the original? Outputs and gradients, on the module itself, in train mode.

The truth is the original run in a wider dtype, a 4-bit weight being there what it decodes to. The replacement
may be no further from it than the original is in the dtype at hand, times ``SLACK``. Checks: randomised
weights in float32 and in bfloat16, then the module's own weights in its own dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.patching.forwards import InstanceForward
from pronghorn.quant.library import as_plain, compute_in, linears_4bit

SLACK = 1.5
# Below this a distance means nothing: modules that compute in float32 whatever their dtype leave a float64
# truth only 2e-6 good, and a single bfloat16 number (a loss) can be nearer to the truth by luck.
FLOOR = MappingProxyType({torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5})
ROWS = 33

Call = Callable[[Tensor], Any]
Build = Callable[[Any], list[InstanceForward]]


@dataclass(frozen=True)
class Verdict:
    """Outcome of the strictest check that was run: its name, the distance found and the distance allowed."""

    check: str
    figure: float
    bound: float
    declined: str = ""

    @property
    def passed(self) -> bool:
        """Whether the replacement may be used."""
        return not self.declined and self.figure <= self.bound

    def __str__(self) -> str:
        if self.declined:
            return self.declined
        return f"{self.check}: {self.figure:.1e} from the truth, bound {self.bound:.1e}"


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance; 0 for two zeros, infinite where something is not finite."""
    scale = float(truth.double().norm())
    error = float((value.double() - truth.double()).norm())
    if not error < float("inf"):
        return float("inf")
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))


def worst(
    check: str, ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], floor: float
) -> Verdict:
    """The verdict on the result that comes nearest to, or furthest over, its bound."""
    verdicts = []
    for index, (mine, peer, true) in enumerate(zip(ours, plain, truth, strict=True)):
        if mine.shape != peer.shape or mine.dtype != peer.dtype:
            return Verdict(f"{check}: result {index} has another shape or dtype", float("inf"), 0.0)
        verdicts.append(Verdict(check, distance(mine, true), SLACK * distance(peer, true) + floor))
    return max(verdicts, key=lambda v: v.figure / max(v.bound, 1e-30))


def prove(subject: nn.Module, build: Build, shape: tuple[int, ...], *, randomised: bool = True) -> Verdict:
    """Compare ``build(subject)`` with the subject's own forward on copies of it.

    Args:
        subject: a leaf, or an ``nn.ModuleList`` of leaves that receive one input.
        build: makes the replacements for a copy of the subject, one for each leaf.
        shape: of the input; its leading dimensions are replaced by ``[1, rows]`` where it has three or fewer.
        randomised: also check float32 and bfloat16 with randomised weights, not only the subject's own.
    """
    packed = (module.weight.quant_state.dtype for _, module in linears_4bit(subject))
    floating = (p.dtype for p in subject.parameters() if p.is_floating_point())
    own = next(chain(packed, floating), torch.float32)
    generic = "randomised weights"
    runs = [(f"{generic}, float32", torch.float32, True), (f"{generic}, bfloat16", torch.bfloat16, True)]
    last = (f"own weights, {own}".replace("torch.", ""), own, False)
    verdict = Verdict("", 0.0, 0.0)
    for name, dtype, random in [*runs, last] if randomised else [last]:
        verdict = _check(name, subject, build, shape, dtype, random, ROWS)
        if not verdict.passed and not verdict.declined:
            # a step such as relu's makes the error of few rows a matter of luck: decide on many
            verdict = _check(name, subject, build, shape, dtype, random, 8 * ROWS)
        if not verdict.passed:
            return verdict
    return verdict


def _check(
    name: str,
    subject: nn.Module,
    build: Build,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    random: bool,
    rows: int,
) -> Verdict:
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    base = _copy(subject, wide)
    compute_in(base, dtype)
    if random:
        randomise(base)
    full = (1, rows, *shape[2:]) if len(shape) >= 3 else (rows, *shape[1:])
    generator = torch.Generator().manual_seed(rows)
    device = next((p.device for p in subject.parameters()), torch.device("cpu"))
    x = (torch.randn(full, generator=generator, dtype=torch.float64) * 1.3 + 0.1).to(device)
    with as_plain(base, wide):
        truth = results(base, _original, x.to(wide), generator)
    narrow = base.to(dtype)
    plain = results(narrow, _original, x.to(dtype), generator)
    forwards = build(narrow)
    ours = results(narrow, lambda _: lambda x: _tuple([f(x) for f in forwards]), x.to(dtype), generator)
    refused = next((reason for f in forwards for reason in f.declined), "")
    if refused or not all(f.calls for f in forwards):
        return Verdict(name, 0.0, 0.0, declined=refused or "the replacement was not used")
    return worst(name, ours, plain, truth, FLOOR.get(dtype, 0.0))


def results(
    subject: nn.Module, call: Callable[[nn.Module], Call], x: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """Outputs, then the gradients of the input and of every trainable parameter, for one fixed output
    gradient.
    """
    generator.manual_seed(7)
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        outputs = _tuple(call(subject)(x))
        seeds = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
            for out in outputs
        ]
        leaves = [x, *(p for p in subject.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)
    ]


def _original(subject: nn.Module) -> Call:
    members = list(subject) if isinstance(subject, nn.ModuleList) else [subject]
    return lambda x: _tuple([type(member).forward(member, x) for member in members])


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _copy(subject: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in train mode without hooks or instance forwards: the class's own computation only."""
    clone = copy.deepcopy(subject).to(dtype).train()
    for module in clone.modules():
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_old_forward", None)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return clone


def randomise(module: nn.Module) -> None:
    """Generic weights: matrices of unit gain, vectors around 0.7, so that no factor is 1 and no term 0.

    4-bit weights get other codes under their own magnitudes.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_floating_point():
                codes = torch.randint(0, 256, parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.copy_(codes.to(parameter.device))
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            value = noise * 0.5 + 0.7 if parameter.dim() < 2 else noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value.to(parameter.device))
