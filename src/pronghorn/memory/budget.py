"""The arithmetic of a memory budget: sizes and cards, what a run holds, what fits, the longest that fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from pronghorn.errors import ConfigError

LEAST_TOKENS = 16
# of the search for the longest row: seven rehearsals end within 2 % on all shapes of the tests
MOST_QUESTIONS = 8
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
    context_bytes: int = CONTEXT_BYTES
    allocator_share: float = ALLOCATOR_SHARE

    def reserve(self, tensor_bytes: int) -> int:
        """Bytes that are taken and are no tensors."""
        return 0 if self.is_cpu else self.context_bytes + int(tensor_bytes * self.allocator_share)


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
    buffers: int = 0
    """what layers in 4-bit are decoded into"""
    at_start: int = 0
    """beside the weights and adapters before the first step: the copy that proves the acceleration"""
    on_host: int = 0
    """of the step's bytes, those that lie in host memory while the card has its own"""

    @property
    def tensors(self) -> int:
        """The highest sum of tensors at any time of the run."""
        held = self.weights + self.adapters + self.buffers
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


def longest_that_fits(
    need: Callable[[int], int], memory_bytes: int, start: int, most: int, *, at_zero: int
) -> int:
    """Tokens for which ``need`` stays within memory, 0 if not even ``LEAST_TOKENS`` do.

    The answer has been asked of ``need`` itself; between answers it is guessed along a parabola, because
    layers grow in proportion to tokens and masks by their square.

    Args:
        need: bytes for so many tokens; grows with them.
        memory_bytes: what there is.
        start: the first guess.
        most: the answer is no larger.
        at_zero: bytes without any token.
    """
    fits, fails, points = 0, most + 1, [(0, at_zero)]
    guess = min(start, most)
    for _ in range(MOST_QUESTIONS):
        found = need(guess)
        points.append((guess, found))
        fits, fails = (guess, fails) if found <= memory_bytes else (fits, guess)
        if fails - fits <= max(LEAST_TOKENS, fits // 50):
            break
        guess = _guess(points, memory_bytes, fits, fails)
    return fits


def _guess(points: list[tuple[int, int]], memory_bytes: int, fits: int, fails: int) -> int:
    """A length between one that fits and one that does not: on either side of where the curve says."""
    at = _curve(sorted(points, key=lambda point: abs(point[1] - memory_bytes))[:3])
    near = _last(lambda tokens: at(tokens) <= memory_bytes, fits, fails)
    if near == fails - 1:  # all the way: the last one itself
        return near
    margin = near // 100 + 1
    inside = (guess for guess in (near - margin, near + margin) if fits + margin < guess < fails - margin)
    return next(inside, (fits + fails) // 2)


def _last(true: Callable[[int], bool], low: int, high: int) -> int:
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if true(middle) else (low, middle)
    return low


def _curve(points: list[tuple[int, int]]) -> Callable[[int], float]:
    """The polynomial through points (tokens, bytes)."""

    def at(x: int) -> float:
        total = 0.0
        for i, (xi, yi) in enumerate(points):
            term = float(yi)
            for j, (xj, _) in enumerate(points):
                if i != j:
                    term *= (x - xj) / (xi - xj)
            total += term
        return total

    return at
