"""What the ops are told: a linear with its adapter, the form of a norm, the layout of an MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from pronghorn.ops.buffer import PackedWeight

Activation = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "gelu", "relu", "relu2")

# gated: act(gate(x)) * up(x), two linears.  gate_up / up_gate: one linear whose output holds both halves.
# plain: act(first(x)), one linear.
MlpLayout = Literal["gated", "gate_up", "up_gate", "plain"]


class LoraPart(NamedTuple):
    """A frozen linear and its adapter: ``x @ weight.T + bias + scale * (x @ a.T) @ b.T``.

    ``weight [out, in]`` has the dtype of the computation, or is decoded to it; ``a [r, in]`` and
    ``b [out, r]`` may have another (they are cast for the product, never kept) or be None for a linear
    without an adapter.
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


class ExpertPart(NamedTuple):
    """One linear of every expert, stacked, and its adapter: for expert e ``x @ weight[e] + bias[e] + scale *
    (x @ a[e].T) @ b[e].T``.

    ``weight [E, in, out]`` may be a view of ``[E, out, in]``; ``bias [E, out]``, ``a [E, r, in]`` and ``b [E,
    out, r]`` may be None. Dtypes as in :class:`LoraPart`.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


@dataclass(frozen=True, kw_only=True)
class NormForm:
    """The exact arithmetic of a norm over the last dimension, computed in float32.

    ``unit = (x - mean) * root(var + eps)`` where the mean is subtracted only if ``centered``;
    cast "early": ``(offset + weight) * unit.to(x.dtype) + bias``; cast "late": the same in float32, cast at
    the end.
    """

    eps: float
    centered: bool = False
    offset: float = 0.0
    cast: Literal["early", "late"] = "early"
    root: Literal["rsqrt", "pow"] = "rsqrt"


class LogitStep(NamedTuple):
    """One elementwise step between the head's product and the loss; ``to`` carries a dtype."""

    kind: Literal["mul", "div", "tanh", "to"]
    value: object = None


@dataclass(frozen=True, kw_only=True)
class RopeForm:
    """How a rotary embedding pairs dimensions and reads its table.

    halves: dimension i turns with i + W/2; interleaved: 2i with 2i + 1. ``half_table``: both of pair i read
    entry i of cos and sin; else each reads the entry of its own position.
    """

    pairs: Literal["halves", "interleaved"] = "halves"
    half_table: bool = False
