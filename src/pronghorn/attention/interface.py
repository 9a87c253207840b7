"""Our attention function, registered under its own name beside transformers' own.

What it adds to the stock ``sdpa``: key and value heads are not repeated in memory, with a mask neither, and
soft caps and sinks run in blocks of queries whose score matrix is not kept. Where torch has no kernel for
groups (2.8 on a CPU) heads are repeated, and no scores are kept. Everything else is handed to ``sdpa``.
Registering adds a name to two public tables and changes no entry that was there.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pronghorn"
# rows of scores alive at a time in the blocked form
BLOCK_ROWS = 512
# keyword arguments that do not change what is computed here
_HARMLESS = frozenset(
    {"sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "layer_idx"}
)

callers: ContextVar[list[nn.Module] | None] = ContextVar("callers", default=None)


@cache
def groups_are_fused() -> bool:
    """Whether torch's CPU kernel takes fewer key than query heads; else it keeps the scores."""
    query, key = torch.empty(1, 2, 1, 8), torch.empty(1, 1, 1, 8)
    chosen: int = torch._fused_sdp_choice(query, key, key, enable_gqa=True)
    return chosen != SDPBackend.MATH.value


@cache
def _sdpa_drops_caps() -> bool:
    """Whether transformers' ``sdpa`` takes a soft cap and computes without it (up to 5.20) or refuses it."""
    one = torch.zeros(1, 1, 1, 8)
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"](nn.Module(), one, one, one, None, softcap=1.0)
    except ValueError:
        return False
    return True


def lost_cap(model: Any) -> float | None:
    """The soft cap of its scores that a model asks for and that its attention, as it is set, leaves out."""
    text = model.config.get_text_config()
    cap: float | None = getattr(text, "attn_logit_softcapping", None)
    return cap if cap is not None and text._attn_implementation == "sdpa" and _sdpa_drops_caps() else None


def register() -> None:
    """Make the name known to transformers; a mask of the same name, or padding would be ignored silently."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [B, heads, T, D]``, ``key`` and ``value [B, kv heads, S, D]`` to ``[B, T, heads, D]``.

    ``attention_mask`` is boolean or additive ``[B, 1, T, S]``, or None for a causal mask.
    """
    if (seen := callers.get()) is not None:
        seen.append(module)
    extra = {name: value for name, value in kwargs.items() if value is not None}
    softcap, sinks = extra.pop("softcap", None), extra.pop("s_aux", None)
    if (softcap is not None or sinks is not None) and not dropout:
        return blocked_attention(query, key, value, attention_mask, scaling, softcap, sinks), None
    grouped = key.shape[1] != query.shape[1]
    masked = attention_mask is not None
    # stock sdpa repeats heads under a mask, and hands groups to torch without one
    ours = grouped and masked == groups_are_fused()
    plain = query.device.type == "cpu" and torch.is_grad_enabled() and set(extra) <= _HARMLESS
    if not (ours and plain) or softcap is not None or sinks is not None:
        out: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out
    causal = extra.get("is_causal", getattr(module, "is_causal", True))
    if not groups_are_fused():
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    result = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=not masked and query.shape[2] > 1 and causal,
        enable_gqa=groups_are_fused(),
    )
    return result.transpose(1, 2).contiguous(), None


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax attention with a soft cap and sinks in blocks of queries; scores are made again in backward.

    ``scores = cap(q k^T scaling) + mask``, ``p = softmax([scores, sink])`` without the sink's column, ``out =
    p v``.
    """
    blocks = []
    for start in range(0, query.shape[2], BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, query.shape[2])
        rows = query[:, :, start:stop]
        part = _causal(query, key, start, stop) if mask is None else mask[:, :, start:stop, : key.shape[2]]
        arguments = (rows, key, value, part, scaling, softcap, sinks)
        if torch.is_grad_enabled():
            blocks.append(checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_block(*arguments))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def _causal(query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
    offset = key.shape[2] - query.shape[2]
    rows = torch.arange(start + offset, stop + offset, device=query.device)
    return (rows[:, None] >= torch.arange(key.shape[2], device=query.device))[None, None]


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    grouped = query.reshape(batch, groups, heads // groups * rows, width)
    scores = (grouped @ key.transpose(2, 3)) * (width**-0.5 if scaling is None else scaling)
    scores = scores.view(batch, heads, rows, key.shape[2])
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(batch, -1, rows, 1).to(scores.dtype)
        scores = torch.cat((scores, column), dim=-1)
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    out = (p.reshape(batch, groups, -1, key.shape[2]) @ value).view(batch, heads, rows, value.shape[-1])
    return out.transpose(1, 2)
