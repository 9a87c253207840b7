"""Cross entropy and log-probabilities through a head without ever holding the logits of all tokens.

With a frozen head the gradient of a row's loss depends on that row alone, so it is made in the forward, while
the row's logits are there: two products with the head instead of three, and backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pronghorn.ops.graph import is_fake, record
from pronghorn.ops.reference import apply_step
from pronghorn.ops.shapes import LogitStep

# No tensor of the loss is larger: 128 float32 rows, or 256 bfloat16 rows, of a 128k vocabulary.
TILE_BYTES = 64 * 2**20


class LossPieces(NamedTuple):
    """How the arithmetic on a tile of logits is done: by torch, or by the kernels of one kind of device."""

    rows: Callable[[Tensor, Tensor, Sequence[LogitStep], int, bool], Tensor]
    """(``raw [rows, V]``, labels, chain, ignore_index, whether gradients are needed) to the summed loss; raw
    becomes the gradient of that sum"""
    compact: bool
    """Ignored labels are dropped before the product. Their number decides shapes, so a device has to be
    waited for; otherwise they are computed and count nothing."""
    tile_rows: Callable[[int, int], int]
    """(vocabulary, bytes of an element) to rows of a tile"""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chain: Sequence[LogitStep] = (),
    ignore_index: int = -100,
    mean: bool = True,
    pieces: LossPieces | None = None,
) -> Tensor:
    """``reference.linear_cross_entropy`` in tiles: ``hidden [N, H]``, ``weight [V, H]``, ``labels [N]`` to a
    scalar.

    Where every label is ignored the loss is 0 and so are the gradients.
    """
    how = _How(tuple(chain), ignore_index, mean, pieces or TORCH)
    loss: Tensor = record(_CrossEntropy, hidden, weight, bias, labels, how)
    return loss


def log_prob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chain: Sequence[LogitStep] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.log_prob`` in tiles, head frozen: log-probability, entropy (float32) and whether the label
    is the most likely token (bool) of each row, ``[N]``.

    Raises:
        ValueError: the head trains; its gradient needs the third product, which this form leaves out.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("log_prob needs a frozen head: weight or bias requires a gradient")
    logp, entropy, top = record(_LogProb, hidden, weight, bias, labels, tuple(chain))
    return logp, entropy, top


def _tile_rows(vocabulary: int, element_size: int) -> int:
    return max(1, TILE_BYTES // (vocabulary * element_size))


def _tiles(rows: int, vocabulary: int, element_size: int) -> Iterator[slice]:
    return _cut(rows, _tile_rows(vocabulary, element_size))


def _cut(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _through_chain(z: Tensor, chain: Sequence[LogitStep]) -> tuple[Tensor, list[Callable[[Tensor], Tensor]]]:
    """(the chain's value, its backward steps in order of use)."""
    steps: list[Callable[[Tensor], Tensor]] = []
    for step in chain:
        z = apply_step(z, step)
        if step.kind != "to":
            steps.append(partial(_step_backward, step=step, value=z if step.kind == "tanh" else None))
    return z, steps[::-1]


def _step_backward(g: Tensor, step: LogitStep, value: Tensor | None) -> Tensor:
    """The float32 gradient ``g`` of a step's output, turned in place into that of its input."""
    if value is not None:
        return g.mul_(1 - value.float().square())
    assert isinstance(step.value, (int, float, Tensor))
    return g.mul_(step.value) if step.kind == "mul" else g.div_(step.value)


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """(float32 probabilities, float32 logsumexp of each row) in one pass over the logits.

    The largest probability gives the logsumexp back: max z - log max p, so no second exponential pass is
    needed.
    """
    p = torch.softmax(z, dim=-1, dtype=torch.float32)
    return p, z.amax(-1).float() - p.amax(-1).log()


class _How(NamedTuple):
    chain: tuple[LogitStep, ...]
    ignore_index: int
    mean: bool
    pieces: LossPieces


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        how: _How,
    ) -> Tensor:
        chain, ignore_index, mean, pieces = how
        counted = labels != ignore_index
        kept = _rows_of(counted) if pieces.compact else None
        scale, late = 1.0, None  # the mean's factor: now where the count is known here, else at the end
        if mean and kept is not None:
            scale = 1.0 / max(kept.numel(), 1)
        elif mean:
            late = counted.sum().clamp(min=1).float().reciprocal()
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grads = (
            torch.zeros_like(hidden) if need_hidden else None,
            torch.zeros_like(weight, dtype=torch.float32) if need_weight else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and need_bias else None,
        )
        loss = hidden.new_zeros((), dtype=torch.float32)
        for tile in _cut(
            len(labels) if kept is None else kept.numel(),
            pieces.tile_rows(weight.shape[0], hidden.element_size()),
        ):
            here, targets, put = _take(hidden, labels, tile if kept is None else kept[tile])
            raw = functional.linear(here, weight, bias)
            loss += pieces.rows(raw, targets, chain, ignore_index, any(ctx.needs_input_grad[:3]))
            if grads[0] is not None:
                part = raw @ weight
                put(grads[0], part if scale == 1.0 else part.mul_(scale))
            if grads[1] is not None:
                grads[1].addmm_(raw.t().float(), here.float(), alpha=scale)
            if grads[2] is not None:
                grads[2].add_(raw.float().sum(0), alpha=scale)
            del raw  # else it would be alive beside the next tile's
        ctx.save_for_backward(*(g for g in grads if g is not None), *([] if late is None else [late]))
        ctx.have, ctx.dtype = [g is not None for g in grads], weight.dtype
        return loss.mul_(scale) if late is None else loss.mul_(late)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        made = list(ctx.saved_tensors)
        if len(made) > sum(ctx.have):
            dloss = dloss * made.pop()
        rest = iter(made)
        grads = [(next(rest) * dloss).to(ctx.dtype) if have else None for have in ctx.have]
        return (*grads, None, None)


