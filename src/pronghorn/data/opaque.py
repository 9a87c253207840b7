"""Whether a chat template can look into what messages say, or only write it out.

A template that only writes texts out gives the same pieces between them for all conversations of the
same roles:
rendered once with placeholders, it need not be rendered again. Read from the template's syntax tree.
Each operation
on a text must commute with putting another text in its place, under conditions that ``Conditions``
collects; any
operation that is not known to do so makes the template one that is rendered for each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

# What an expression may hold. ``text``: made of message texts and fixed strings; ``content``: surely one
# message's
# whole text; ``message``: a message, or what raises if its text is asked for; ``maybe``: that or a fixed
# thing.
Kind = Literal["fixed", "text", "content", "texts", "message", "maybe", "messages"]

_TEXT: tuple[Kind, ...] = ("text", "content")
_MESSAGE: tuple[Kind, ...] = ("message", "maybe")
# Of a string that is not empty, what jinja's tests say.
_TESTS = MappingProxyType(
    {
        **dict.fromkeys(("string", "defined", "iterable", "sequence"), True),
        **dict.fromkeys(("none", "mapping", "undefined", "number", "boolean"), False),
    }
)
ROLES = ("system", "user", "assistant")
_KEYS = ("role", "content")  # all that messages of these roles have here
_ROUNDS = 20  # each round widens at least one variable; real templates need 3
_INLINE = {"strip": "ends", "lstrip": "ends", "rstrip": "ends"}
_ASKING = ("startswith", "endswith")


class _Generation(Extension):
    """``{% generation %}``, with which some templates mark answers: it writes what it holds."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _UnprovenError(Exception):
    """An operation that might tell one text from another."""


@dataclass
class Conditions:
    """What texts must be like: they neither hold nor touch a needle, and begin and end with none of
    ``ends``."""

    needles: set[str] = field(default_factory=set)
    ends: set[str] = field(default_factory=set)
    trims: bool = False  # whitespace at the ends is cut as well


