"""Run in a process of its own: does importing pronghorn, or using it, change any object of another library?

``python -m tests.guards.fingerprint FOLDER REPORT`` looks, imports all of pronghorn, looks again, loads,
trains and merges in FOLDER, looks a third time, and writes what differs to REPORT as JSON.

Watched: in every module of ``LIBRARIES`` that is loaded, each function and class by identity; each function's
code and defaults; each entry of each class by identity, and its bases.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from tests.guards.whole_road import train_and_merge

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")
# loaded before the first look, beside every public name of transformers, peft and trl
PACKAGES = ("torch.nn", "torch.optim", "torch.utils.data", "torch.amp", "transformers.integrations", "peft")


def load_libraries() -> None:
    """Import what a person may use of the libraries; what needs something not installed is left out."""
    import peft
    import transformers
    import trl

    for package in PACKAGES:
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            with suppress(Exception):
                importlib.import_module(found.name)
    for library in (transformers, peft, trl):  # 20 s for all models of transformers
        for name in dir(library):
            with suppress(Exception):
                getattr(library, name)


def watched() -> dict[str, Any]:
    """Every watched object under a name; holding the objects keeps their identities from being used again."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in LIBRARIES and isinstance(module, ModuleType):
            for name, value in list(vars(module).items()):
                if isinstance(value, type) or callable(value):
                    found[f"{module_name}.{name}"] = value
                    found.update(_inside(f"{module_name}.{name}", value))
    return found


def _inside(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, FunctionType):
        yield f"{name}.__code__", value.__code__
        yield f"{name}.__defaults__", value.__defaults__
        yield f"{name}.__kwdefaults__", value.__kwdefaults__
    elif isinstance(value, type) and value.__module__.partition(".")[0] in LIBRARIES:
        yield f"{name}.__bases__", value.__bases__
        for entry, member in list(vars(value).items()):
            if callable(member) or isinstance(member, classmethod | staticmethod | property):
                yield f"{name}.{entry}", member
                if isinstance(member, FunctionType):
                    yield f"{name}.{entry}.__code__", member.__code__


def changes(before: dict[str, Any]) -> list[str]:
    """Names that now stand for another object, or for none."""
    after = watched()
    return sorted(name for name, value in before.items() if after.get(name, before) is not value)


def import_everything() -> None:
    """Import pronghorn, resolve its public names, and import each of its modules."""
    import pronghorn

    for name in pronghorn.__all__:
        getattr(pronghorn, name)
    for found in pkgutil.walk_packages(pronghorn.__path__, "pronghorn."):
        importlib.import_module(found.name)


def main(folder: str, report: str) -> None:
    """Look, import, look, use, look; write the report."""
    load_libraries()
    before = watched()
    import_everything()
    after_import = changes(before)
    train_and_merge(folder)
    found = {"watched": len(before), "after_import": after_import, "after_use": changes(before)}
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
