"""Run in a process of its own where some libraries are not installed: load, attach, one step, save.

``python -m tests.guards.without_optional FOLDER NAME ...``; FOLDER holds a tiny base in ``base``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType


class WithoutSome:
    """A meta path finder for which some top-level packages, and their metadata, are not there."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in self.names:
            return None
        return PathFinder.find_spec(name, path, target)

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        for found in MetadataPathFinder.find_distributions(context):
            if found.metadata["Name"] not in self.names:
                yield found


def main(folder: str, *missing: str) -> None:
    """Use the loading and attaching rooms as a person without those libraries would."""
    sys.meta_path[:] = [WithoutSome(missing) if finder is PathFinder else finder for finder in sys.meta_path]

    import pronghorn

    model, tokenizer = pronghorn.load(Path(folder) / "base")
    model = pronghorn.attach_lora(model, pronghorn.LoraOptions(r=4))
    batch = tokenizer("one step", return_tensors="pt")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.save_pretrained(Path(folder) / "adapter")
    assert not [name for name in missing if name in sys.modules]


if __name__ == "__main__":
    main(*sys.argv[1:])
