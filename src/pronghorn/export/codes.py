"""Weights as codes in the layouts of compressed-tensors: 4-bit, int8, FP8 and NVFP4, rounded to the nearest.

``P.weight`` [out, in] becomes ``P.weight_packed`` (int32 [out, in / 8], eight nibbles of code + 8, the first
lowest; NVFP4: uint8 [out, in / 2], two E2M1 numbers, the first lower) or ``P.weight`` (int8 or FP8), with
``P.weight_scale`` [out, groups]. NVFP4's scales are FP8 numbers, divided by ``P.weight_global_scale`` [1]. A
row needs only itself (and that divisor), so rows are coded as they are merged.
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
_FP8_TOP, _FP8_SMALLEST_NORMAL = 448.0, 2.0**-6
# the eight magnitudes of E2M1 (OCP Microscaling Formats 1.0, table 5) are told apart by their midpoints
_E2M1_TOP = 6.0
_E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_NVFP4_GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """A format: ``bits`` of ``kind`` per weight, one scale per ``group`` columns (None: per row).

    ``activations``: inputs are quantised too, per token, by the engine. ``layout`` is the format's name in
    compressed-tensors; ``order`` the order in which GPTQ chose the columns' codes, where it did.
    """

    name: str
    layout: str
    bits: int
    kind: str
    activations: bool
    group: int | None = None
    order: str | None = None

    @property
    def suffix(self) -> str:
        """What follows the module's name in the tensor of codes."""
        return "weight_packed" if self.bits == 4 else "weight"

    @property
    def dtype(self) -> str:
        """The safetensors dtype of the codes."""
        if self.two_scales:
            return "U8"
        return "I32" if self.bits == 4 else "I8" if self.kind == "int" else "F8_E4M3"

    @property
    def two_scales(self) -> bool:
        """NVFP4: scales of groups are FP8 numbers, and one number per tensor divides them."""
        return (self.bits, self.kind) == (4, "float")

    @property
    def width(self) -> int:
        """Weights in one element of the codes."""
        return {"I32": 8, "U8": 2}.get(self.dtype, 1)

    def config(self, ignore: Iterable[str]) -> dict[str, Any]:
        """The quantization_config of config.json.

        transformers reads a folder without ``quantization_status`` as garbage, and vLLM needs ``format``.
        """
        strategy = "tensor_group" if self.two_scales else "group" if self.group else "channel"
        weights = _arguments(self.bits, self.kind, strategy, dynamic=False)
        if self.group:
            weights["group_size"] = self.group
        if self.order:
            weights["actorder"] = self.order
        if self.two_scales:
            weights["scale_dtype"] = str(_FP8)
        inputs = _arguments(self.bits, self.kind, "token", dynamic=True) if self.activations else None
        group = {
            "targets": ["Linear"], "weights": weights, "format": self.layout,
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
    """Where the parts of a coded weight go, beside its codes: scales, and what it has once for the tensor.

    ``once``: the shape of 4-bit integers, or NVFP4's divisor of all scales, whose value is ``divisor``.
    """

    scheme: Scheme
    scale: TensorEntry
    once: TensorEntry | None = None
    divisor: float = 1.0


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
    step, what = (_NVFP4_GROUP, "has groups of 16") if name == "nvfp4" else (8, "packs eight weights")
    odd = [width for width in found if width % step]
    if odd:
        raise NotSupportedError(
            f"{name} {what}, and a linear layer has {odd[0]} inputs", fix="use w8a8 or fp8"
        )
    if name == "nvfp4":
        return Scheme(name, "nvfp4-pack-quantized", 4, "float", False, _NVFP4_GROUP)
    group = next((size for size in _GROUPS if all(width % size == 0 for width in found)), None)
    return Scheme(name, "pack-quantized", 4, "int", False, group)


def scale_divisor(largest: float) -> float:
    """What NVFP4 divides scales by: that of the largest magnitude is then FP8's largest number."""
    return _FP8_TOP * _E2M1_TOP / max(largest, 1e-30)


def encode(
    weight: torch.Tensor, scheme: Scheme, scale_dtype: torch.dtype, divisor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (as bytes) and scales of some rows.

    Args:
        weight: float32 ``[rows, columns]``.
        scheme: the format.
        scale_dtype: the dtype scales are stored in; codes are chosen for the stored scale.
        divisor: NVFP4's, of the whole tensor.

    Returns:
        Codes as uint8 ``[rows, bytes]`` and scales ``[rows, groups]``.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(rows, -1, scheme.group or columns)
    if scheme.two_scales:
        return _encode_nvfp4(grouped, divisor)
    top = _FP8_TOP if scheme.kind == "float" else 2 ** (scheme.bits - 1) - 0.5
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
    return _paired(codes.sub_(low).to(torch.uint8)), scale


def _encode_nvfp4(grouped: torch.Tensor, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and FP8 scales of ``[rows, groups, 16]``: a group's largest magnitude becomes 6."""
    wanted = grouped.abs().amax(2) / _E2M1_TOP * divisor
    # below the normal numbers FP8 rounds a scale by more than 1/16, and the largest weights would be cut off
    scale = wanted.clamp_(_FP8_SMALLEST_NORMAL, _FP8_TOP).to(_FP8)
    units = grouped / (scale.float() / divisor).unsqueeze(2)
    codes = torch.bucketize(units.abs(), torch.tensor(_E2M1_MIDPOINTS), out_int32=True).to(torch.uint8)
    codes |= torch.signbit(units).to(torch.uint8) << 3
    return _paired(codes.flatten(1)), scale


def _paired(nibbles: torch.Tensor) -> torch.Tensor:
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
