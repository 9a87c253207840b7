"""Weights as codes in the layouts of compressed-tensors: 4-bit, int8 and FP8, rounded to the nearest.

``P.weight`` [out, in] becomes ``P.weight_packed`` (int32 [out, in / 8], eight nibbles of code + 8, the first
lowest) or ``P.weight`` (int8 or FP8), with ``P.weight_scale`` [out, groups]. A row needs only itself, so rows
are coded as they are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.errors import NotSupportedError
from pronghorn.weights.shards import TensorEntry

# vLLM's 4-bit GPU kernels know these groups (and whole rows); smaller ones keep more
_GROUPS = (128, 64, 32)
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scheme:
    """A format: ``bits`` of ``kind`` per weight, one scale per ``group`` columns (None: per row).

    ``activations``: inputs are quantised too, per token, by the engine. ``layout`` is the format's name in
    compressed-tensors.
    """

    name: str
    layout: str
    bits: int
    kind: str
    activations: bool
    group: int | None = None

    @property
    def suffix(self) -> str:
        """What follows the module's name in the tensor of codes."""
        return "weight_packed" if self.bits == 4 else "weight"

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the codes."""
        return "I32" if self.bits == 4 else "I8" if self.kind == "int" else "F8_E4M3"

    def config(self, ignore: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json.

        transformers reads a folder without ``quantization_status`` as garbage, and vLLM needs ``format``.
        """
        strategy = "group" if self.group else "channel"
        weights = _arguments(self.bits, self.kind, strategy, dynamic=False)
        if self.group:
            weights["group_size"] = self.group
        inputs = _arguments(self.bits, self.kind, "token", dynamic=True) if self.activations else None
        group = {
            "targets": ["Linear"], "weights": weights,
            "input_activations": inputs, "output_activations": None,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }


def _arguments(bits: int, kind: str, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}


@dataclass(frozen=True)
class Coded:
    """Where the parts of a coded weight go, beside its codes: scales, and (4-bit) the shape."""

    scheme: Scheme
    scale: TensorEntry
    shape: TensorEntry | None


def choose_scheme(name: str, widths: Iterable[int]) -> Scheme:
    """The scheme of a format for linear layers with these input widths.

    Raises:
        NotSupportedError: 4-bit codes cannot be packed, for a width is no multiple of 8.
    """
    if name == "w8a8":
        return Scheme(name, "int-quantized", 8, "int", True)
    if name == "fp8":
        return Scheme(name, "float-quantized", 8, "float", True)
    found = sorted(set(widths))
    odd = [width for width in found if width % 8]
    if odd:
        raise NotSupportedError(
            f"w4a16 packs eight weights, and a linear layer has {odd[0]} inputs", fix="use w8a8 or fp8"
        )
    group = next((size for size in _GROUPS if all(width % size == 0 for width in found)), None)
    return Scheme(name, "pack-quantized", 4, "int", False, group)


def encode(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (as bytes) and scales of some rows.

    Args:
        weight: float32 ``[rows, columns]``.
        scheme: the format.
        scale_dtype: the dtype scales are stored in; codes are chosen for the stored scale.

    Returns:
        Codes as uint8 ``[rows, bytes]`` and scales ``[rows, groups]``.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, scheme.group or columns)
    top = torch.finfo(_FP8).max if scheme.kind == "float" else 2 ** (scheme.bits - 1) - 0.5
    scale = (grouped.abs().amax(2) / top).to(scale_dtype)
    # rows of zeros, or too small for the dtype
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    units = (grouped / scale.float().unsqueeze(2)).reshape(rows, columns)
    if scheme.kind == "float":
        return units.clamp_(-top, top).to(_FP8).view(torch.uint8), scale
    low = -(2 ** (scheme.bits - 1))
    codes = units.round_().clamp_(low, -low - 1)
    if scheme.bits == 8:
        return codes.to(torch.int8).view(torch.uint8), scale
    nibbles = codes.sub_(low).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale
