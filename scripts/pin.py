"""Write a constraints file from the packages installed here: ``python scripts/pin.py FILE``.

Local labels such as ``+cpu`` are dropped, so that a pin fits every build of a version. A package whose
version needs a newer Python than the oldest one pronghorn supports is pinned from that newer one on.
"""

from __future__ import annotations

import sys
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

OLDEST_PYTHON = "3.10"
NOT_PINNED = frozenset({"pronghorn", "pip", "setuptools", "wheel"})


def pins() -> list[str]:
    """One line per installed package, sorted by name."""
    newer = f'; python_version >= "{sys.version_info.major}.{sys.version_info.minor}"'
    lines = []
    for package in distributions():
        name = canonicalize_name(package.metadata["Name"])
        if name in NOT_PINNED or name.startswith("nvidia-"):  # torch pins these
            continue
        needs = SpecifierSet(package.metadata.get("Requires-Python", ""))
        marker = "" if OLDEST_PYTHON in needs else newer
        lines.append(f"{name}=={Version(package.version).public}{marker}")
    return sorted(set(lines))


if __name__ == "__main__":
    (target,) = sys.argv[1:]
    header = "# Every version of one tested environment. Written by scripts/pin.py, which says how.\n"
    Path(target).write_text(header + "\n".join(pins()) + "\n")
