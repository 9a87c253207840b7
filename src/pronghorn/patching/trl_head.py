"""TRL's fused head (trl >= 1.15) with the unit-gradient loss, on one model.

TRL puts a ``forward`` of its own on the model, which projects through the head in tiles and makes the logits
again in backward. With a frozen head that third product is not needed. The model gets the same function once
more, with one name of its module seen differently: where it asks for the chunked log-probability, it gets
ours. TRL's module is not touched, and everything TRL does around that call stays TRL's.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from pronghorn.adapters.origin import base_of
from pronghorn.ops import select
from pronghorn.ops.shapes import LogitStep
from pronghorn.patching.proof import distance
from pronghorn.patching.trace import sample_batch, train_mode

FUNCTION = "_ChunkedLogProbFunction"
OUTPUTS = frozenset({"log_probs", "entropy", "is_top1"})
# two orders of summation of one float32 expression
BOUND = 1e-4
BOUND_NARROW = 2e-2


class UnitGradient:
    """Takes the place of TRL's autograd function in that one forward; hands on what it cannot do."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        *settings: Any,
    ) -> Any:
        """``hidden [N, H]``; ``settings``: temperature, chunk size, soft cap, logit scale, wanted outputs."""
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trained or len(settings) != 5 or not set(settings[4]) <= OUTPUTS:
            return self.original.apply(hidden, weight, bias, targets, *settings)
        temperature, _, softcap, scale, outputs = settings
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        logp, entropy, top = select.log_prob(
            hidden.to(dtype),
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets,
            chain=_chain(temperature, softcap, scale),
        )
        wanted = set(outputs)
        return (
            logp,
            entropy if "entropy" in wanted else None,
            None,
            None,
            top if "is_top1" in wanted else None,
        )


def _chain(temperature: float, softcap: float | None, scale: float) -> list[LogitStep]:
    steps = [LogitStep("to", torch.float32)]
    if scale != 1.0:
        steps.append(LogitStep("mul", scale))
    if softcap is not None:
        steps += [LogitStep("div", softcap), LogitStep("tanh"), LogitStep("mul", softcap)]
    if temperature != 1.0:
        steps.append(LogitStep("div", temperature))
    return steps


def fuse_trl_head(model: Any) -> str:
    """Give a model that TRL has prepared the unit-gradient loss; call it after the trainer is built.

    Returns:
        What was done, with the figures of the check, or why the model was left as TRL prepared it.
    """
    base = base_of(model)
    theirs = base.__dict__.get("forward")
    ours = _with_unit_gradient(base)
    if isinstance(ours, str):
        return ours
    plain = _results(base)
    object.__setattr__(base, "forward", ours)
    off = max(distance(mine, true) for mine, true in zip(_results(base), plain, strict=True))
    bound = BOUND if next(base.parameters()).dtype == torch.float32 else BOUND_NARROW
    if off > bound:
        object.__setattr__(base, "forward", theirs)
        return f"left: results are {off:.1e} from TRL's, bound {bound:.0e}"
    return f"replaced: {len(plain)} results within {off:.1e} of TRL's, bound {bound:.0e}"


def assume_unit_gradient(model: Any) -> None:
    """``fuse_trl_head`` without its proof, for a model of shapes only."""
    base = base_of(model)
    ours = _with_unit_gradient(base)
    if not isinstance(ours, str):
        object.__setattr__(base, "forward", ours)


def _with_unit_gradient(base: Any) -> types.MethodType | str:
    """TRL's forward once more with our function in it, or why there is none."""
    theirs = base.__dict__.get("forward")
    function = getattr(theirs, "__func__", None)
    if not isinstance(function, types.FunctionType) or FUNCTION not in function.__code__.co_names:
        return "left: TRL has not put a fused head on this model"
    if isinstance(function.__globals__.get(FUNCTION), UnitGradient):
        return "left: the unit-gradient loss is there already"
    names = {**function.__globals__, FUNCTION: UnitGradient(function.__globals__[FUNCTION])}
    ours = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    ours.__kwdefaults__ = function.__kwdefaults__
    ours.__wrapped__ = getattr(function, "__wrapped__", function)  # type: ignore[attr-defined]
    return types.MethodType(ours, base)


def _results(base: Any) -> list[Tensor]:
    """Loss, log-probabilities and every trainable gradient of one batch."""
    batch = sample_batch(base, rows=2, tokens=25)
    batch["labels"][:, :5] = -100
    leaves = [p for p in base.parameters() if p.requires_grad]
    with torch.enable_grad(), train_mode(base):
        torch.manual_seed(1)
        out = base(**batch, fused_lm_head=True)
        grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    return [out.loss.detach(), out.log_probs.detach(), *(g for g in grads if g is not None)]
