"""A linear layer in NF4 without bitsandbytes: what pronghorn's own 4-bit rows are measured on.

It keeps its weight under the names that bitsandbytes' layer has, which is all the fast path asks for; its own
forward decodes anew in forward and backward, as that layer's does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.ops import select
from pronghorn.ops.packed import Packed, decode
from pronghorn.quant import nf4
from pronghorn.quant.library import packed_of


class Codes(nn.Parameter):
    """The packed bytes; copies keep what is needed to decode them."""

    quant_state: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Codes:
        made = Codes(self.data.clone(), requires_grad=False)
        made.quant_state = copy.deepcopy(self.quant_state, memo)
        return made


class PackedLinear(nn.Linear):
    """``nn.Linear`` with its weight in NF4."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        packed = nf4.encode(linear.weight.data)
        self.bias = linear.bias
        self.compute_dtype: torch.dtype | None = None
        self.weight = Codes(packed.data, requires_grad=False)
        scales = packed.scales
        nested = SimpleNamespace(
            absmax=scales.nested, code=scales.nested_table(), blocksize=scales.nested_block
        )
        self.weight.quant_state = SimpleNamespace(
            absmax=scales.codes, offset=scales.offset, nested=True, state2=nested, blocksize=scales.block,
            quant_type="nf4", shape=packed.shape, dtype=packed.dtype,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        packed = packed_of(self)
        assert isinstance(packed, Packed)
        y: Tensor = _Product.apply(x, packed)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return nn.functional.linear(x, _decoded(packed, x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ _decoded(ctx.packed, dy), None


def _decoded(packed: Packed, like: Tensor) -> Tensor:
    return select.nf4_decode(packed, torch.empty(packed.shape, dtype=like.dtype, device=like.device))


def round_to_nf4(linear: nn.Linear) -> nn.Linear:
    """The same layer in 16-bit, its weight what NF4 makes of it: what every 4-bit row must agree with."""
    linear.weight.data.copy_(decode(nf4.encode(linear.weight.data)))
    return linear


def by_bitsandbytes(linear: nn.Linear) -> nn.Module:
    """The library's own layer."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, device = linear.weight.dtype, linear.weight.device
    made = Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
    )
    made.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(device)
    made.bias = linear.bias
    made.support_avx512bf16_for_cpu = False
    return made


def convert(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """Replace every linear but the head, one after the other."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, make(child))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the 16-bit weights are gone, and are no part of what is measured
    return model
