"""What an export did, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pronghorn.export.merged import MergeCounts
from pronghorn.export.verify_folder import Row

# below this share of changed elements most of an update is smaller than the stored dtype can hold
_LOST_SHARE = 0.5
_NAMES = 3


@dataclass(frozen=True)
class ExportReport:
    """The result of ``export``.

    ``changed_share`` is the share of elements that differ from the base's, of all elements in merged tensors
    (None for the lora format); ``changes`` lists every edit of a config or tokenizer file, ``onto`` says
    onto what a base in 4-bit was merged, or what an adapter trained on one computes on other values;
    ``left_out`` the base's files that were not copied. ``verified`` is None where no check was asked for;
    otherwise ``checks`` are its rows.
    """

    folder: Path
    format: str
    adapter: Path
    base: Path
    tensors_merged: int
    tensors_copied: int
    bytes_written: int
    changed_share: float | None
    warnings: tuple[str, ...]
    changes: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: float
    onto: str | None = None
    whole: bool = False
    """a whole model was given, with no adapter to merge: ``adapter`` is that model, too"""
    trained_on: Path | None = None
    """the 4-bit base of the training, where ``base`` is the 16-bit model it was made from"""
    verified: bool | None = None
    checks: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter was written, in a form that is served on other values than those in 4-bit."""
        return self.format in ("adapter", "gguf-lora")

    @property
    def quality(self) -> tuple[tuple[str, str, str], ...]:
        """What was measured of a quantised folder: its name, the value of base + adapter, the folder's."""
        return tuple(figures for row in self.checks for figures in row.figures)

    def __str__(self) -> str:
        """One line, and one for each warning and figure."""
        done = f"{self.format} on {self.base} written to {self.folder}"
        share = "" if self.changed_share is None else f", {self.changed_share:.1%} of their elements changed"
        merged = f"{self.tensors_merged} tensors merged{share}, {self.tensors_copied} copied"
        checked = f"verified ({len(self.checks)} checks)" if self.verified else "not verified"
        onto = [self.onto] if self.onto else []
        lines = [f"{done}: {merged}; {checked}", *onto, *(f"warning: {warning}" for warning in self.warnings)]
        lines += [f"  {name:<18}{before:>12} -> {after}" for name, before, after in self.quality]
        return "\n".join(lines)


def changed_share(counts: MergeCounts) -> float:
    """Changed elements of all elements in merged tensors."""
    total = sum(count.elements for count in counts.tensors.values())
    return sum(count.changed for count in counts.tensors.values()) / total if total else 0.0


def merge_warnings(counts: MergeCounts, updated: set[str], zero: list[str]) -> tuple[str, ...]:
    """Name updates that do nothing: one factor all zero, or smaller than rounding.

    Args:
        counts: changed elements by file tensor.
        updated: file tensors that get a low-rank update.
        zero: file tensors whose update is exactly zero.
    """
    found = []
    if zero:
        found.append(f"B*A is all zero, so nothing was learned, for {_listed(sorted(zero))}")
    lost = {
        name: count.changed / count.elements
        for name, count in counts.tensors.items()
        if name in updated and name not in zero and count.changed < _LOST_SHARE * count.elements
    }
    if lost:
        worst = min(lost.values())
        found.append(
            f"lost in rounding: under {_LOST_SHARE:.0%} of the elements changed (down to {worst:.1%}) in "
            f"{_listed(sorted(lost, key=lost.__getitem__))}: smaller than the base's dtype can hold"
        )
    return tuple(found)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMES])
    return shown if len(names) <= _NAMES else f"{shown} and {len(names) - _NAMES} more"
