"""The only dispatch: which implementation of an op runs for a tensor.

Today every device runs the hand-derived forms; where nothing will be differentiated the plain ones are as
good and save nothing either. A kernel for one kind of device gets its line here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pronghorn.ops import lora as _lora
from pronghorn.ops import loss as _loss
from pronghorn.ops import mlp as _mlp
from pronghorn.ops import norm as _norm
from pronghorn.ops import reference
from pronghorn.ops.graph import grad_needed
from pronghorn.ops.shapes import Activation, LoraPart, MlpLayout, NormForm

linear_cross_entropy = _loss.linear_cross_entropy
log_prob = _loss.log_prob


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm) -> Tensor:
    """See ``reference.norm``."""
    fast = grad_needed(x, weight, bias)
    return (_norm.norm if fast else reference.norm)(x, weight, bias, form)


def lora_linears(x: Tensor, parts: Sequence[LoraPart]) -> tuple[Tensor, ...]:
    """See ``reference.lora_linears``."""
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
) -> Tensor:
    """See ``reference.mlp``; ``tile_rows`` bounds the tokens at a time and keeps nothing but the input."""
    if tile_rows is not None:
        return _mlp.tiled_mlp(x, first, down, layout, activation, tile_rows)
    fast = grad_needed(x, *_lora.flatten([*first, down]))
    return (_mlp.mlp if fast else reference.mlp)(x, first, down, layout, activation)
