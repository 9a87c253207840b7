"""How a model is loaded, validated when it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pronghorn.errors import ConfigError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32, "fp32": torch.float32,
        "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
        "float16": torch.float16, "fp16": torch.float16,
    }
)  # fmt: skip
QUANTIZATIONS = (None, "nf4", "int8", "none")
DEFAULT_MAX_SEQ_LENGTH = 2048
_PLACEMENTS = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})
_DEVICE_TYPES = frozenset({"cpu", "cuda", "xpu", "mps", "hpu", "npu"})


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Options of ``load``. Raises ConfigError on values that cannot work."""

    max_seq_length: int | None = None
    """Longest sequence in tokens; None is 2048, or the model's own limit where that is shorter."""
    dtype: str | torch.dtype | None = "auto"
    """"auto" (or None): as the config says; else bfloat16, float16 or float32 (names or torch dtypes)."""
    device_map: str | dict[str, Any] | None = None
    """None: the accelerator, or the CPU. Else a device, a placement of accelerate, or a map."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    token: str | bool | None = None
    """Access token of the hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    quantization: str | None = None
    """None: as the folder's content says (and as an adapter was trained); "nf4": the base in 4-bit;
    "int8": in 8-bit; "none": in 16-bit. A request that contradicts the content is an error."""
    recompute: bool = False
    """Recompute activations in the backward pass (gradient checkpointing) instead of keeping them."""
    seed: int = 3407
    """Default seed of an adapter attached to this model."""
    base: str | Path | None = None
    """For an adapter: where its base is, if not where it was at training."""

    def __post_init__(self) -> None:
        """Check each value."""
        length = self.max_seq_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise ConfigError(f"max_seq_length is {length!r}", fix="give a number of tokens, or None")
        self.torch_dtype()
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"quantization is {self.quantization!r}; the base can be loaded in 16-bit, in NF4 or in "
                "8-bit",
                fix='use "nf4", "int8", "none", or None for what the folder holds',
            )
        if isinstance(self.device_map, str) and self.device_map not in _PLACEMENTS:
            kind, _, index = self.device_map.partition(":")
            if kind not in _DEVICE_TYPES or (index and not index.isdecimal()):
                raise ConfigError(
                    f"device_map is {self.device_map!r}",
                    fix="use a device such as cpu or cuda:0, a map, None, or one of "
                    f"{', '.join(sorted(_PLACEMENTS))}",
                )

    def torch_dtype(self) -> torch.dtype | str:
        """The dtype to load in: a torch dtype, or "auto"."""
        if self.dtype is None or self.dtype == "auto":
            return "auto"
        if isinstance(self.dtype, torch.dtype) and self.dtype in DTYPES.values():
            return self.dtype
        if isinstance(self.dtype, str) and self.dtype.removeprefix("torch.") in DTYPES:
            return DTYPES[self.dtype.removeprefix("torch.")]
        raise ConfigError(f"dtype is {self.dtype!r}", fix=f"use auto, {', '.join(DTYPES)}")
