"""What a load gave: modules in 4-bit and those left, bytes by dtype of the storages, memory really taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pronghorn.memory.counter import storage_key
from pronghorn.quant.library import linears_4bit, linears_8bit, state_tensors, values


@dataclass(frozen=True)
class LoadReport:
    """The state of a model right after loading.

    ``quantised`` names the modules that are ``held`` in NF4 or in 8-bit; ``left`` counts the modules that
    stay as stored, by reason. ``dtype_bytes`` counts each storage once; ``full_bytes`` is what the same
    tensors take in 16-bit. ``resident_bytes`` is the process's resident memory, ``added_bytes`` what loading
    added to it (None where the system does not tell).
    """

    quantised: tuple[str, ...]
    held: str
    left: Mapping[str, int]
    dtype_bytes: Mapping[str, int]
    full_bytes: int
    resident_bytes: int | None
    added_bytes: int | None
    attention: str = ""
    """why it is not what transformers chose; empty where it is"""

    @property
    def total_bytes(self) -> int:
        """Bytes of all storages of the model."""
        return sum(self.dtype_bytes.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{dtype} {size(count)}" for dtype, count in sorted(self.dtype_bytes.items()))
        share = self.total_bytes / max(1, self.full_bytes)
        memory = "" if self.resident_bytes is None else f"; resident {size(self.resident_bytes)}"
        if self.added_bytes is not None:
            memory += f", {size(self.added_bytes)} of it from loading"
        kept = ", ".join(f"{reason} x{count}" for reason, count in sorted(self.left.items()))
        modules = f"{len(self.quantised)} modules in {self.held}"
        modules += f", left in 16-bit: {kept}" if kept and self.quantised else ""
        return (
            f"{modules if self.quantised else 'nothing quantised'}; {size(self.total_bytes)} ({kinds}), "
            f"{share:.2f} x the {size(self.full_bytes)} of 16-bit{memory}"
            f"{'; ' if self.attention else ''}{self.attention}"
        )


def size(count: int) -> str:
    """Bytes for people: MB below a GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def memory() -> int | None:
    """Resident memory of this process in bytes; None where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), None)


def report_load(model: Any, left: Mapping[str, str], before: int | None, attention: str = "") -> LoadReport:
    """Measure a model; ``left``: modules not quantised, with reasons; ``before``: an earlier ``memory()``."""
    now = memory()
    eight = tuple(name for name, _ in linears_8bit(model))
    return LoadReport(
        eight or tuple(name for name, _ in linears_4bit(model)),
        "8-bit (bitsandbytes' own code runs them)" if eight else "NF4",
        dict(Counter(left.values())),
        dtype_bytes(model),
        full_bytes(model),
        now,
        None if now is None or before is None else max(0, now - before),
        attention,
    )


def dtype_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes by dtype, of the storages: a shared tensor counts once, the state of 4-bit weights counts too."""
    seen: set[int] = set()
    found: Counter[str] = Counter()
    for tensor in _tensors(model):
        if storage_key(tensor) not in seen:
            seen.add(storage_key(tensor))
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.untyped_storage().nbytes()
    return dict(found)


def full_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters in 16-bit, a 4-bit weight counted by the shape it decodes to."""
    return 2 * values(model)


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for _, module in linears_4bit(model):
        yield from state_tensors(module)
    for _, module in linears_8bit(model):
        yield module.weight.SCB if module.weight.SCB is not None else module.state.SCB
