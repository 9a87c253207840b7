"""Constructs that make code hard to follow or to trust are not used at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.guards.source import PACKAGE, Module, modules

DRAWERS = frozenset({"utils", "util", "helpers", "helper", "common", "misc"})
CALLS = frozenset({"exec", "eval", "compile"})
SOURCE_READERS = frozenset({"getsource", "getsourcelines"})
MUTABLE_TYPES = frozenset({"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque"})
MUTATORS = frozenset({"append", "extend", "insert", "remove", "pop", "popitem", "clear"}) | frozenset(
    {"sort", "reverse", "add", "discard", "update", "setdefault"}
)


def test_no_forbidden_construct() -> None:
    assert [broken for module in modules() for broken in forbidden(module)] == []


def test_no_mutable_module_state() -> None:
    assert [broken for module in modules() for broken in mutable_state(module)] == []


def test_no_drawer_for_odds_and_ends() -> None:
    names = {path.relative_to(PACKAGE).as_posix(): path.stem for path in PACKAGE.rglob("*")}
    assert [path for path, stem in names.items() if stem in DRAWERS] == []


def test_no_class_is_chosen_without_a_word_on_foreign_code() -> None:
    """transformers asks on the terminal, and runs it on "y", where ``trust_remote_code`` is not given."""
    assert [place for module in modules() for place in unasked(module)] == []
    for text, found in (
        ("AutoConfig.from_pretrained(folder)", True),
        ("transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)", True),
        ("AutoConfig.from_pretrained(folder, trust_remote_code=False)", False),
        ("AutoConfig.from_pretrained(folder, **common)", False),
        ("PeftModel.from_pretrained(model, folder)", False),
    ):
        assert bool(unasked(Module("m", text))) is found, text


def test_every_module_says_what_it_is_for() -> None:
    assert [module.name for module in modules() if not ast.get_docstring(module.tree)] == []


def test_the_checks_find_what_they_look_for() -> None:
    for text in (
        "exec('1')",
        "x = eval('1')",
        "import inspect\ninspect.getsource(f)",
        "from inspect import getsource",
        "from os import *",
        "try:\n    pass\nexcept:\n    pass",
        "def f():\n    global x\n    x = 1",
    ):
        assert forbidden(Module("m", text)), text
    assert (
        forbidden(Module("m", "model.eval()\nre.compile('x')\ntry:\n    pass\nexcept OSError:\n    pass"))
        == []
    )
    for text in (
        "cache = {}",
        "seen: set[str] = set()",
        "names = [n for n in 'ab']",
        "TABLE = {}\ndef f():\n    TABLE['x'] = 1",
        "TABLE = []\ndef f():\n    TABLE.append(1)",
        "TABLE = {1: 2}\ndef f():\n    del TABLE[1]",
        "TABLE = {1}\ndef f():\n    TABLE.add(2)",
    ):
        assert mutable_state(Module("m", text)), text
    assert mutable_state(Module("m", "__all__ = ['a']\nTABLE = {1: 2}\nNAMES = ('a',)\n")) == []


def forbidden(module: Module) -> list[str]:
    """Places that use a construct ruled out for the whole package."""
    return [f"{module.at(line)} {what}" for line, what in _constructs(module.tree)]


def unasked(module: Module) -> list[str]:
    """Calls of AutoConfig.from_pretrained and the like that do not say whether foreign code may run."""
    return [
        module.at(node.lineno)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value).rpartition(".")[2].startswith("Auto")
        and {None, "trust_remote_code"}.isdisjoint(one.arg for one in node.keywords)
    ]


def _constructs(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield node.lineno, f"{node.func.id}()"
        elif isinstance(node, ast.Attribute) and node.attr in SOURCE_READERS:
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and any(alias.name in SOURCE_READERS for alias in node.names):
            yield node.lineno, "source reader"
        elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            yield node.lineno, "star import"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except"
        elif isinstance(node, ast.Global):
            yield node.lineno, "global"


def mutable_state(module: Module) -> list[str]:
    """Module-level lists, dicts and sets that are not constants, and constants that are changed."""
    broken, constants = [], set()
    for name, node in _module_containers(module.tree):
        if name == "__all__":
            continue
        if name.isupper():
            constants.add(name)
        else:
            broken.append(f"{module.at(node.lineno)} {name} is mutable")
    changes = _changed_names(module.tree)
    return broken + [f"{module.at(line)} {name} is changed" for line, name in changes if name in constants]


def _module_containers(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    literals = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        called = node.value.func if isinstance(node.value, ast.Call) else None
        made = isinstance(called, ast.Name) and called.id in MUTABLE_TYPES
        if not made and not isinstance(node.value, literals):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                yield target.id, node


def _changed_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        holder: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            holder = node.value
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
        ):
            holder = node.func.value
        elif isinstance(node, ast.AugAssign):
            holder = node.target
        if isinstance(holder, ast.Name):
            yield node.lineno, holder.id
