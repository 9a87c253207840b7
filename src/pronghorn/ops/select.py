"""The only dispatch: which implementation of an op runs for a tensor.

On CUDA tensors with Triton installed, and a chip for which they are known to compile, its kernels do the
arithmetic between the products wherever they can take the op's form; everywhere else torch does. Where
nothing will be differentiated the plain forms are as good and save nothing either. ``using`` makes the choice
explicit: what cannot be done that way is refused, never done another way.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from pronghorn.errors import NotSupportedError
from pronghorn.ops import experts as _experts
from pronghorn.ops import library, reference
from pronghorn.ops import lora as _lora
from pronghorn.ops import loss as _loss
from pronghorn.ops import mlp as _mlp
from pronghorn.ops import norm as _norm
from pronghorn.ops.experts import ExpertsForm
from pronghorn.ops.graph import grad_needed
from pronghorn.ops.packed import Packed, decode
from pronghorn.ops.shapes import Activation, ExpertPart, LogitStep, LoraPart, MlpLayout, NormForm

Backend = Literal["torch", "triton"]

log_prob = _loss.log_prob


@lru_cache
def _kernels() -> Any:
    """The module of kernels, or None without Triton. Imported by the first op that could use it."""
    if importlib.util.find_spec("triton") is None:
        return None
    from pronghorn.ops.triton import pieces

    return pieces


@lru_cache
def _compiled_for(device: torch.device) -> bool:
    """Whether the table of compiled kernels begins no later than with this chip (Ampere, and AMD's gfx9)."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _choose(using: Backend | None, op: str, x: Tensor) -> Any:
    """The module of kernels where it is asked for or belongs to the device of ``x``, else None.

    Raises:
        NotSupportedError: it is asked for and cannot run here.
    """
    if using == "torch" or (using is None and not (x.is_cuda and _compiled_for(x.device))):
        return None
    kernels = _kernels()
    if using == "triton":
        if kernels is None:
            raise _refused(op, "Triton is not installed")
        if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise _refused(op, f"the input is on {x.device}, and Triton is not interpreting")
    return kernels


def _refused(op: str, why: str) -> NotSupportedError:
    return NotSupportedError(
        f"{op} using='triton': {why}", fix="leave the choice open, or ask for using='torch'"
    )


def _take(kernels: Any, using: Backend | None, op: str, why_not: str | None) -> bool:
    """Whether the kernels do it.

    Raises:
        NotSupportedError: they are asked for and decline.
    """
    if kernels is not None and using == "triton" and why_not is not None:
        raise _refused(op, f"the kernels do not take {why_not}")
    return kernels is not None and why_not is None


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
    *,
    using: Backend | None = None,
) -> Tensor:
    """See ``reference.norm``."""
    if using is None and not grad_needed(x, weight, bias):
        return reference.norm(x, weight, bias, form)
    kernels = _choose(using, "norm", x)
    ours = kernels and _take(kernels, using, "norm", kernels.norm_declines(x, weight, bias))
    return _norm.norm(x, weight, bias, form, kernels.NORM if ours else _norm.TORCH)


def lora_linears(x: Tensor, parts: Sequence[LoraPart]) -> tuple[Tensor, ...]:
    """See ``reference.lora_linears``. Products only: every device's own library does them best."""
    fast = grad_needed(x, *_lora.flatten(parts))
    return (_lora.lora_linears if fast else reference.lora_linears)(x, parts)


def mlp(
    x: Tensor,
    first: Sequence[LoraPart],
    down: LoraPart,
    layout: MlpLayout,
    activation: Activation,
    *,
    tile_rows: int | None = None,
    using: Backend | None = None,
) -> Tensor:
    """See ``reference.mlp``; ``tile_rows`` bounds the tokens at a time and keeps nothing but the input."""
    open_choice = using is None and tile_rows is None
    if open_choice and not grad_needed(x, *_lora.flatten([*first, down])):
        return reference.mlp(x, first, down, layout, activation)
    kernels = _choose(using, "mlp", x)
    ours = kernels and _take(kernels, using, "mlp", kernels.gated_declines(x, layout))
    pieces = kernels.GATED if ours else _mlp.TORCH
    if tile_rows is not None:
        return _mlp.tiled_mlp(x, first, down, layout, activation, tile_rows, pieces)
    return _mlp.mlp(x, first, down, layout, activation, pieces)


def experts(
    x: Tensor,
    index: Tensor,
    routing: Tensor,
    first: ExpertPart,
    down: ExpertPart,
    form: ExpertsForm,
    *,
    tile_rows: int | None = None,
    using: Backend | None = None,
) -> Tensor:
    """See ``reference.experts``; ``tile_rows`` bounds the tokens at a time and keeps only the input."""
    if form.pieces is None:
        kernels = _choose(using, "experts", x)
        ours = kernels and _take(kernels, using, "experts", kernels.gated_declines(x, form.layout))
        form = replace(form, pieces=kernels.GATED if ours else _mlp.TORCH)
    return _experts.experts(x, index, routing, first, down, form, tile_rows)


def nf4_decode(
    packed: Packed, out: Tensor, *, using: Backend | Literal["bitsandbytes"] | None = None
) -> Tensor:
    """See ``packed.decode``; on a CPU by bitsandbytes' kernel where that is right, by torch elsewhere."""
    if using == "bitsandbytes" or (using is None and packed.data.is_cpu):
        why_not = library.declines(packed, out)
        if why_not is None:
            return library.nf4_decode(packed, out)
        if using is not None:
            raise NotSupportedError(
                f"nf4_decode using='bitsandbytes': it does not take {why_not}",
                fix="leave the choice open, or ask for using='torch'",
            )
    kernels = _choose(using, "nf4_decode", packed.data)
    ours = kernels and _take(kernels, using, "nf4_decode", kernels.nf4_declines(packed, out))
    return kernels.nf4_decode(packed, out) if ours else decode(packed, out)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chain: Sequence[LogitStep] = (),
    ignore_index: int = -100,
    mean: bool = True,
    using: Backend | None = None,
) -> Tensor:
    """See ``reference.linear_cross_entropy``."""
    kernels = _choose(using, "linear_cross_entropy", hidden)
    why_not = kernels and kernels.loss_declines(hidden, chain)
    ours = _take(kernels, using, "linear_cross_entropy", why_not)
    return _loss.linear_cross_entropy(
        hidden, weight, bias, labels, chain=chain, ignore_index=ignore_index, mean=mean,
        pieces=kernels.LOSS if ours else _loss.TORCH,
    )  # fmt: skip
