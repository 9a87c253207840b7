"""The Modelfile for Ollama, beside a GGUF file: where the weights are, the template in Go's form, the stops.

Ollama's templates are Go's, chat templates are Jinja. The pieces that a chat template puts around
each message are found by rendering marked conversations, and believed only where they predict other
conversations exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pronghorn.errors import ExportError, NotSupportedError
from pronghorn.export.gguf_tokens import TokenPlan
from pronghorn.export.verify_render import EndlessError, RenderError, UnrenderedError, rendered_each

MODELFILE = "Modelfile"
Turns = tuple[tuple[str, str], ...]
_U, _A, _V, _S = "Quagga", "Numbat", "Okapi", "Tamarin"
_TRIALS: tuple[Turns, ...] = (
    (("user", "one"),),
    (("user", "Two\n\nlines, {braces} and 'quotes'"), ("assistant", "a b"), ("user", "c")),
    (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
)
_BRIEF = (("system", "be brief"),)
# the marked conversations: a question, its answer, another question, a question after a system message
_ONE: Turns = (("user", _U),)
_TWO: Turns = (("user", _U), ("assistant", _A))
_THREE: Turns = (("user", _U), ("assistant", _A), ("user", _V))
_LED: Turns = (("system", _S), ("user", _U))


@dataclass(frozen=True)
class Pieces:
    """What stands around messages: ``start`` once, ``default`` where no system message is given.

    ``system`` is None where the template takes none; ``prompt`` opens the answer.
    """

    start: str
    default: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, turns: Turns) -> str:
        """The text of a conversation that ends with the user, ready for the answer."""
        around = {"system": self.system or ("", ""), "user": self.user, "assistant": self.assistant}
        text = self.start + ("" if turns[0][0] == "system" else self.default)
        return text + "".join(around[role][0] + said + around[role][1] for role, said in turns) + self.prompt

    def go(self) -> str:
        """The same as a Go template over Ollama's messages; the answer to be continued has no end."""
        system = f'{{{{ if eq .Role "system" }}}}{_around(self.system)}{{{{ else }}}}' if self.system else ""
        default = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        before, after = self.assistant
        return (
            f"{self.start}{default}{{{{ range $i, $_ := .Messages }}}}"
            f"{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}"
            f'{system}{{{{ if eq .Role "user" }}}}{_around(self.user)}'
            f'{{{{ else if eq .Role "assistant" }}}}{before}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{after}{{{{ end }}}}{{{{ end }}}}{'{{ end }}' if system else ''}"
            f'{{{{ if and $last (ne .Role "assistant") }}}}{self.prompt}{{{{ end }}}}{{{{ end }}}}'
        )


def _around(piece: tuple[str, str] | None) -> str:
    before, after = piece or ("", "")
    return f"{before}{{{{ .Content }}}}{after}"


def modelfile(weights: str, tokens: TokenPlan) -> str:
    """The content of a Modelfile that lies beside the file ``weights``.

    Raises:
        NotSupportedError: as ``find_pieces``.
    """
    lines = [f"FROM ./{weights}"]
    pieces = find_pieces(tokens.fast, tokens.template) if tokens.template else None
    if pieces is not None:
        lines.append(f'TEMPLATE """{pieces.go()}"""')
    else:
        lines.append(
            "# the chat template says more than a TEMPLATE here can: Ollama takes the one in the file,"
        )
        lines.append("# if it knows it")
    stops = [text for text in tokens.stops if '"' not in text and "\n" not in text]
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    return "\n".join(lines) + "\n"


