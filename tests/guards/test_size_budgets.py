"""Files, functions and signatures stay small enough to be read in one sitting."""

from __future__ import annotations

import ast
from statistics import median

from tests.guards.source import Module, modules

FILE_LINES = 600
MEDIAN_FILE_LINES = 220
FUNCTION_LINES = 80
KERNEL_LINES = 150  # a Triton kernel
PARAMETERS = 8
# the drop-in names keep the signatures that notebooks already call; a command's options are its signature
MANY_PARAMETERS = frozenset(
    {"pronghorn.fast.model", "pronghorn.fast.saving", "pronghorn.cli.export", "pronghorn.cli.verify"}
)

Function = ast.FunctionDef | ast.AsyncFunctionDef


def test_files_are_short() -> None:
    assert [module.name for module in modules() if lines(module) > FILE_LINES] == []


def test_the_usual_file_is_much_shorter() -> None:
    assert median(lines(module) for module in modules() if not module.is_package) < MEDIAN_FILE_LINES


def test_functions_are_short() -> None:
    assert [broken for module in modules() for broken in long_functions(module)] == []


def test_signatures_are_short() -> None:
    checked = [module for module in modules() if module.name not in MANY_PARAMETERS]
    assert [broken for module in checked for broken in long_signatures(module)] == []


def test_the_checks_find_what_they_look_for() -> None:
    body = "    pass\n" * (FUNCTION_LINES - 1)
    assert long_functions(Module("m", f"def f():\n{body}")) == []
    assert long_functions(Module("m", f"def f():\n{body}    pass\n")) == ["m:1 f has 81 lines"]
    assert long_functions(Module("m", f"@triton.jit\ndef f():\n{body}    pass\n")) == []
    assert long_signatures(Module("m", "def f(a, b, c, d, /, e, f, *, g, h): ...")) == []
    assert long_signatures(Module("m", "def f(a, b, c, d, e, f, g, h, *i): ...")) == ["m:1 f takes 9"]
    assert long_signatures(Module("m", "@triton.jit\ndef f(a, b, c, d, e, f, g, h, i): ...")) == []
    method = "class C:\n    def f(self, a, b, c, d, e, f, g, h): ...\n"
    assert long_signatures(Module("m", method)) == []


def lines(module: Module) -> int:
    """Lines of a file, blank ones and comments included."""
    return len(module.text.splitlines())


def functions(module: Module) -> list[Function]:
    """Every function and method, nested ones included."""
    return [node for node in ast.walk(module.tree) if isinstance(node, Function)]


def long_functions(module: Module) -> list[str]:
    """Functions over budget, decorators not counted."""
    broken = []
    for function in functions(module):
        length = (function.end_lineno or 0) - function.lineno + 1
        if length > (KERNEL_LINES if is_kernel(function) else FUNCTION_LINES):
            broken.append(f"{module.at(function.lineno)} {function.name} has {length} lines")
    return broken


def is_kernel(function: Function) -> bool:
    """Whether Triton compiles it: its parameters are pointers, strides and sizes, and cannot be objects."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_signatures(module: Module) -> list[str]:
    """Functions that take more than ``PARAMETERS`` besides ``self`` or ``cls``; kernels are not counted."""
    broken = []
    for function in functions(module):
        if is_kernel(function):
            continue
        spec = function.args
        named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        names = [argument.arg for argument in named if argument is not None]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > PARAMETERS:
            broken.append(f"{module.at(function.lineno)} {function.name} takes {count}")
    return broken
