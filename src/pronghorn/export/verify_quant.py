"""The base as an adapter trained in 4-bit saw it, written out in 16-bit for the deep check.

Own reading and own arithmetic of NF4 (arXiv 2305.14314); nothing is shared with the exporter.
"""

from __future__ import annotations

import json
import shutil
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch

from pronghorn.export.verify_folder import Folder, Tensor, without_quantization

_RECORD = "pronghorn.json"
_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
_DTYPES = {
    "U8": torch.uint8, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # fmt: skip
_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in _DTYPES.items()}
_BLOCK, _OUTER = 64, 256
# the 16 levels of NF4 (arXiv 2305.14314, appendix E)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


def is_quantised(folder: Folder) -> bool:
    """Whether the folder stores weights in NF4."""
    return any(name.endswith(_STATE) for name in folder.tensors)


def trained_in_4bit(adapter: Path | None) -> tuple[frozenset[str], str]:
    """The base's tensors that were in NF4 when the adapter was trained, and the dtype they decoded to."""
    try:
        record = json.loads(((adapter or Path()) / _RECORD).read_bytes())
    except (OSError, ValueError):
        return frozenset(), ""
    if record.get("quantization") != "nf4":
        return frozenset(), ""
    return frozenset(record.get("quantised") or ()), str(record.get("quantised_dtype"))


def write_decoded(base: Folder, quantised: frozenset[str], dtype: str, target: Path) -> Folder:
    """Write ``base`` with its NF4 tensors decoded, and those named ``quantised`` encoded and decoded.

    Every file of the base appears in ``target`` under its own name; one tensor is in memory at a time.
    """
    for name in sorted(base.names):
        if not name.endswith((".safetensors", ".safetensors.index.json")) and name != "config.json":
            shutil.copyfile(base.path / name, target / name)
    (target / "config.json").write_text(json.dumps(without_quantization(base.config)), encoding="utf-8")
    weight_map: dict[str, str] = {}
    for file, header in base.headers.items():
        kept = {name: tensor for name, tensor in header.items() if not _is_part(name, base.tensors)}
        _write(target / file, kept, base, quantised, dtype)
        weight_map |= dict.fromkeys(kept, file)
    if base.weight_map:
        index = {"metadata": {}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return Folder(target)


def _is_part(name: str, tensors: dict[str, Tensor]) -> bool:
    return any(name.endswith(part) and f"{name.removesuffix(part)}{_STATE}" in tensors for part in _PARTS)


def _write(
    path: Path, tensors: dict[str, Tensor], base: Folder, quantised: frozenset[str], dtype: str
) -> None:
    header, at = {}, 0
    for name, tensor in tensors.items():
        state = _state(base, name)
        made = str(state["dtype"]) if state else dtype if name in quantised else ""
        kind = _NAMES[made] if made else tensor.dtype
        shape = list(state["shape"]) if state else list(tensor.shape)
        size = prod(shape) * _DTYPES[kind].itemsize if made else tensor.end - tensor.start
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            file.write(_content(base, name, tensor, quantised, dtype))


def _content(base: Folder, name: str, tensor: Tensor, quantised: frozenset[str], dtype: str) -> bytes:
    state = _state(base, name)
    if state:
        values = decoded(base, name, state)
    elif name in quantised:
        held = _read(tensor).to(getattr(torch, dtype))
        values = through_nf4(held).to(held.dtype)
    else:
        return _bytes(tensor)
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _state(base: Folder, name: str) -> dict[str, Any]:
    found = base.tensors.get(name + _STATE)
    return dict(json.loads(_bytes(found))) if found else {}


def decoded(base: Folder, name: str, state: dict[str, Any]) -> torch.Tensor:
    """An NF4 weight of the files, decoded in float32 and rounded once to its dtype."""
    part = {key: _read(base.tensors[name + key]) for key in _PARTS[:4] if name + key in base.tensors}
    scale = part[".absmax"].float()
    if ".nested_absmax" in part:
        outer = part[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(scale)]
        scale = part[".nested_quant_map"][part[".absmax"].long()] * outer + float(state["nested_offset"])
    raw = _read(base.tensors[name]).flatten().long()
    codes = torch.stack([raw // 16, raw % 16], 1).flatten()[: prod(state["shape"])]
    spread = scale.repeat_interleave(state["blocksize"])[: len(codes)]
    values = part[".quant_map"][codes] * spread
    return values.view(state["shape"]).to(getattr(torch, state["dtype"]))


def through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight after quantisation to NF4 with double quantisation and back, in float32."""
    flat = weight.flatten().float()
    count = len(flat)
    blocks = torch.nn.functional.pad(flat, (0, -count % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(1)
    table = torch.tensor(_NF4)
    unit = blocks * (1.0 / largest.clamp(min=1e-38))[:, None]
    nearest = table[torch.searchsorted((table[1:] + table[:-1]) / 2, unit)]
    mean = float(largest.double().mean().float())
    rest = torch.nn.functional.pad(largest - mean, (0, -len(largest) % _OUTER)).view(-1, _OUTER)
    outer = rest.abs().amax(1, keepdim=True)
    code = _eight_bit()
    places = torch.searchsorted(
        (code[1:] + code[:-1]) / 2, (rest * (1.0 / outer.clamp(min=1e-38))).clamp(-1, 1)
    )
    scale = (code[places] * outer).flatten()[: len(largest)] + mean
    return (nearest * scale[:, None]).flatten()[:count].view(weight.shape)


def _eight_bit() -> torch.Tensor:
    """The 256 values for magnitudes (arXiv 2110.02861, dynamic tree): 0, 1, and means of equal steps."""
    positive = []
    for power in range(7):
        edges = torch.linspace(0.1, 1.0, 2**power + 1)
        positive += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)).tolist()
    return torch.tensor(sorted([0.0, 1.0, *positive, *(-one for one in positive)]))


def _bytes(tensor: Tensor) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        return file.read(tensor.end - tensor.start)


def _read(tensor: Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(_bytes(tensor)), dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape)
