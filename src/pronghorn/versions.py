"""The library versions the tests have run on, and one warning for those outside of that range."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

# from the oldest stack of `make test-matrix` up to the minor version after that of the newest
TESTED: Mapping[str, str] = MappingProxyType(
    {
        "torch": ">=2.8,<2.14",
        "transformers": ">=4.56.2,<5.24",
        "peft": ">=0.17.1,<0.22",
        "trl": ">=0.23,<1.17",
        "accelerate": ">=1.10,<1.16",
        "bitsandbytes": ">=0.50,<0.51",
    }
)
_RULE = re.compile(r"(>=|<=|==|!=|<|>)\s*([0-9][^,\s]*)")


def untested(versions: Mapping[str, str]) -> list[str]:
    """Those of ``versions`` (name -> version) that are outside the tested range, and their ranges."""
    return [
        f"{name} {versions[name]} (tested: {rules})"
        for name, rules in TESTED.items()
        if name in versions and not satisfies(versions[name], rules)
    ]


def warn_untested() -> None:
    """Name the installed libraries outside the tested range in one warning, shown once a process."""
    installed = {}
    for name in TESTED:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:  # an extra
            continue
    if found := untested(installed):
        warnings.warn(
            f"pronghorn has not been tested with {', '.join(found)}: install a version in that range, or run "
            "its tests on this one",
            stacklevel=1,  # this line: shown once, whoever asks
        )


def satisfies(version: str, rules: str) -> bool:
    """Whether a version keeps ``>=1.2,<2``; labels such as +cpu and pre-release marks do not count."""
    have = numbers(version)
    for sign, text in _RULE.findall(rules):
        prefix = text.endswith(".*")
        want = numbers(text)
        size = max(len(have), len(want))
        left, right = (one + (0,) * (size - len(one)) for one in (have, want))
        if prefix:
            left, right = have[: len(want)], want
        order = (left > right) - (left < right)
        kept = {
            ">=": order >= 0,
            "<=": order <= 0,
            "==": order == 0,
            "!=": order != 0,
            "<": order < 0,
            ">": order > 0,
        }
        if not kept[sign]:
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version: (2, 13, 0) of "2.13.0+cpu"; empty where it has none."""
    match = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(map(int, match[0].split("."))) if match else ()
