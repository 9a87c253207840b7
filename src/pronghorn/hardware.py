"""The device a model goes to when nobody says otherwise, the memory that is free, the rate of products."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# one product of this width takes a core about 50 ms, an accelerator far less
RATE_WIDTH = 1024
RATE_SECONDS = 0.3


def accelerator() -> str | None:
    """Name of the accelerator torch can use now ("cuda", "xpu", "mps", ...); None if there is only a CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None else None


def free_host_bytes() -> int:
    """Memory that new tensors can have: what Linux calls available, within the limit of a container."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass  # another system, or an old kernel
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(0, limit - used))


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of square products on this machine, measured now: the best of as many as fit into 0.3 s."""
    a = torch.ones((RATE_WIDTH, RATE_WIDTH), dtype=dtype, device=device)
    best, end = float("inf"), time.perf_counter() + RATE_SECONDS
    while True:
        began = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        best = min(best, now - began)
        if now > end:
            return 2 * RATE_WIDTH**3 / best
