"""The device a model goes to when nobody says otherwise."""

from __future__ import annotations

import torch


def accelerator() -> str | None:
    """Name of the accelerator torch can use now ("cuda", "xpu", "mps", ...); None if there is only a CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None else None
