"""What the codes of a quantised folder mean: decoded weights, their distance to base + adapter, the price.

The weights must be the nearest codes; what that does to the answers is measured and told, not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pronghorn.export import verify_model
from pronghorn.export.verify_codes import TOWER, Coded, coded
from pronghorn.export.verify_folder import Folder, Row, Tensor

QUALITY = "quality against base + adapter in float32"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
# transformers 5: a parameter of all experts -> what the files hold of each
_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",)),
}  # fmt: skip
# (start of a name in a multimodal class, in its files): today, before transformers 4.52, without the towers
_LAYOUTS = (
    ("", ""), ("model.language_model.", "language_model.model."), ("model.language_model.", "model."),
    ("lm_head.", "language_model.lm_head."),
)  # fmt: skip
# E2M1 (OCP Microscaling Formats 1.0): three bits of magnitude, then the sign
_E2M1 = torch.tensor(
    [sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
)


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
    if one.divisor is not None:
        scale = scale / read(one.divisor, 0, 1)
    if one.codes.dtype == "U8":
        values = _E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()]
    elif one.bits == 4:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        values = ((codes.unsqueeze(-1) >> shifts) & 15).reshape(last - first, -1).float() - 8
    else:
        values = codes.float()
    step = scale.repeat_interleave(one.shape[1] // scale.shape[1], dim=1)
    return values * step, step


def farthest(one: Coded, first: int, last: int, truth: torch.Tensor) -> float:
    """How far rows are from ``truth``, where 1 is the most that rounding to the nearest code explains.

    Half a step (FP8 has 3 bits of mantissa: 1/16 of the value), and 1/256 for scales rounded to bfloat16.
    E2M1's neighbours lie half a step apart up to 2 steps, one up to 4, then two.
    """
    weight, step = decode(one, first, last)
    if one.codes.dtype == "U8":
        units = truth.abs() / step
        bound = step * torch.where(units < 2, 0.25, torch.where(units < 4, 0.5, 1.0))
        return _ratio(weight, truth, bound)
    relative = 2.0**-8 + (2.0**-4 if one.kind == "float" else 0.0)
    bound = (2.0**-9 if one.kind == "float" else 0.5) * step + relative * truth.abs()
    return _ratio(weight, truth, bound)


def squared_errors(one: Coded, first: int, last: int, truth: torch.Tensor) -> tuple[float, float]:
    """Squared distance of rows to ``truth``, and that of the nearest codes under the same scales."""
    weight, step = decode(one, first, last)
    nearest = (truth / step).round().clamp(-(2 ** (one.bits - 1)), 2 ** (one.bits - 1) - 1) * step
    return float((weight - truth).double().square().sum()), float((nearest - truth).double().square().sum())


def _ratio(weight: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> float:
    found = ((weight - truth).abs() / (bound * 1.01).clamp_min(1e-30)).nan_to_num(torch.inf)
    return float(found.max()) if found.numel() else 0.0


def load_decoded(folder: Folder, base: Path) -> Any:
    """A float32 model of the base's class with the folder's weights, decoded here and not by an engine."""
    model = verify_model.load_model(base)
    rows = int(folder.text_config["vocab_size"])
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    weights = DecodedWeights(folder, dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    return model.eval()


class DecodedWeights(Mapping[str, torch.Tensor]):
    """Parameter of the base's class -> its values in float32, read and decoded when asked for.

    ``base``: the base's, which what lies beside a language model keeps: its bytes are compared, and a folder
    of the language model alone has none.
    """

    def __init__(self, folder: Folder, base: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.coded, self.base = folder.tensors, coded(folder), base
        self.files = {**dict.fromkeys(self.tensors), **dict.fromkeys(self.coded)}

    def __getitem__(self, name: str) -> torch.Tensor:
        if TOWER.search(name):
            return self.base[name].float()
        for candidate in _file_names(name):
            if candidate in self.files:
                return self._stored(candidate)
            module, _, leaf = candidate.rpartition(".")
            for leaves in _EXPERTS.get(leaf, ()):
                if experts := list(self._experts(module, leaves)):
                    return torch.stack(experts)
        raise KeyError(name)

    def _experts(self, module: str, leaves: tuple[str, ...]) -> Iterator[torch.Tensor]:
        """The matrices of one expert after the other, those of each one below the other."""
        number = 0
        while f"{module}.{number}.{leaves[0]}.weight" in self.files:
            yield torch.cat([self._stored(f"{module}.{number}.{leaf}.weight") for leaf in leaves])
            number += 1

    def _stored(self, file: str) -> torch.Tensor:
        if file in self.coded:
            return decode(self.coded[file], 0, self.coded[file].shape[0])[0]
        tensor = self.tensors[file]
        return read(tensor, 0, tensor.shape[0]).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def _file_names(name: str) -> Iterator[str]:
    """What the files may call a parameter of the language model."""
    for ours, theirs in _LAYOUTS:
        if name.startswith(ours):
            yield theirs + name.removeprefix(ours)
    yield name.replace(".mlp.", ".block_sparse_moe.")


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
    before, after = (f"{float(torch.tensor(loss / predicted).exp()):.4g}" for loss in losses)
    figures = (
        ("perplexity", before, after),
        ("KL, nats a token", "0", f"{kl / tokens:.3g}"),
        ("best token equal", "100.0%", f"{agree / tokens:.1%}"),
    )
    line = f"KL {kl / tokens:.3g} nats a token, best token equal {agree / tokens:.1%}, "
    line += f"perplexity {before} -> {after}; {told}"
    finite = all(bool(torch.isfinite(x).all()) for x in found)
    if not finite:
        return Row(QUALITY, False, "logits are not finite")
    return Row(QUALITY, True, line, figures=figures)


def sizes(folder: Folder, base: Folder) -> tuple[str, str, str]:
    """The row of the weights' bytes: the base's, and the folder's."""
    theirs, ours = (sum(x.end - x.start for x in view.tensors.values()) for view in (base, folder))
    return "size", f"{theirs / 1e6:,.1f} MB", f"{ours / 1e6:,.1f} MB ({ours / theirs:.0%})"