def conditions(template: str) -> Conditions | None:
    """The conditions on message texts under which ``template`` does not look into them; None if it may."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
        return _Reader().read(tree)
    except (TemplateError, _UnprovenError, RecursionError):
        return None


class _Reader:
    """Goes through a template until the kinds of its variables no longer change, whatever the order of
    turns."""

    def __init__(self) -> None:
        self.kinds: dict[str, Kind] = {
            "messages": "messages"
        }  # of variables, ``ns.attribute`` and ``macro()``
        self.macros: dict[str, list[str]] = {}  # and their parameters
        self.found = Conditions()
        self.written: list[Kind] = ["fixed"]  # by the template, and by each block or macro being read

    def read(self, tree: nodes.Template) -> Conditions:
        for _ in range(_ROUNDS):
            before = dict(self.kinds)
            self._body(tree.body)
            if self.kinds == before:
                return self.found
        raise _UnprovenError

    def _bind(self, name: str, kind: Kind) -> None:
        self.kinds[name] = _joined(self.kinds.get(name, kind), kind)

    # Statements

    def _body(self, body: Sequence[nodes.Node]) -> None:
        for node in body:
            method = getattr(self, f"_do_{type(node).__name__.lower()}", None)
            if method is None:
                raise _UnprovenError
            method(node)

    def _do_output(self, node: nodes.Output) -> None:
        for part in node.nodes:
            if not isinstance(part, nodes.TemplateData):
                self._write(part)

    def _write(self, part: nodes.Expr) -> None:
        kind = self._kind(part)
        if kind not in ("fixed", *_TEXT):
            raise _UnprovenError
        self.written[-1] = _joined(self.written[-1], kind)

    def _do_if(self, node: nodes.If) -> None:
        for branch in (node, *node.elif_):
            truth = self._truth(branch.test)
            if truth is not False:
                self._body(branch.body)
            if truth:
                return
        self._body(node.else_)

    def _do_for(self, node: nodes.For) -> None:
        if node.recursive:
            raise _UnprovenError
        kind = self._kind(node.iter)
        if kind == "messages" and isinstance(node.target, nodes.Name):
            self._bind(node.target.name, "message")
        elif kind == "fixed":
            self._bind_all(node.target)
        else:
            raise _UnprovenError
        if node.test is not None:
            self._truth(node.test)
        self._body(node.body)
        self._body(node.else_)

    def _do_assign(self, node: nodes.Assign) -> None:
        call = node.node
        if (
            isinstance(call, nodes.Call)
            and isinstance(call.node, nodes.Name)
            and call.node.name == "namespace"
        ):
            if call.args or call.dyn_args is not None or call.dyn_kwargs is not None:
                raise _UnprovenError
            for each in call.kwargs:
                self._bind(f"{_target(node.target)}.{each.key}", self._kind(each.value))
            return
        kind = self._kind(node.node)
        if isinstance(node.target, nodes.Tuple) and kind == "fixed":
            self._bind_all(node.target)
        else:
            # a variable may be read before it is set
            self._bind(_target(node.target), "text" if kind == "content" else kind)

    def _bind_all(self, target: nodes.Node) -> None:
        for name in (target,) if isinstance(target, nodes.Name) else target.find_all(nodes.Name):
            self._bind(name.name, "fixed")

    def _do_assignblock(self, node: nodes.AssignBlock) -> None:
        if node.filter is not None:
            raise _UnprovenError
        self._bind(_target(node.target), self._captured(node.body))

    def _do_macro(self, node: nodes.Macro) -> None:
        if any(self._kind(default) != "fixed" for default in node.defaults):
            raise _UnprovenError
        self.macros[node.name] = [argument.name for argument in node.args]
        self._bind(f"{node.name}()", self._captured(node.body))

    def _captured(self, body: Sequence[nodes.Node]) -> Kind:
        self.written.append("fixed")
        self._body(body)
        return self.written.pop()

    def _do_exprstmt(self, node: nodes.ExprStmt) -> None:
        self._kind(node.node)

    def _do_break(self, node: nodes.Node) -> None:
        """Where a loop ends depends on tests only."""

    _do_continue = _do_break

    # Tests

    def _truth(self, node: nodes.Node) -> bool | None:
        """Whether a test holds, None if that depends on more than the kinds. Parts never reached are not
        read."""
        if isinstance(node, nodes.Not):
            truth = self._truth(node.node)
            return None if truth is None else not truth
        if isinstance(node, (nodes.And, nodes.Or)):
            decides = isinstance(node, nodes.Or)
            left = self._truth(node.left)
            if left is decides:
                return decides
            right = self._truth(node.right)
            return right if left is not None or right is decides else None
        if self._absent(node):
            return False
        self._kind(node)
        if isinstance(node, nodes.Test) and self._kind(node.node) == "content":
            return _TESTS[node.name]
        return None  # no text is empty, so a text is true whatever it says

    def _absent(self, node: nodes.Node) -> bool:
        """Whether a test asks for a role that no message has, or for a key other than role and content."""
        if isinstance(node, nodes.Test) and node.name == "defined":
            return self._absent(node.node)
        if isinstance(node, nodes.Compare) and len(node.ops) == 1 and node.ops[0].op == "eq":
            asked = node.ops[0].expr
            strange = isinstance(asked, nodes.Const) and asked.value not in ROLES
            return strange and self._key_of_message(node.expr) == "role"
        if isinstance(node, nodes.Compare) and len(node.ops) == 1 and node.ops[0].op == "in":
            asked = node.expr
            strange = isinstance(asked, nodes.Const) and asked.value not in _KEYS
            return strange and self._kind(node.ops[0].expr) == "message"
        return self._key_of_message(node) not in (None, *_KEYS)

    def _key_of_message(self, node: nodes.Node) -> str | None:
        """The name of what is taken out of a message here, if anything is."""
        if not isinstance(node, (nodes.Getattr, nodes.Getitem)):
            return None
        key: object = None
        if isinstance(node, nodes.Getattr):
            key = node.attr
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
            key = node.arg.value
        if not isinstance(key, str) or _dotted(node.node, key) in self.kinds:
            return None
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return None
        return key if self._kind(node.node) == "message" and not hasattr(dict, key) else None

    # Expressions

    def _kind(self, node: nodes.Node) -> Kind:
        method = getattr(self, f"_of_{type(node).__name__.lower()}", None)
        if method is not None:
            kind: Kind = method(node)
            return kind
        if isinstance(node, (nodes.Literal, nodes.BinExpr, nodes.UnaryExpr, nodes.Slice, nodes.Pair)):
            return self._all_fixed(node)
        raise _UnprovenError

    def _all_fixed(self, node: nodes.Node) -> Kind:
        if any(self._kind(child) != "fixed" for child in node.iter_child_nodes()):
            raise _UnprovenError
        return "fixed"

    def _of_templatedata(self, node: nodes.TemplateData) -> Kind:
        return "fixed"

    def _of_name(self, node: nodes.Name) -> Kind:
        """A namespace that holds texts, or a macro, is only good for what is done with it by name."""
        holds = any(key.startswith(f"{node.name}.") and self.kinds[key] != "fixed" for key in self.kinds)
        if holds or node.name in ("self", "caller", "varargs", "kwargs", "loop", *self.macros):
            raise _UnprovenError
        return self.kinds.get(node.name, "fixed")

    def _of_nsref(self, node: nodes.NSRef) -> Kind:
        return self.kinds.get(f"{node.name}.{node.attr}", "fixed")

    def _of_getattr(self, node: nodes.Getattr) -> Kind:
        if (known := self.kinds.get(_dotted(node.node, node.attr))) is not None:
            return known
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return "maybe" if node.attr in ("previtem", "nextitem") else "fixed"
        return self._member(self._kind(node.node), node.attr)

    def _member(self, kind: Kind, key: object) -> Kind:
        """Of a message, only its text depends on what it says."""
        if kind == "fixed":
            return "fixed"
        if kind not in _MESSAGE or not isinstance(key, str) or hasattr(dict, key):
            raise _UnprovenError
        if key != "content":
            return "fixed"
        return "content" if kind == "message" else "text"

    def _of_getitem(self, node: nodes.Getitem) -> Kind:
        key = node.arg.value if isinstance(node.arg, nodes.Const) else None
        if (known := self.kinds.get(_dotted(node.node, key))) is not None:
            return known
        kind = self._kind(node.node)
        if kind == "messages" and isinstance(node.arg, nodes.Slice):
            self._all_fixed(node.arg)
            return "messages"
        if self._kind(node.arg) != "fixed":
            raise _UnprovenError
        if kind == "messages":
            return "message"
        return "text" if kind == "texts" else self._member(kind, key)

    def _of_concat(self, node: nodes.Concat) -> Kind:
        kinds = [self._kind(part) for part in node.nodes]
        if any(kind not in ("fixed", *_TEXT) for kind in kinds):
            raise _UnprovenError
        return "text" if any(kind in _TEXT for kind in kinds) else "fixed"

    def _of_add(self, node: nodes.Add) -> Kind:
        return self._of_concat(nodes.Concat([node.left, node.right]))

    def _of_condexpr(self, node: nodes.CondExpr) -> Kind:
        truth = self._truth(node.test)
        kinds = []
        if truth is not False:
            kinds.append(self._kind(node.expr1))
        if truth is not True:
            kinds.append(self._kind(node.expr2) if node.expr2 is not None else "fixed")
        return kinds[0] if len(kinds) == 1 else _joined(*kinds)

    def _of_not(self, node: nodes.Not) -> Kind:
        self._truth(node.node)
        return "fixed"

    def _of_and(self, node: nodes.And | nodes.Or) -> Kind:
        decides = isinstance(node, nodes.Or)
        if self._truth(node.left) is decides:
            return self._kind(node.left)
        return _joined(self._kind(node.left), self._kind(node.right))

    _of_or = _of_and

    def _of_test(self, node: nodes.Test) -> Kind:
        """A test without arguments asks for the kind of thing, not for what a text says."""
        kind = self._kind(node.node)
        if kind == "fixed":
            return self._all_fixed(node)
        if node.name not in _TESTS or node.args or node.kwargs:
            raise _UnprovenError
        return "fixed"

    def _of_compare(self, node: nodes.Compare) -> Kind:
        left = self._kind(node.expr)
        kinds = [self._kind(operand.expr) for operand in node.ops]
        if left == "fixed" and all(kind == "fixed" for kind in kinds):
            return "fixed"
        if len(kinds) == 1:
            right, operator = node.ops[0].expr, node.ops[0].op
            if operator in ("in", "notin") and kinds[0] in _TEXT:
                self._needle(node.expr)
                return "fixed"
            if operator in ("in", "notin") and kinds[0] in _MESSAGE and isinstance(node.expr, nodes.Const):
                return "fixed"
            if operator in ("eq", "ne") and left in _TEXT:
                if not isinstance(right, nodes.Const) or isinstance(right.value, str):
                    self._needle(right)
                return "fixed"
        raise _UnprovenError

    def _needle(self, node: nodes.Node) -> None:
        if not isinstance(node, nodes.Const) or not isinstance(node.value, str):
            raise _UnprovenError
        if node.value:
            self.found.needles.add(node.value)

    def _of_filter(self, node: nodes.Filter) -> Kind:
        if node.node is None:
            raise _UnprovenError
        kind = self._kind(node.node)
        for argument in (*node.args, *(each.value for each in node.kwargs)):
            if self._kind(argument) != "fixed":
                raise _UnprovenError
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _UnprovenError
        if kind == "fixed":
            return kind
        if kind in _TEXT and node.name == "trim" and not node.args and not node.kwargs:
            self.found.trims = True
            return "text"
        if kind in _TEXT and node.name in ("string", "default", "d"):
            return "text"
        return self._of_sequence(kind, node)

    def _of_sequence(self, kind: Kind, node: nodes.Filter) -> Kind:
        if kind in ("texts", "messages") and node.name in ("length", "count"):
            return "fixed"
        if kind in ("texts", "messages") and node.name in ("first", "last"):
            return "text" if kind == "texts" else "message"
        key = node.args[0].value if node.args and isinstance(node.args[0], nodes.Const) else None
        by_role = isinstance(key, str) and not hasattr(dict, key) and not {"content", ""} & {*key.split(".")}
        if kind == "messages" and (
            node.name == "list" or (node.name in ("selectattr", "rejectattr") and by_role)
        ):
            return "messages"
        raise _UnprovenError

    def _of_call(self, node: nodes.Call) -> Kind:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _UnprovenError
        if isinstance(node.node, nodes.Getattr):
            kind = self._kind(node.node.node)
            if kind in _TEXT:
                return self._of_method(node.node.attr, node)
            if (
                kind in _MESSAGE
                and node.node.attr == "get"
                and node.args
                and isinstance(node.args[0], nodes.Const)
            ):
                for other in node.args[1:]:
                    self._all_fixed(other)
                return _joined(self._member(kind, node.args[0].value), "fixed")
        if isinstance(node.node, nodes.Name) and node.node.name in self.macros:
            return self._of_macro_call(node.node.name, node)
        values = (*node.args, *(each.value for each in node.kwargs))
        if any(self._kind(value) != "fixed" for value in values) or self._kind(node.node) != "fixed":
            raise _UnprovenError
        return "fixed"

    def _of_method(self, name: str, node: nodes.Call) -> Kind:
        if node.kwargs or len(node.args) > 1 + (name == "split"):
            raise _UnprovenError
        if name in _INLINE and not node.args:
            self.found.trims = True
            return "text"
        if (
            not node.args
            or not isinstance(node.args[0], nodes.Const)
            or not isinstance(node.args[0].value, str)
        ):
            raise _UnprovenError
        if name in _INLINE:
            self.found.ends |= {*node.args[0].value}
            return "text"
        self._needle(node.args[0])
        for other in node.args[1:]:
            self._all_fixed(other)
        if name == "split":
            return "texts"
        if name in _ASKING:
            return "fixed"
        raise _UnprovenError

    def _of_macro_call(self, name: str, node: nodes.Call) -> Kind:
        names = self.macros[name]
        if len(node.args) > len(names) or any(each.key not in names for each in node.kwargs):
            raise _UnprovenError
        given = {
            **dict(zip(names, node.args, strict=False)),
            **{each.key: each.value for each in node.kwargs},
        }
        for parameter in names:
            self._bind(parameter, self._kind(given[parameter]) if parameter in given else "fixed")
        return self.kinds.get(f"{name}()", "fixed")


def _dotted(node: nodes.Node, key: object) -> str:
    return f"{node.name}.{key}" if isinstance(node, nodes.Name) and isinstance(key, str) else ""


def _target(node: nodes.Node) -> str:
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Name):
        return str(node.name)
    raise _UnprovenError


def _joined(one: Kind, other: Kind) -> Kind:
    """What a variable holds that may hold either."""
    if one == other:
        return one
    kinds = {one, other}
    for known, wider in (
        (("fixed", *_TEXT), "text"),
        (("fixed", *_MESSAGE), "maybe"),
        (("fixed", "texts"), "texts"),
    ):
        if kinds <= {*known}:
            return wider  # type: ignore[return-value]  # the literals of the line above
    raise _UnprovenError