def _rows_of(counted: Tensor) -> Tensor:
    """The indices of the rows that count; of a tensor of shapes only, all of them."""
    if is_fake(counted):
        return torch.arange(len(counted), device=counted.device)
    return counted.nonzero().squeeze(1)


def _take(
    hidden: Tensor, labels: Tensor, rows: Tensor | slice
) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Any]]:
    """(hidden states, labels) of these rows, and how to put their gradient in its place."""
    if isinstance(rows, slice):
        return hidden[rows], labels[rows], lambda total, part: total[rows].copy_(part)
    put = partial(_put, rows=rows)
    return hidden.index_select(0, rows), labels.index_select(0, rows), put


def _put(total: Tensor, part: Tensor, rows: Tensor) -> None:
    total.index_copy_(0, rows, part)


def _rows_loss(
    raw: Tensor, labels: Tensor, chain: Sequence[LogitStep], ignore_index: int, need_grad: bool
) -> Tensor:
    """The ``rows`` of ``LossPieces`` by torch, which never sees an ignored label."""
    total = raw.new_zeros((), dtype=torch.float32)
    # float32 logits and their probabilities are alive together
    for tile in _tiles(raw.shape[0], raw.shape[1], 2 * torch.float32.itemsize):
        z, backward_steps = _through_chain(raw[tile], chain)
        p, lse = _softmax(z)
        here = labels[tile][:, None]
        total += (lse - z.gather(1, here).squeeze(1).float()).sum()
        if need_grad:
            p.scatter_add_(1, here, p.new_full((len(here), 1), -1.0))
            for step in backward_steps:
                p = step(p)
            raw[tile] = p
        del z, p
    return total


TORCH = LossPieces(_rows_loss, compact=True, tile_rows=_tile_rows)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chain: tuple[LogitStep, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        logp, entropy = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))
        top = torch.empty_like(labels, dtype=torch.bool)
        unit = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for tile in _tiles(len(hidden), weight.shape[0], torch.float32.itemsize):
            raw = functional.linear(hidden[tile], weight, bias)
            z, backward_steps = _through_chain(raw, chain)
            p, lse = _softmax(z)
            here = labels[tile][:, None]
            logp[tile] = z.gather(1, here).squeeze(1).float() - lse
            top[tile] = z.argmax(-1) == labels[tile]
            entropy[tile] = lse - torch.linalg.vecdot(p, z.float())
            if unit is not None:
                p.neg_().scatter_add_(1, here, p.new_ones((len(here), 1)))
                for step in backward_steps:
                    p = step(p)
                unit[tile] = raw.copy_(p) @ weight
            del raw, z, p
        if unit is not None:
            ctx.save_for_backward(hidden, unit, entropy.detach())
        ctx.head, ctx.chain = (weight, bias), chain
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(top)
        return logp, entropy, top

    @staticmethod
    def backward(
        ctx: Any, dlogp: Tensor | None, dentropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        hidden, unit, entropy = ctx.saved_tensors
        weight, bias = ctx.head
        dhidden = None
        if dlogp is not None:
            dhidden = unit * dlogp[:, None].to(unit.dtype)
        if dentropy is not None:
            extra = _entropy_backward(hidden, weight, bias, entropy, dentropy, ctx.chain)
            dhidden = extra if dhidden is None else dhidden.add_(extra)
        return dhidden, None, None, None, None


def _entropy_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    dentropy: Tensor,
    chain: Sequence[LogitStep],
) -> Tensor:
    """``dH_i/dz_j = -p_j (log p_j + H_i)``, the logits made again: only an entropy term pays for it."""
    out = torch.empty_like(hidden)
    for tile in _tiles(len(hidden), weight.shape[0], torch.float32.itemsize):
        raw = functional.linear(hidden[tile], weight, bias)
        z, backward_steps = _through_chain(raw, chain)
        p, lse = _softmax(z)
        surprise = z.float() - lse[:, None] + entropy[tile][:, None]
        g = p.mul_(surprise).mul_(-dentropy[tile][:, None])
        for step in backward_steps:
            g = step(g)
        out[tile] = raw.copy_(g) @ weight
        del raw, z, p, g, surprise
    return out
