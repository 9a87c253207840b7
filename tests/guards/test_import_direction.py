"""Rooms import downwards only, and three rooms have stricter rules of their own."""

from __future__ import annotations

import subprocess
import sys

from tests.guards.source import COMPUTED, Module, modules

# from the floor up; a room imports from lower levels and from itself
LEVELS = (
    ("errors", "settings", "hardware", "versions"),
    ("weights",),
    ("sources",),
    ("ops",),
    ("quant",),
    ("attention",),
    ("memory",),
    ("data",),
    ("adapters",),
    ("patching",),
    ("loading",),
    ("export",),
    ("training",),
    ("serving", "reports"),
    ("fast",),
    ("cli", "__main__"),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
COMPUTES_IMPORTS = frozenset({"pronghorn", "pronghorn.cli.main"})  # from literal tables of their own
NEVER = {
    "export": frozenset({"loading", "patching", "training"}),
    "ops": frozenset({"transformers", "peft"}),
}


def test_rooms_import_downwards_only() -> None:
    assert [broken for module in modules() for broken in upward_imports(module)] == []


def test_every_room_has_a_level() -> None:
    assert {module.room for module in modules()} - {""} <= LEVEL.keys()


def test_only_two_modules_compute_what_they_import() -> None:
    found = {module.name for module in modules() for each in module.imports() if each.target == COMPUTED}
    assert found == COMPUTES_IMPORTS


def test_rooms_keep_away_from_what_they_must_not_know() -> None:
    assert [broken for module in modules() for broken in banned_imports(module)] == []


def test_the_verifier_shares_no_code_with_the_exporter() -> None:
    assert [broken for module in modules() for broken in verifier_imports(module)] == []


def test_the_running_verifier_loads_nothing_else_of_ours() -> None:
    program = (
        "import sys, pronghorn.export.verify\n"
        "print(*sorted(name for name in sys.modules if name.split('.')[0] == 'pronghorn'))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    allowed = {"pronghorn", "pronghorn.errors", "pronghorn.export"}
    ours = finished.stdout.split()
    assert "pronghorn.export.verify" in ours
    assert [name for name in ours if name not in allowed and not is_verifier(name)] == []


def test_the_checks_find_what_they_look_for() -> None:
    floor = Module("pronghorn.weights.x", "def f():\n    from pronghorn.export import run\n")
    assert upward_imports(floor) == ["pronghorn.weights.x:2 imports pronghorn.export.run"]
    relative = Module("pronghorn.data.x", "from ..training import run\n")
    assert upward_imports(relative) == ["pronghorn.data.x:1 imports pronghorn.training.run"]
    through_root = Module("pronghorn.cli.x", "from pronghorn import load\n")
    assert upward_imports(through_root) == ["pronghorn.cli.x:1 imports pronghorn.load"]
    hidden = Module("pronghorn.data.x", "import importlib\nimportlib.import_module('pronghorn.cli')\n")
    assert upward_imports(hidden) == ["pronghorn.data.x:2 imports pronghorn.cli"]
    assert upward_imports(Module("pronghorn.cli.x", "from pronghorn import __version__\n")) == []
    export = Module("pronghorn.export.x", "import pronghorn.loading.load\n")
    assert banned_imports(export) == ["pronghorn.export.x:1 imports pronghorn.loading.load"]
    assert banned_imports(Module("pronghorn.ops.x", "import peft.tuners\n")) != []
    verifier = Module("pronghorn.export.verify_x", "from pronghorn.weights import shards\n")
    assert verifier_imports(verifier) == ["pronghorn.export.verify_x:1 imports pronghorn.weights.shards"]


def upward_imports(module: Module) -> list[str]:
    """Imports of a room above, or of the package itself (which stands above all rooms)."""
    if module.name == "pronghorn":  # its names are looked up on first use; TYPE_CHECKING imports are not run
        return []
    broken = []
    for found in module.imports():
        parts = found.target.split(".")
        if parts[0] != "pronghorn" or found.target == "pronghorn.__version__":
            continue
        room = parts[1] if len(parts) > 1 else ""
        if room != module.room and LEVEL.get(room, len(LEVELS)) >= LEVEL[module.room]:
            broken.append(f"{module.at(found.line)} imports {found.target}")
    return broken


def banned_imports(module: Module) -> list[str]:
    """Imports that ``NEVER`` forbids this module's room."""
    banned = NEVER.get(module.room, frozenset())
    broken = []
    for found in module.imports():
        top, _, rest = found.target.partition(".")
        known = rest.partition(".")[0] if top == "pronghorn" else top
        if known in banned:
            broken.append(f"{module.at(found.line)} imports {found.target}")
    return broken


def is_verifier(name: str) -> bool:
    """Whether a module belongs to the part that runs in a fresh process."""
    return name.startswith("pronghorn.export.verify")


def verifier_imports(module: Module) -> list[str]:
    """Imports by ``export/verify*.py`` of anything of ours but the errors and its own siblings."""
    if not is_verifier(module.name):
        return []
    return [
        f"{module.at(found.line)} imports {found.target}"
        for found in module.imports()
        if found.target.split(".")[0] == "pronghorn"
        and not found.target.startswith("pronghorn.errors.")
        and not is_verifier(found.target)
    ]
