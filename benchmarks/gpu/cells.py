"""The cells of the benchmark: who trains which model on which batch, each in a process of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Any

# contender -> the libraries it needs besides torch, transformers and peft
CONTENDERS: dict[str, tuple[str, ...]] = {
    "pronghorn": (),
    "pronghorn-recompute": (),
    "peft": (),
    "peft-recompute": (),
    "trl": ("trl", "datasets"),
    "liger": ("liger_kernel",),
    "unsloth": ("unsloth",),
    "pronghorn-nf4": (),
    "pronghorn-nf4-recompute": (),
    "peft-decoded-recompute": (),
    "peft-nf4-recompute": ("bitsandbytes",),
    "unsloth-nf4": ("unsloth", "bitsandbytes"),
}
OURS = ("pronghorn", "pronghorn-recompute", "pronghorn-nf4", "pronghorn-nf4-recompute")
# they compute what everybody must agree with; the first that fits the device is the reference
REFERENCES = ("peft", "peft-recompute")
# of bases in NF4: plain transformers + PEFT on 16-bit weights that have the decoded values
NF4_REFERENCES = ("peft-decoded-recompute",)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement; ``steps`` are timed after ``warmup`` ones."""

    contender: str
    shape: str
    batch: str
    device: str
    dtype: str
    steps: int = 10
    warmup: int = 3

    @property
    def references(self) -> tuple[str, ...]:
        """The contenders that compute what this one must agree with."""
        return NF4_REFERENCES if "nf4" in self.contender or "decoded" in self.contender else REFERENCES

    @property
    def name(self) -> str:
        """What ``--only`` selects by."""
        return f"{self.contender}/{self.shape}/{self.batch}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, to hand to the process that measures."""
        return asdict(self)


def default_cells(shape: str, device: str, dtype: str, *, quick: bool) -> list[Cell]:
    """The cells of a run, the most wanted first: a run that ends early has measured those."""
    small = shape == "tiny"
    rows, packed, long = ("tiny", "tiny-packed", "tiny") if small else ("2k", "2k-packed", "8k")
    plan = [("peft-recompute", rows), ("pronghorn", rows), ("pronghorn", packed)]
    if not quick:
        plan += [
            ("peft", rows),
            ("liger", rows),
            ("unsloth", rows),
            ("trl", rows),
            ("pronghorn-recompute", rows),
            ("peft-decoded-recompute", rows),
            ("pronghorn-nf4", rows),
            ("pronghorn-nf4-recompute", rows),
            ("unsloth-nf4", rows),
            ("peft-nf4-recompute", rows),
        ]
    if not quick and not small:
        plan += [("peft-recompute", long), ("pronghorn", long), ("liger", long), ("unsloth", long)]
        plan += [("pronghorn-recompute", "16k"), ("pronghorn-recompute", "64k")]
    steps = {"steps": 5, "warmup": 2} if quick or small else {}
    cells = [
        Cell(
            contender=c,
            shape=shape,
            batch=b,
            device=device,
            dtype=dtype,
            **(steps if b != "64k" else {"steps": 1, "warmup": 1}),
        )
        for c, b in plan
    ]
    if shape == "llama-3.1-8b" and not quick:
        cells += [
            Cell(contender=c, shape="qwen3-0.6b", batch=b, device=device, dtype=dtype)
            for c, b in (("peft", "2k"), ("pronghorn", "2k"), ("unsloth", "2k"))
        ]
    return cells


def select(cells: list[Cell], patterns: list[str]) -> list[Cell]:
    """Those whose name matches one of the patterns; a pattern without a slash is a contender."""
    if not patterns:
        return cells
    wanted = [p if "/" in p else f"{p}/*" for p in patterns]
    return [cell for cell in cells if any(fnmatch(cell.name, p) for p in wanted)]
