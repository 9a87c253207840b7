"""What acceleration did to a model: per kind how many parts were found, replaced and left, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from pronghorn.patching.forwards import InstanceForward, install, remove

REPLACEABLE = ("norm", "attention", "qkv", "o", "linear", "mlp", "experts", "loss")
KINDS = ("norm", "rope", "attention", "qkv", "o", "linear", "mlp", "experts", "loss", "recompute")


@dataclass(frozen=True)
class Part:
    """One part of the model: a module (or a group that shares an input) and what was decided about it."""

    kind: str
    name: str
    replaced: bool
    reason: str
    """the check with its figure and bound, or why there was nothing to check"""


@dataclass(frozen=True)
class Choice:
    """What ``accelerate`` was asked for, to be asked again when adapters are attached."""

    kinds: tuple[str, ...] = REPLACEABLE
    mlp_tile_tokens: int | None = None
    recompute: str | None = None
    activation_bytes: int | None = None


@dataclass
class PatchReport:
    """Returned by ``accelerate``; prints as a small table, and takes everything back with ``undo``."""

    parts: list[Part] = field(default_factory=list)
    forwards: dict[str, list[InstanceForward]] = field(default_factory=dict)
    model_check: str = "not run"
    packed: str = ""
    """how 4-bit weights are decoded; empty for a model without any"""
    mlp_tile_tokens: int | None = None
    """tokens at a time in MLPs and experts; None: all of a batch"""
    switches: list[Any] = field(default_factory=list)
    """things that are not instance forwards and know how to ``on()`` and ``off()`` themselves"""

    def count(self, kind: str) -> tuple[int, int]:
        """(found, replaced) of one kind."""
        mine = [part for part in self.parts if part.kind == kind]
        return len(mine), sum(part.replaced for part in mine)

    def left(self, kind: str) -> dict[str, int]:
        """Why parts of a kind were left as they were, with how many of each."""
        return dict(Counter(part.reason for part in self.parts if part.kind == kind and not part.replaced))

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Calls that ran the original although the part is replaced: kind -> reason -> number of calls."""
        found: dict[str, dict[str, int]] = {}
        for kind, forwards in self.forwards.items():
            total: Counter[str] = Counter()
            for forward in forwards:
                total.update(forward.declined)
            if total:
                found[kind] = dict(total)
        return found

    def layers(self, kind: str) -> list[Part]:
        """Every part of one kind with its own reason."""
        return [part for part in self.parts if part.kind == kind]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a manifest."""
        kinds = {}
        for kind in KINDS:
            found, replaced = self.count(kind)
            if found:
                kinds[kind] = {"found": found, "replaced": replaced, "left": self.left(kind)}
        return {
            "kinds": kinds,
            "model_check": self.model_check,
            **({"packed": self.packed} if self.packed else {}),
            **({"mlp_tile_tokens": self.mlp_tile_tokens} if self.mlp_tile_tokens else {}),
            "fallbacks": self.fallbacks(),
            "parts": [asdict(part) for part in self.parts],
        }

    def as_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def __str__(self) -> str:
        lines = [f"{'part':<10} {'found':>5} {'replaced':>8}  left, and why"]
        for kind in KINDS:
            found, replaced = self.count(kind)
            if found:
                why = "; ".join(f"{count}: {reason}" for reason, count in self.left(kind).items())
                lines.append(f"{kind:<10} {found:>5} {replaced:>8}  {why}".rstrip())
        lines += [f"4-bit: {self.packed}"] if self.packed else []
        if self.mlp_tile_tokens and (self.count("mlp")[1] or self.count("experts")[1]):
            lines.append(f"replaced MLPs and experts: at most {self.mlp_tile_tokens} tokens at a time")
        return "\n".join([*lines, f"whole model: {self.model_check}"])

    def undo(self) -> None:
        """Give every object back what it had before ``accelerate``; the report keeps what it says."""
        for forwards in self.forwards.values():
            for forward in forwards:
                remove(forward)
        for switch in self.switches:
            switch.off()
        self.forwards, self.switches = {}, []

    def drop(self, kind: str, reason: str) -> None:
        """Take one kind back and say why."""
        for forward in self.forwards.pop(kind, []):
            remove(forward)
        for switch in [s for s in self.switches if s.kind == kind]:
            switch.off()
            self.switches.remove(switch)
        self.parts = [
            Part(part.kind, part.name, False, reason) if part.kind == kind and part.replaced else part
            for part in self.parts
        ]

    def add(self, kind: str, name: str, reason: str, forwards: Sequence[InstanceForward] = ()) -> None:
        """Record a part; with ``forwards`` it is replaced by them, now."""
        self.parts.append(Part(kind, name, bool(forwards), reason))
        for forward in forwards:
            install(forward)
            self.forwards.setdefault(kind, []).append(forward)

    @contextmanager
    def disabled(self, kinds: Sequence[str] = KINDS) -> Iterator[None]:
        """Inside the block the model computes as if these kinds had never been replaced."""
        forwards = [f for kind in kinds for f in self.forwards.get(kind, []) if f.enabled]
        switches = [s for s in self.switches if s.kind in kinds]
        for forward in forwards:
            forward.enabled = False
        for switch in switches:
            switch.off()
        try:
            yield
        finally:
            for forward in forwards:
                forward.enabled = True
            for switch in switches:
                switch.on()
