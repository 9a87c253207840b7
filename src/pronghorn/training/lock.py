"""One process per run folder: a lock file made with O_EXCL that says who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pronghorn.errors import RunConflictError

LOCK_NAME = ".lock"


class RunLock:
    """``with RunLock(folder):`` no other process trains into ``folder`` meanwhile.

    A lock left by a process that is gone (this host, no process with that id and start time) is taken over.

    Raises:
        RunConflictError: another process holds the folder; the message names host, process and file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME

    def __enter__(self) -> RunLock:
        with _serialised(self.path.parent):
            holder = self._holder()
            if holder is not None:
                raise RunConflictError(
                    f"{self.path.parent} is in use by process {holder['pid']} on host {holder['host']}",
                    fix=f"wait for it or stop it; if that host is gone, remove {self.path}",
                )
            self.path.unlink(missing_ok=True)  # left by a process that is gone
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(_myself(), file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)

    def _holder(self) -> dict[str, Any] | None:
        """Who holds the lock, if that process may still be alive."""
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:  # killed between creating and writing it
            return None
        if holder.get("host") == socket.gethostname() and not _alive(holder):
            return None
        return dict(holder)


def _myself() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}


def _alive(holder: dict[str, Any]) -> bool:
    pid = int(holder["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it exists and belongs to somebody else
    return holder.get("started") in (None, _start_time(pid))  # else the id was given to another process


def _start_time(pid: int) -> str | None:
    """When a process began, in ticks since boot (field 22 of /proc/PID/stat); None without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


@contextlib.contextmanager
def _serialised(folder: Path) -> Iterator[None]:
    """Let one process at a time look at the lock file and replace a stale one."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without flock: O_EXCL alone decides
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
