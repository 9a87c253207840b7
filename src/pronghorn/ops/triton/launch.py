"""Block sizes and warps, as data for each kind of chip: nothing is tuned when a run starts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Launch:
    """How a kernel is started: elements (or rows x columns) of a program, its warps and pipeline stages."""

    block: tuple[int, ...]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch keywords. Fused multiply-add is asked for: Triton's default is announced to change."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Elementwise kernels move 2-byte elements in 16-byte pieces: 1024 elements on 4 warps are 8 for each thread.
DEFAULTS = MappingProxyType(
    {
        "gated_forward": Launch((1024,)),
        "gated_backward": Launch((1024,)),
        "rope": Launch((4,), warps=4),
        "cross_entropy": Launch((4096,), warps=8),
        "nf4": Launch((1024,)),
        "absmax": Launch((1024,)),
        "lora_add": Launch((64, 128), warps=4),
        "bf16": Launch((1024,)),
    }
)

# chip -> kernel -> launch, where a measurement on that chip found better than the default
TUNED: MappingProxyType[str, MappingProxyType[str, Launch]] = MappingProxyType({})


@lru_cache
def launch(kernel: str, device: torch.device) -> Launch:
    """The launch of a kernel on the chip of ``device``."""
    chip = "cpu"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        chip = f"cuda{major}{minor}"
    return TUNED.get(chip, DEFAULTS).get(kernel, DEFAULTS[kernel])


@lru_cache
def row_launch(columns: int) -> Launch:
    """For a program that holds a row of ``columns`` elements: about 16 elements a thread, 4 to 16 warps."""
    return Launch((1 << (columns - 1).bit_length(),), warps=max(4, min(16, columns // 512)))
