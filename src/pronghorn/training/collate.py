"""Rows of token ids and labels -> one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PadCollator:
    """Pads on the right to the longest row of the batch.

    ``input_ids``, ``attention_mask`` and ``labels`` come out as [B, T] int64. The label of position 0 is
    ignored: nothing predicts it, and counting it would skew the number of trained tokens the loss is divided
    by.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows with ``input_ids`` and ``labels`` of equal length."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED_LABEL, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.as_tensor(row["input_ids"])
            labels[index, :length] = torch.as_tensor(row["labels"])
            mask[index, :length] = 1
        labels[:, 0] = IGNORED_LABEL
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
