"""What the codes of a quantised folder mean: decoded weights, their distance to base + adapter, the price.

The weights must be the nearest codes; what that does to the answers is measured and told, not judged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pronghorn.export import verify_model
from pronghorn.export.verify_codes import Coded, coded
from pronghorn.export.verify_folder import Folder, Row, Tensor

QUALITY = "quality against base + adapter in float32"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def read(tensor: Tensor, first: int, last: int) -> torch.Tensor:
    """Rows ``first`` to ``last`` of a tensor, from its file."""
    rows = tensor.shape[0] if tensor.shape else 1
    width = (tensor.end - tensor.start) // max(rows, 1)
    with tensor.file.open("rb") as file:
        file.seek(tensor.start + first * width)
        data = bytearray(file.read((last - first) * width))
    return torch.frombuffer(data, dtype=_DTYPES[tensor.dtype]).reshape(last - first, *tensor.shape[1:])


def decode(one: Coded, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a weight in float32 [rows, in], and the size of one step at each element."""
    codes, scale = read(one.codes, first, last), read(one.scale, first, last).float()
    if one.bits == 4:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        values = ((codes.unsqueeze(-1) >> shifts) & 15).reshape(last - first, -1).float() - 8
    else:
        values = codes.float()
    step = scale.repeat_interleave(one.shape[1] // scale.shape[1], dim=1)
    return values * step, step


def farthest(one: Coded, first: int, last: int, truth: torch.Tensor) -> float:
    """How far rows are from ``truth``, where 1 is the most that rounding to the nearest code explains.

    Half a step (FP8 has 3 bits of mantissa: 1/16 of the value), and 1/256 for scales rounded to bfloat16.
    """
    weight, step = decode(one, first, last)
    relative = 2.0**-8 + (2.0**-4 if one.kind == "float" else 0.0)
    bound = (2.0**-9 if one.kind == "float" else 0.5) * step + relative * truth.abs()
    found = ((weight - truth).abs() / (bound * 1.01).clamp_min(1e-30)).nan_to_num(torch.inf)
    return float(found.max()) if found.numel() else 0.0


def load_decoded(folder: Folder, base: Path) -> Any:
    """A float32 model of the base's class with the folder's weights, decoded here and not by an engine."""
    model = verify_model.load_model(base)
    rows = int(folder.text_config["vocab_size"])
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    weights = coded(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            count = parameter.shape[0]
            if name in weights:
                parameter.copy_(decode(weights[name], 0, count)[0])
            else:
                parameter.copy_(read(folder.tensors[name], 0, count).float())
    return model.eval()


def quality(
    truth: tuple[torch.Tensor, ...], found: tuple[torch.Tensor, ...], ids: tuple[torch.Tensor, ...], told: str
) -> Row:
    """KL divergence, agreement of the best token, and perplexity over the same token ids.

    Args:
        truth: logits [B, T, V] of base + adapter.
        found: logits of the decoded weights.
        ids: token ids [B, T].
        told: what else the row says.
    """
    kl = agree = tokens = 0.0
    losses = [0.0, 0.0]
    for right, ours, row in zip(truth, found, ids, strict=True):
        width = min(right.shape[-1], ours.shape[-1])
        p, q = (x[..., :width].double().log_softmax(-1) for x in (right, ours))
        kl += float((p.exp() * (p - q)).sum())
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += p[..., 0].numel()
        for number, scores in enumerate((p, q)):
            losses[number] -= float(scores[:, :-1].gather(-1, row[:, 1:, None]).sum())
    predicted = sum(row[:, 1:].numel() for row in ids)
    before, after = (float(torch.tensor(loss / predicted).exp()) for loss in losses)
    line = f"KL {kl / tokens:.3g} nats a token, best token equal {agree / tokens:.1%}, "
    line += f"perplexity {before:.4g} -> {after:.4g}; {told}"
    finite = all(bool(torch.isfinite(x).all()) for x in found)
    return Row(QUALITY, finite, line if finite else "logits are not finite")


def size_told(folder: Folder, base: Folder) -> str:
    """Bytes of the folder beside the base's."""
    ours, theirs = (sum(x.end - x.start for x in view.tensors.values()) for view in (folder, base))
    return f"{ours / 1e6:,.1f} MB of {theirs / 1e6:,.1f} MB"
