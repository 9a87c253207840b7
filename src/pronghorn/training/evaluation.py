"""Evaluation as one token mean over the whole split, whatever the batch size."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.training.collate import IGNORED_LABEL, NOT_FOR_THE_MODEL


@dataclass
class TokenTotals:
    """Sums over the labelled tokens of a split."""

    loss: float = 0.0
    correct: int = 0
    tokens: int = 0

    def metrics(self, prefix: str) -> dict[str, float]:
        """Mean loss (nats per token), share of tokens whose top guess is right, and the number of tokens."""
        count = max(self.tokens, 1)
        return {
            f"{prefix}_loss": self.loss / count,
            f"{prefix}_mean_token_accuracy": self.correct / count,
            f"{prefix}_tokens": self.tokens,
        }


def add_batch(totals: TokenTotals, model: Any, base: Any, batch: dict[str, torch.Tensor]) -> None:
    """Add one batch to ``totals``.

    Only the positions that some row of the batch is scored on get logits, and these become float32 one row at
    a time, so the peak is [B, K, V] in the model's dtype for K scored positions, not [B, T, V] in float32.

    Args:
        totals: The sums so far.
        model: What is called (it may be wrapped).
        base: The transformers model inside it, asked for what its forward accepts.
        batch: ``labels`` and what the model is given, each [B, T], on the model's device; padded or packed.
    """
    targets = batch["labels"][:, 1:]
    scored = (targets != IGNORED_LABEL).any(dim=0).nonzero().flatten()  # [K]
    if scored.numel() == 0:
        return
    inputs = {**{name: batch[name] for name in batch if name not in NOT_FOR_THE_MODEL}, "use_cache": False}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits = model(**inputs, logits_to_keep=scored).logits  # [B, K, V]
    else:
        logits = model(**inputs).logits[:, scored]
    for row, target in zip(logits, targets[:, scored], strict=True):
        wanted = target != IGNORED_LABEL
        scores, answers = row[wanted].float(), target[wanted]
        totals.loss += (
            torch.nn.functional.cross_entropy(scores, answers, reduction="none").double().sum().item()
        )
        totals.correct += int((scores.argmax(-1) == answers).sum())
        totals.tokens += int(wanted.sum())
