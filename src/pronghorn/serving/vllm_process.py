"""A vLLM engine in a process of its own interpreter, asked and answering by lines of JSON."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO, Any

from pronghorn.errors import ConfigError, PronghornError
from pronghorn.serving.vllm import ENVIRONMENT, Engine, ServePlan

_PROGRAM = Path(__file__).with_name("generate_in_vllm.py")
_LAST_BYTES, _LAST_LINES = 8192, 12
_END_SECONDS = 10
_OFFLINE = {"HF_HUB_OFFLINE": "1"}  # all it loads is in local folders


class VllmProcess:
    """Ends with this object, and with the interpreter."""

    def __init__(self, engine: Engine, plan: ServePlan, *, ready_seconds: float = 900) -> None:
        """Start ``plan`` and wait until it answers.

        Raises:
            PronghornError: vLLM refuses, ends, or is not ready in time; its own last lines say why. Or its
                interpreter is gone.
        """
        self._lock = Lock()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        try:
            self._process = subprocess.Popen(
                [engine.python, _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={**ENVIRONMENT, **_OFFLINE, **plan.environment, **os.environ},
                start_new_session=True,  # Ctrl+C is for the notebook, which decides about the engine
            )
        except OSError as error:
            raise PronghornError(
                f"{engine.python}, which had vLLM {engine.version}, does not start: {error.strerror}",
                fix="install vLLM there again, or name another interpreter: "
                "from_pretrained(..., vllm_python=PATH)",
            ) from error
        self.stop = weakref.finalize(self, _end, self._process, os.getpid())
        self.version = engine.version
        self.ready_seconds = ready_seconds
        self._ask(json.dumps({"llm": {"model": str(plan.model), **plan.arguments}}), self._await_start)

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.stop.alive and self._process.poll() is None

    def generate(self, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The outputs for ``prompts``, ``sampling`` and ``loras``, as ``generate_in_vllm.py`` has them.

        Raises:
            ConfigError: vLLM refuses what was asked, and goes on.
            PronghornError: it failed, and ended.
        """
        try:
            question = json.dumps(asked)
        except TypeError as error:
            raise ConfigError(
                f"it cannot be handed to vLLM: {error}", fix="use numbers, text and lists"
            ) from error
        return list(self._ask(question)["outputs"])

    def _ask(self, question: str, wait: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """One line for one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(question.encode() + b"\n")
                self._process.stdin.flush()
                wait()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:
                self.stop()  # an answer nobody waited for would be taken for that of the next question
                raise
        answer = _parsed(line) or {"error": self._broken(line)}
        if answer.get("goes_on"):
            raise ConfigError(f"vLLM refuses it: {answer['error']}", fix="ask otherwise; the engine goes on")
        if "error" in answer:
            self.stop()
            raise PronghornError(
                f"vLLM {self.version}: {answer['error']}\nits last lines:\n{_last_lines(self._log)}",
                fix="where memory is short, give gpu_memory_utilization or a smaller max_seq_length; "
                "pronghorn doctor --vllm-python PATH compares versions",
            )
        return answer

    def _await_start(self) -> None:
        assert self._process.stdout is not None
        answered = select.poll()  # not select.select, which takes only the first 1024 files of a process
        answered.register(self._process.stdout, select.POLLIN)
        if not answered.poll(self.ready_seconds * 1000):
            raise PronghornError(
                f"vLLM {self.version} was not ready after {self.ready_seconds:.0f} s; its last lines:\n"
                f"{_last_lines(self._log)}",
                fix="pronghorn doctor --vllm-python PATH compares versions",
            )

    def _broken(self, line: bytes) -> str:
        """What a line is that is no answer."""
        if line.endswith(b"\n"):
            return f"it wrote {line[:200]!r} where an answer was due"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        return f"it ended with code {self._process.poll()}" + (f" after {line[:200]!r}" if line else "")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """An answer of the program; None for what else is there, such as what was printed before it ran."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.keys() & {"ready", "outputs", "error"} else None


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """End the process and what it started, which may outlive it; in a fork of ``owner`` nothing happens."""
    if os.getpid() == owner:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
        _signal(process, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # a question that it did not read
                pipe.close()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, number)


def _last_lines(log: IO[bytes]) -> str:
    # pread: the process writes on where a seek would have left it
    size = os.fstat(log.fileno()).st_size
    said = os.pread(log.fileno(), _LAST_BYTES, max(0, size - _LAST_BYTES))
    return "\n".join(f"  {line}" for line in said.decode(errors="replace").splitlines()[-_LAST_LINES:])
