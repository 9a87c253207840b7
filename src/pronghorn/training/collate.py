"""Rows of token ids and labels -> one batch: padded rows, or bins of whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED_LABEL = -100
TOKENS = "tokens"  # of a packed batch: tokens in each bin; for counting, not for the model
NOT_FOR_THE_MODEL = ("labels", TOKENS)

Batch = dict[str, Any]  # tensors, and for flash attention two numbers


@dataclass(frozen=True)
class PadCollator:
    """Pads on the right to the longest row of the batch.

    ``input_ids``, ``attention_mask`` and ``labels`` come out as [B, T] int64. The label of position 0 is
    ignored: nothing predicts it, and counting it would skew the number of trained tokens the loss is divided
    by.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Collate rows with ``input_ids`` and ``labels`` of equal length."""
        ids, labels, sizes = _padded(rows, self.pad_token_id)
        labels[:, 0] = IGNORED_LABEL
        mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class PackCollator:
    """Bins side by side: [B, T] with ``position_ids`` that start again at 0 with every row of a bin.

    There is no ``attention_mask``: from transformers 4.53 on, its absence makes the model read the rows'
    borders from ``position_ids`` and keep attention within each. What is left of a bin that is shorter than
    the longest is one more row of padding, on which nothing trains. The label of each row's first token is
    ignored, as in ``PadCollator``. ``tokens`` [B] counts without padding.

    ``varlen`` is for flash attention, which has no mask: ``cu_seq_lens_q`` and ``_k``, where the rows of
    all bins
    begin and end in B x T tokens, and ``max_length_q`` and ``_k``, the longest row, under transformers'
    own names.
    By itself it would read them from ``position_ids`` again in every layer, and for B > 1 not at all.
    """

    pad_token_id: int
    varlen: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Collate bins with ``input_ids``, ``labels``, and the ``lengths`` of the rows in them."""
        ids, labels, sizes = _padded(rows, self.pad_token_id)
        positions = torch.empty_like(ids)
        borders: list[torch.Tensor] = []
        for index, row in enumerate(rows):
            spare = ids.shape[1] - int(sizes[index])
            lengths = torch.as_tensor([*row["lengths"], spare])  # a row of no tokens has no position
            starts = lengths.cumsum(0) - lengths
            positions[index] = torch.arange(ids.shape[1]) - starts.repeat_interleave(lengths)
            labels[index, starts[:-1]] = IGNORED_LABEL
            borders.append(lengths[lengths > 0])
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels, TOKENS: sizes}
        return {**batch, **_varlen(torch.cat(borders))} if self.varlen else batch


@dataclass(frozen=True)
class RowCollator:
    """Bins are packed, rows are padded: a run trains on the one and evaluates on the other."""

    pad_token_id: int
    varlen: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """Collate rows of one kind."""
        if "lengths" in rows[0]:
            return PackCollator(self.pad_token_id, self.varlen)(rows)
        return PadCollator(self.pad_token_id)(rows)


def wants_varlen(model: Any) -> bool:
    """Whether the attention of a model is told the borders of packed rows instead of a mask: flash
    attention is."""
    return "flash" in str(model.config.get_text_config()._attn_implementation)


def _varlen(lengths: torch.Tensor) -> Batch:
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _padded(rows: Sequence[dict[str, Any]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and labels [B, T], padded on the right, and the lengths [B] without padding."""
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    ids = torch.full((len(rows), int(sizes.max())), pad, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED_LABEL)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.as_tensor(row["input_ids"])
        labels[index, :length] = torch.as_tensor(row["labels"])
    return ids, labels, sizes
