"""Keywords that notebooks pass and that have no effect here: refused with the reason, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pronghorn.errors import ConfigError, NotSupportedError


@dataclass(frozen=True)
class Refused:
    """A known keyword without effect here: the values that ask for nothing, and why any other is refused."""

    neutral: tuple[Any, ...]
    reason: str
    fix: str = "leave it out"


def refuse(call: str, given: Mapping[str, Any], known: Mapping[str, Refused], function: Any) -> None:
    """Raise for a keyword that ``function`` does not take, unless it asks for nothing.

    Raises:
        ConfigError: an unknown name, with the closest known one.
        NotSupportedError: a known name with a value that would have no effect, with the reason.
    """
    for name, value in given.items():
        rule = known.get(name)
        if rule is None:
            code = function.__code__
            names = [*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *known]
            close = get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{call} has no keyword {name!r}",
                fix=f"did you mean {close[0]}?" if close else "leave it out",
            )
        if not any(value is one or value == one for one in rule.neutral):
            raise NotSupportedError(f"{name}={value!r}: {rule.reason}", fix=rule.fix)
