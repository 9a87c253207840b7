"""The loss of rows: the folder's is that of base + adapter, as near as rounding lets it be.

Both are means over the trained tokens, float32. What rounding may move is not chosen: weights that are
rounded once move the loss of each token, by some root mean square, and the mean of all by no more than that.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pronghorn.export.verify_folder import Row

LOSS = "loss of the rows equals base + adapter"
IGNORED = -100
_BATCH_TOKENS = 4096  # padding included


@dataclass(frozen=True)
class Rows:
    """Token ids of each row, and its labels: -100 where nothing is trained."""

    ids: tuple[list[int], ...]
    labels: tuple[list[int], ...]


@dataclass(frozen=True)
class Losses:
    """Nats of every trained token, [N]: of base + adapter, of the base, and of PEFT's merge rounded once."""

    truth: torch.Tensor
    plain: torch.Tensor
    rounded: torch.Tensor


def read_rows(file: Path) -> Rows:
    """Lines of JSON with input_ids and labels.

    Raises:
        ValueError: a line is something else, or no token of the rows is trained.
    """
    ids, labels = [], []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not isinstance(row, dict) or len(row.get("input_ids", ())) != len(row.get("labels", (0,))):
            raise ValueError(f"{file}, line {number}: input_ids and labels of one length are expected")
        ids.append([int(token) for token in row["input_ids"]])
        labels.append([int(token) for token in row["labels"]])
    if all(label == IGNORED for row in labels for label in row[1:]):
        raise ValueError(f"{file} has no token that is trained")
    return Rows(tuple(ids), tuple(labels))


@torch.no_grad()
def token_losses(model: Any, rows: Rows) -> torch.Tensor:
    """Nats of each trained token [N]; only positions that some row is scored on get logits."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    keeps = "logits_to_keep" in inspect.signature(plain.forward).parameters
    found = []
    for ids, mask, labels in _batches(rows):
        targets = labels[:, 1:]
        places = (targets != IGNORED).any(0).nonzero().flatten()
        options = {"logits_to_keep": places} if keeps else {}
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        logits = (logits if keeps else logits[:, places]).float()
        for scores, wanted in zip(logits, targets[:, places], strict=True):
            here = wanted != IGNORED
            found.append(torch.nn.functional.cross_entropy(scores[here], wanted[here], reduction="none"))
    return torch.cat(found).double()


def _batches(rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, mask and labels [B, T] of rows in their order, filled up on the right."""
    groups: list[list[int]] = [[]]
    for number in range(len(rows.ids)):
        longest = max(len(rows.ids[i]) for i in (*groups[-1], number))
        if groups[-1] and longest * (len(groups[-1]) + 1) > _BATCH_TOKENS:
            groups.append([])
        groups[-1].append(number)
    made = []
    for group in groups:
        width = max(len(rows.ids[i]) for i in group)
        ids, labels = (torch.full((len(group), width), fill) for fill in (0, IGNORED))
        mask = torch.zeros(len(group), width, dtype=torch.long)
        for place, i in enumerate(group):
            length = len(rows.ids[i])
            ids[place, :length] = torch.tensor(rows.ids[i])
            labels[place, :length] = torch.tensor(rows.labels[i])
            mask[place, :length] = 1
        made.append((ids, mask, labels))
    return made


def loss_row(losses: Losses, found: torch.Tensor, rows: Rows, factor: float) -> Row:
    """The folder's loss and that of base + adapter; ``factor``: how far beyond the reference's error."""
    noise = 2.0**-18 * float(losses.truth.abs().max())
    limit = factor * _rms(losses.rounded - losses.truth) + noise
    apart, tokens = abs(float((found - losses.truth).mean())), _rms(found - losses.truth)
    means = (float(one.mean()) for one in (losses.truth, found, losses.plain))
    told = "base + adapter {:.6g}, the folder {:.6g}, the base {:.6g} nats per token".format(*means)
    told += f"; apart {apart:.3g}, token by token {tokens:.3g} (tolerance {limit:.3g})"
    told += f"; {len(found)} tokens of {len(rows.ids)} rows"
    if not (apart <= limit and tokens <= limit):  # NaN is apart, too
        return Row(LOSS, False, told)
    if _rms(losses.plain - losses.truth) <= limit:
        return Row(LOSS, None, f"{told}: the base's is as near, so the rows tell nothing")
    return Row(LOSS, True, told)


def _rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())
