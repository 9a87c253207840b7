"""Chat templates rendered in a process of their own, with limits on time and memory.

A template is a program that came with a model. transformers' sandbox keeps it from the machine; it does not
keep it from looping for ever or from filling the memory.
``python -m pronghorn.data.isolated`` is the other side.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from threading import Lock
from typing import Any

from pronghorn.data.templates import ChatTemplate, Marked, Prefix, RenderError
from pronghorn.errors import DataError

SECONDS = 5.0  # for one conversation; ordinary ones take 40 microseconds
START_SECONDS = 120.0  # to import transformers; 1 s on a quiet machine
MEMORY_BYTES = 4 << 30  # of address space; numpy and transformers reserve about 1 GB of it
MAX_STOPS = 3  # templates that hang on more rows than this are refused altogether


class IsolatedTemplate:
    """Renders like the ``ChatTemplate`` it is made of. Closing ends the process; it is a context manager.

    Only for tokenizers that render as transformers does (``ChatTemplate.plain``).
    """

    def __init__(self, template: ChatTemplate, *, seconds: float = SECONDS) -> None:
        self.template = template
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        self.stops = 0  # conversations the template did not finish
        self._turn = Lock()  # one conversation with the process at a time

    def __enter__(self) -> IsolatedTemplate:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        self._reader.shutdown()

    def render(self, prefixes: Sequence[Prefix]) -> list[str | RenderError]:
        """Render each; those the template raises on, or does not finish, become a ``RenderError``.

        Raises:
            DataError: the template hung on more than ``MAX_STOPS`` conversations.
        """
        if not prefixes:
            return []
        with self._turn:
            texts = self._ask(prefixes, self.seconds + len(prefixes) / 1000)
            if texts is not None:
                return texts
            return [self._render_one(prefix) for prefix in prefixes]

    def marked(self, prefix: Prefix) -> Marked | RenderError:
        """Render one with the spans that the template marks as generated; none if it marks nothing."""
        with self._turn:
            answer = self._exchange(_request([prefix], marked=True), self.seconds)
        if answer is None:
            return self._stopped()
        (item,) = answer
        if "error" in item:
            return RenderError(item["error"])
        return Marked(item["text"], tuple((start, end) for start, end in item["spans"]))

    def _render_one(self, prefix: Prefix) -> str | RenderError:
        texts = self._ask([prefix], self.seconds)
        if texts is not None:
            return texts[0]
        return self._stopped()

    def _stopped(self) -> RenderError:
        """Count a conversation that was not finished."""
        self.stops += 1
        if self.stops > MAX_STOPS:
            raise DataError(
                f"the chat template ({self.template.origin}) did not finish on {self.stops} conversations "
                f"within {self.seconds:g} s and {MEMORY_BYTES >> 30} GB each",
                fix="the template loops or is hostile; give another with data.template=FILE",
            )
        return RenderError(
            f"the chat template did not finish within {self.seconds:g} s and {MEMORY_BYTES >> 30} GB"
        )

    def _ask(self, prefixes: Sequence[Prefix], seconds: float) -> list[str | RenderError] | None:
        answer = self._exchange(_request(prefixes), seconds)
        if answer is None:
            return None
        return [RenderError(item["error"]) if isinstance(item, dict) else item for item in answer]

    def _exchange(self, request: bytes, seconds: float) -> list[Any] | None:
        """One request and its answer; None if the process died or took too long, and was ended."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            answer = self._reader.submit(process.stdout.readline).result(seconds)
        except (FutureTimeout, OSError):
            answer = b""
        if not answer:
            self._stop()
            return None
        found: list[Any] = json.loads(answer)
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "pronghorn.data.isolated"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin is not None and process.stdout is not None
        tokenizer = self.template.tokenizer
        # Exactly the variables that the tokenizer itself would hand to the template.
        options = {**tokenizer.special_tokens_map, **self.template.options}
        text = tokenizer.chat_template if self.template.own else self.template.text
        process.stdin.write(_line({"template": text, "options": options, "origin": self.template.origin}))
        process.stdin.flush()
        try:
            ready = self._reader.submit(process.stdout.readline).result(START_SECONDS)
        except FutureTimeout:
            ready = b""
        if not ready:
            process.kill()
            raise DataError(
                f"the process that renders chat templates did not start (exit code {process.wait()})",
                fix="see the lines above, or render in this process with data.isolate=false",
            )
        self._process = process
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None


def _request(prefixes: Sequence[Prefix], *, marked: bool = False) -> bytes:
    """Each conversation once, then which of its prefixes are wanted, and whether with their marks."""
    chats: dict[int, tuple[int, list[Any]]] = {}
    wanted = []
    for prefix in prefixes:
        number, _ = chats.setdefault(id(prefix.messages), (len(chats), [prefix.messages, prefix.tools]))
        wanted.append([number, prefix.end, prefix.prompt])
    return _line({"chats": [chat for _, chat in chats.values()], "wanted": wanted, "marked": marked})


def _prefixes(request: dict[str, Any]) -> list[Prefix]:
    chats = request["chats"]
    return [Prefix(chats[n][0], end, chats[n][1], prompt) for n, end, prompt in request["wanted"]]


def _line(value: Any) -> bytes:
    return json.dumps(value, default=str).encode() + b"\n"


def _plain(found: str | Marked | RenderError) -> Any:
    if isinstance(found, RenderError):
        return {"error": found.reason}
    return found if isinstance(found, str) else {"text": found.text, "spans": found.spans}


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit; the time limit holds there too
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _serve() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lines, answers = sys.stdin.buffer, sys.stdout.buffer
    job = json.loads(lines.readline())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({}, "")))
    tokenizer.chat_template = job["template"]
    template = ChatTemplate(tokenizer, "", job["origin"], own=True, options=job["options"])
    _limit_memory()
    gc.freeze()  # what was imported stays
    answers.write(b"ready\n")
    answers.flush()
    for line in lines:
        request = json.loads(line)
        prefixes = _prefixes(request)
        found = [template.marked(p) for p in prefixes] if request["marked"] else template.render(prefixes)
        answers.write(_line([_plain(one) for one in found]))
        answers.flush()


if __name__ == "__main__":
    _serve()
