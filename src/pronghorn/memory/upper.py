"""An upper estimate for a step that cannot be rehearsed: as if nothing were shared or recomputed."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.memory.budget import StepBytes

WIDE = 4  # bytes: as if everything were float32
# copies of a linear's input (one for the adapter) and output (product, update, sum, activation, product)
INPUTS, OUTPUTS = 3, 5
NORM_COPIES = 5
SCORE_COPIES = 4
LOGIT_COPIES = 6


def upper_step(model: nn.Module, config: Any, rows: int, tokens: int) -> StepBytes:
    """Bytes that one micro-step stays below, counted from the widths of the model's parts.

    Args:
        model: with its adapter; only shapes are read.
        config: the text configuration of the model.
        rows: of the batch.
        tokens: of each row.
    """
    everywhere = rows * tokens
    per_token, largest = 0, 0
    for module in model.modules():
        width = 0
        if isinstance(module, nn.Linear):
            width = INPUTS * module.in_features + OUTPUTS * module.out_features
        elif not any(True for _ in module.children()):
            width = NORM_COPIES * sum(p.shape[-1] for p in module.parameters(recurse=False) if p.dim() == 1)
        per_token += width
        largest = max(largest, width)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    layers = int(getattr(config, "num_hidden_layers", 1) or 1)
    chosen = int(getattr(config, "num_experts_per_tok", 0) or 1)
    stacks = [p for p in model.parameters() if p.dim() == 3]
    per_token += sum(chosen * (INPUTS * p.shape[-1] + OUTPUTS * p.shape[-2]) for p in stacks)
    # the update of a stack of experts is made in full, beside the sum and the gradients of both
    made = sum(p.numel() for p in stacks) * INPUTS
    scores = rows * heads * tokens * tokens * SCORE_COPIES * layers
    logits = everywhere * int(getattr(config, "vocab_size", 0) or 0) * LOGIT_COPIES
    gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = WIDE * (everywhere * per_token + scores + logits + made)
    return StepBytes(saved, saved + WIDE * (2 * everywhere * largest + gradients + logits + made))
