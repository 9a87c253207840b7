"""The kernels in the form in which the ops take their arithmetic, and what each of them cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from pronghorn.ops import norm as _norm
from pronghorn.ops.graph import flat_rows, like_input
from pronghorn.ops.loss import LossPieces
from pronghorn.ops.mlp import GatedPieces
from pronghorn.ops.norm import NormPieces, Stats
from pronghorn.ops.packed import Packed, levels
from pronghorn.ops.reference import split
from pronghorn.ops.shapes import Activation, LogitStep, MlpLayout, NormForm
from pronghorn.ops.triton import cross_entropy, gated, nf4, norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# a program holds a row; the gate shows that one of this length spills nothing
NORM_COLUMNS = 16384
# 1024 rows of a 128k vocabulary in bfloat16; rows of whole 128-row tiles of the product
TILE_BYTES = 256 * 2**20
TILE_MULTIPLE = 128


def norm_declines(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Why the norm kernels cannot take these, or None."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} input"
    if x.shape[-1] > NORM_COLUMNS:
        return f"rows of {x.shape[-1]}, more than {NORM_COLUMNS}"
    if any(t is not None and t.shape != x.shape[-1:] for t in (weight, bias)):
        return "a weight that is not one vector of the length of a row"
    return None


def gated_declines(x: Tensor, layout: MlpLayout) -> str | None:
    """Why the gated kernels cannot take these, or None."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} input"
    return "an MLP without a gate" if layout == "plain" else None


def loss_declines(hidden: Tensor, chain: Sequence[LogitStep]) -> str | None:
    """Why the loss kernel cannot take these, or None."""
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} input"
    return "logit steps other than scale, softcap, scale" if fold(chain) is None else None


def nf4_declines(packed: Packed, out: Tensor) -> str | None:
    """Why the decode kernels cannot take this weight, or None."""
    if out.dtype not in DTYPES:
        return f"{out.dtype} output"
    return "an odd number of values" if out.numel() % 2 else None


def nf4_decode(packed: Packed, out: Tensor) -> Tensor:
    """See ``packed.decode``."""
    scales = packed.scales
    with _on(out):
        magnitudes = scales.codes.float()
        if scales.nested is not None:
            magnitudes = nf4.absmax_decode(
                scales.codes, scales.nested_table(), scales.nested, scales.offset, scales.nested_block
            )
        nf4.nf4_decode(packed.data.view(-1), magnitudes, levels(out.device), scales.block, out.view(-1))
    return out


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _rows(x: Tensor) -> Tensor:
    rows = flat_rows(x)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Stats]:
    with _on(x):
        y, root = norm.norm_forward(_rows(x), weight, bias, form)
    return like_input(y, x.shape), (root.view(*x.shape[:-1], 1),)


def _norm_output(
    x: Tensor, stats: Stats, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> Tensor:
    return _norm_forward(x, weight, bias, form)[0]


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    stats: Stats,
    weight: Tensor | None,
    bias: Tensor | None,
    form: NormForm,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx by the kernel; a weight or bias that trains, which adapters seldom have, by torch."""
    dx = dweight = dbias = None
    if needs[0]:
        with _on(x):
            dx = norm.norm_backward(_rows(dy), _rows(x), stats[0].view(-1), weight, form).view(x.shape)
    if any(needs[1:3]):
        known = (stats[0], x.float().mean(-1, keepdim=True)) if form.centered else stats
        _, dweight, dbias = _norm.backward(dy, x, known, weight, bias, form, (False, *needs[1:3]))
    return dx, dweight, dbias


def _gated_forward(outputs: Sequence[Tensor], layout: MlpLayout, activation: Activation) -> Tensor:
    gate, up = split(outputs, layout)
    assert up is not None
    with _on(gate):
        return gated.gated_forward(gate, up, activation)


def _gated_backward(
    dh: Tensor, outputs: Sequence[Tensor], layout: MlpLayout, activation: Activation, spent: bool
) -> list[Tensor]:
    """In place where the outputs are spent: the peak of a layer's backward is two ``[N, I]`` lower."""
    made = list(outputs) if spent else [torch.empty_like(t) for t in outputs]
    (gate, up), (dgate, dup) = split(outputs, layout), split(made, layout)
    assert up is not None and dup is not None
    with _on(gate):
        gated.gated_backward(_rows(dh), gate, up, dgate, dup, activation)
    return made


def fold(chain: Sequence[LogitStep]) -> tuple[float, float] | None:
    """(scale, softcap) of the kernel that equal the chain, or None. A tensor's value is not asked for.

    Casts to float32 are what the kernel does anyway; ``post * tanh(pre * z)`` is softcap ``post`` with scale
    ``pre * post``.
    """
    before, after, capped = 1.0, 1.0, False
    for kind, value in chain:
        if kind == "to" and value == torch.float32:
            continue
        if kind == "tanh" and not capped:
            capped = True
        elif kind in ("mul", "div") and isinstance(value, (int, float)):
            factor = float(value) if kind == "mul" else 1.0 / float(value)
            before, after = (before, after * factor) if capped else (before * factor, after)
        else:
            return None
    return (before * after, after) if capped else (before, 0.0)


def _loss_rows(
    raw: Tensor, labels: Tensor, chain: Sequence[LogitStep], ignore_index: int, need_grad: bool
) -> Tensor:
    folded = fold(chain)
    assert folded is not None
    scale, softcap = folded
    with _on(raw):
        loss, _ = cross_entropy.cross_entropy_(
            raw, labels, scale=scale, softcap=softcap, ignore_index=ignore_index, need_grad=need_grad
        )
    return loss.sum()


def _tile_rows(vocabulary: int, element_size: int) -> int:
    rows = max(1, TILE_BYTES // (vocabulary * element_size))
    return rows // TILE_MULTIPLE * TILE_MULTIPLE or rows


NORM = NormPieces(_norm_forward, _norm_output, _norm_backward)
GATED = GatedPieces(_gated_forward, _gated_backward)
LOSS = LossPieces(_loss_rows, compact=False, tile_rows=_tile_rows)
