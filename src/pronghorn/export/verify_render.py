"""Chat templates rendered in a process of their own, with limits on time, memory and output.

A template is a program that came with a model. jinja2's sandbox keeps it from the machine; it does not keep
it from looping for ever or from filling the memory. This file is also the program of that process, so it
imports nothing of ours when it is started by its path. It gives a template what transformers gives one.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

Turns = Sequence[Mapping[str, str]]  # role and content each

SECONDS = 10.0  # of computing; ordinary templates take a millisecond
WAIT_SECONDS = 60.0  # by the clock: the start of the process takes a tenth, on a busy machine some
MEMORY_BYTES = 1 << 30  # of address space; jinja2 takes 30 MB
OUTPUT_BYTES = 1 << 20  # two short messages become a few hundred


class RenderError(ValueError):
    """The template refused the messages, or is no template."""


class EndlessError(RenderError):
    """The template did not finish within the limits."""


class UnrenderedError(RenderError):
    """The process ended without an answer, which says nothing about the template."""


def rendered(template: str, messages: Turns, special: Mapping[str, Any], *, prompt: bool) -> str:
    """A conversation as the template writes it; ``prompt``: with what opens the assistant's answer.

    Raises:
        RenderError: what the template said.
        EndlessError, UnrenderedError: as ``rendered_each``.
    """
    (found,) = rendered_each(template, [(messages, prompt)], special)
    if isinstance(found, RenderError):
        raise found
    return found


def rendered_each(
    template: str, asked: Sequence[tuple[Turns, bool]], special: Mapping[str, Any]
) -> list[str | RenderError]:
    """Conversations as the template writes them, by one process; what it said where it refuses one.

    Args:
        template: Jinja, as in tokenizer_config.json.
        asked: messages, and whether they end with what opens the assistant's answer.
        special: Texts of the special tokens, by name (bos_token ...).

    Raises:
        EndlessError: it took more than ``SECONDS`` or ``MEMORY_BYTES``, or one more than ``OUTPUT_BYTES``.
        UnrenderedError: its process failed.
    """
    given = [
        {
            "messages": list(turns),
            "add_generation_prompt": prompt,
            "tools": None,
            "documents": None,
            **special,
        }
        for turns, prompt in asked
    ]
    said = json.loads(
        _asked(json.dumps({"template": template, "given": given, "seconds": SECONDS}, default=str))
    )
    return [one["text"] if "text" in one else RenderError(one["error"]) for one in said]


@lru_cache
def _asked(request: str) -> str:
    """A JSON list with a text or an error for each conversation."""
    program = [sys.executable, __file__]
    try:
        done = subprocess.run(
            program, input=request, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise EndlessError(f"it did not finish within {WAIT_SECONDS:g} s") from None
    if done.returncode and done.returncode == -getattr(signal, "SIGXCPU", 0):
        raise EndlessError(f"it did not finish within {SECONDS:g} s of computing")
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or "it said nothing"
        raise UnrenderedError(f"its process ended with code {done.returncode}: {said[:400]}")
    answer = json.loads(done.stdout)
    if "endless" in answer:
        raise EndlessError(answer["endless"])
    return json.dumps(answer["said"])


def syntax_errors(templates: Mapping[str, str]) -> Iterable[str]:
    """What is no Jinja in templates, by where they are written; nothing is run.

    Raises:
        ImportError: jinja2 is not installed.
    """
    from jinja2 import TemplateSyntaxError

    environment = _environment()
    for where, text in templates.items():
        try:
            environment.parse(text)
        except TemplateSyntaxError as error:
            yield f"{where}, line {error.lineno}: {error.message}"
        except RecursionError:
            yield f"{where}: nested too deep"


def _environment() -> Any:
    """jinja2's sandbox with what transformers adds to it."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """transformers' own block tag: ``{% generation %}`` marks what the assistant said."""

        tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals.update(raise_exception=_refuse, strftime_now=_now)
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja2's escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _limit(seconds: float) -> int:
    """Limit this process from here on; returns the memory it may take, in bytes."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; that by the clock holds there too
        return MEMORY_BYTES
    limits = {}
    wanted = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_CPU: math.ceil(time.process_time() + seconds)}
    for kind, most in wanted.items():
        _, hard = resource.getrlimit(kind)
        limits[kind] = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (limits[kind], hard))
    return limits[resource.RLIMIT_AS]


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    environment = _environment()
    memory = _limit(request["seconds"])
    try:
        return {"said": [_one(environment, request["template"], given) for given in request["given"]]}
    except MemoryError:
        return {"endless": f"it took more than {memory / 2**30:.2g} GiB"}
    except OverflowError as error:
        return {"endless": str(error)}


def _one(environment: Any, template: str, given: Mapping[str, Any]) -> dict[str, str]:
    """One conversation's text, or what the template said instead.

    Raises:
        MemoryError: there is no more.
        OverflowError: the text is longer than ``OUTPUT_BYTES``.
    """
    size, pieces = 0, []
    try:
        for piece in environment.from_string(template).generate(**given):
            size += len(piece)
            if size > OUTPUT_BYTES:
                break
            pieces.append(piece)
    except MemoryError:
        raise
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:400]}
    if size > OUTPUT_BYTES:
        raise OverflowError(f"it wrote more than {OUTPUT_BYTES:,} characters")
    return {"text": "".join(pieces)}


if __name__ == "__main__":
    sys.path[:] = sys.path[1:]  # this folder: its names are not meant for other libraries
    print(json.dumps(_answer(json.loads(sys.stdin.read()))))