def find_pieces(fast: Any, template: str) -> Pieces | None:
    """What a tokenizer's chat template puts around messages; None where that is no fixed text.

    Raises:
        NotSupportedError: the template does not end, or fills memory or disk.
        ExportError: the process that renders it failed.
    """
    try:
        said = _Said(fast, template)
    except EndlessError as error:
        raise NotSupportedError(
            f"the chat template does not render a short conversation: {error}",
            fix="take the chat template of the base, or remove it from the folder",
        ) from error
    except UnrenderedError as error:
        raise ExportError(
            f"the chat template could not be rendered: {error}",
            fix="make room for the process that renders it, and export again",
        ) from error
    for find in (_apart, _joined):
        try:
            pieces = find(said)
            if pieces is not None and _predicts(said, pieces):
                return pieces
        except ValueError:  # refused by the template, or the marks are not where they belong
            continue
    return None


class _Said:
    """The conversations as rendered, without the start token that is added when the text is tokenized."""

    def __init__(self, fast: Any, template: str) -> None:
        marked = (_ONE, _TWO, _THREE, _LED, *_TRIALS, *(_BRIEF + turns for turns in _TRIALS))
        asked = [(turns, prompt) for turns in marked for prompt in (True, False)]
        messages = [([{"role": role, "content": said} for role, said in turns], p) for turns, p in asked]
        texts = rendered_each(template, messages, fast.special_tokens_map)
        self.found = dict(zip(asked, texts, strict=True))
        self.start = fast.bos_token or ""
        adds = bool(self.start) and fast("a")["input_ids"][:1] == [fast.bos_token_id]
        self.added = self.start if adds else ""

    def __call__(self, turns: Turns, *, prompt: bool = True) -> str:
        """Raises RenderError where the template refused."""
        text = self.found[turns, prompt]
        if isinstance(text, RenderError):
            raise text
        return text.removeprefix(self.added)


def _predicts(said: _Said, pieces: Pieces) -> bool:
    trials = list(_TRIALS)
    if pieces.system is not None:
        trials += [_BRIEF + turns for turns in _TRIALS]
    right = all(said(turns) == pieces.render(turns) for turns in trials)
    return right and not any(mark in pieces.render(_TRIALS[0]) for mark in ("{{", '"""'))


def _apart(said: _Said) -> Pieces | None:
    """Each message with a start and an end of its own: most templates."""
    one = said(_ONE, prompt=False)
    prompt = said(_ONE).removeprefix(one)
    first, user_end = one.split(_U)
    _, closed = said(_TWO, prompt=False).split(_A)
    _, three = said(_THREE, prompt=False).split(_U)
    between, rest = three.split(_A)
    user_start = rest.split(_V)[0].removeprefix(closed)
    if not between.startswith(user_end) or not first.endswith(user_start):
        return None
    start, default = _head(said, first.removesuffix(user_start))
    assistant = (between.removeprefix(user_end), closed)
    system = _system(said, start, user_start)
    return Pieces(start, default, system, (user_start, user_end), assistant, prompt)


def _joined(said: _Said) -> Pieces | None:
    """What opens the answer taken as the end of the user's message: some templates end otherwise without."""
    first, opening = said(_ONE).split(_U)
    _, three = said(_THREE).split(_U)
    between, rest = three.split(_A)
    before = rest.split(_V)[0]
    if between != opening:
        return None
    user_start = _common_end(first, before)
    start, default = _head(said, first.removesuffix(user_start))
    system = _system(said, start, user_start)
    return Pieces(start, default, system, (user_start, opening), ("", before.removesuffix(user_start)), "")


def _common_end(one: str, two: str) -> str:
    """The longest text that both end with."""
    size = 0
    while size < min(len(one), len(two)) and one[-size - 1] == two[-size - 1]:
        size += 1
    return one[len(one) - size :]


def _head(said: _Said, text: str) -> tuple[str, str]:
    """What stands before the first message: the start token, and the system message given by default."""
    start = said.start if text.startswith(said.start) else ""
    return start, text.removeprefix(start)


def _system(said: _Said, start: str, user_start: str) -> tuple[str, str] | None:
    try:
        text = said(_LED).removeprefix(start)
    except RenderError:
        return None
    before, rest = text.split(_S)
    after = rest.split(_U)[0]
    return (before, after.removesuffix(user_start)) if after.endswith(user_start) else None
