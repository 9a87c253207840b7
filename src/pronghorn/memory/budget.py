"""The arithmetic of a memory budget: sizes and cards, what a run holds, what fits, the longest that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from pronghorn.errors import ConfigError

_UNITS = MappingProxyType({"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
})  # fmt: skip
# A CUDA context and the libraries' workspaces, before the first tensor. Assumed: 0.4 to 0.6 GB on the chips
# of the table below.
CONTEXT_BYTES = 600 * 10**6
# of the tensors: rounding of blocks and fragmentation in torch's caching allocator. Assumed.
ALLOCATOR_SHARE = 0.03


@dataclass(frozen=True)
class StepBytes:
    """What a micro-step adds to what is held.

    ``saved`` is alive between forward and backward, ``peak`` the highest of both, gradients included.
    """

    saved: int
    peak: int


@dataclass(frozen=True)
class Card:
    """Where a run's tensors go; ``tflops``: dense bfloat16 products; ``basis``: the source of both."""

    name: str
    memory_bytes: int
    basis: str
    tflops: float | None = None
    is_cpu: bool = False

    def reserve(self, tensor_bytes: int) -> int:
        """Bytes that are taken and are no tensors."""
        return 0 if self.is_cpu else CONTEXT_BYTES + int(tensor_bytes * ALLOCATOR_SHARE)


# name -> (GiB that torch can use, dense bf16 TFLOP/s), from the makers' data sheets; memory less what the
# driver keeps
CARDS = MappingProxyType(
    {
        "L4": (22.0, 121.0),
        "RTX4090": (23.5, 165.0),
        "L40S": (44.4, 362.0),
        "A100-40GB": (39.4, 312.0),
        "A100-80GB": (79.1, 312.0),
        "H100-80GB": (79.1, 989.0),
        "H200": (139.8, 989.0),
    }
)


def card_of(text: str) -> Card:
    """A card of the table by name, or of a size: "24GB" (10^9 bytes), "24GiB" (2^30).

    Raises:
        ConfigError: neither.
    """
    known = {name.upper(): name for name in CARDS}
    if (name := known.get(text.strip().upper().replace(" ", ""))) is not None:
        gib, tflops = CARDS[name]
        return Card(name, int(gib * 2**30), "data sheet", tflops)
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise ConfigError(
            f"memory={text!r} is neither a size nor a card of the table",
            fix=f"write a size such as 24GB or 24GiB, or one of {', '.join(CARDS)}",
        )
    return Card(text.strip(), int(float(found[1]) * _UNITS[found[2].upper()]), "as given")


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a run takes at its highest, in bytes of tensors."""

    weights: int
    adapters: int
    optimizer: int
    step: StepBytes
    at_start: int = 0
    """beside the weights and adapters before the first step: the copy that proves the acceleration"""
    on_host: int = 0
    """of the step's bytes, those that lie in host memory while the card has its own"""

    @property
    def tensors(self) -> int:
        """The highest sum of tensors at any time of the run."""
        held = self.weights + self.adapters
        return held + max(self.optimizer + self.step.peak - self.on_host, self.at_start)

    def total(self, card: Card) -> int:
        """With what is taken beside tensors."""
        return self.tensors + card.reserve(self.tensors)

    def fits(self, card: Card) -> bool:
        """Whether the card has room for it."""
        return self.total(card) <= card.memory_bytes


def optimizer_bytes(kind: str, shapes: list[tuple[tuple[int, ...], int]]) -> int:
    """State of an optimizer for trained tensors given as (shape, bytes of an element).

    AdamW: two moments and a step count of 4 bytes. Adafactor: a row and a column of a matrix, or a vector's
    squares, in float32. SGD without momentum: nothing.
    """
    total = 0
    for shape, element in shapes:
        count = 1
        for width in shape:
            count *= width
        if kind == "adamw":
            total += 2 * count * element + 4
        elif kind == "adafactor":
            total += 4 * (count // shape[-1] + count // shape[-2] if len(shape) >= 2 else count)
            total += 4  # the root mean square of the tensor
    return total


def longest(fits: Callable[[int], bool], most: int, step: int = 64) -> int:
    """The largest multiple of ``step`` up to ``most`` that fits, by halving; 0 if none does."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle - 1)
    return low * step


def curve(points: list[tuple[int, int]]) -> Callable[[int], int]:
    """The polynomial through up to three points (tokens, bytes): layers are linear, masks quadratic."""

    def at(x: int) -> int:
        total = 0.0
        for i, (xi, yi) in enumerate(points):
            term = float(yi)
            for j, (xj, _) in enumerate(points):
                if i != j:
                    term *= (x - xj) / (xi - xj)
            total += term
        return int(total)

    return at
