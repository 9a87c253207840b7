"""One process per run folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pronghorn.errors import RunConflictError
from pronghorn.training.folder import RunFolder
from pronghorn.training.lock import RunLock
from pronghorn.training.run import train
from tests.training.conftest import MakeConfig


def holder(**changes: Any) -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": None, **changes})


def gone_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(RunConflictError) as caught, RunLock(tmp_path):
        pass
    assert f"is in use by process {os.getpid()} on host {socket.gethostname()}" in caught.value.message
    assert caught.value.exit_code == 2
    assert not (tmp_path / ".lock").exists()
    with RunLock(tmp_path):
        pass


def test_stale_locks_are_taken_over(tmp_path: Path) -> None:
    for content in (
        holder(pid=gone_pid()),
        holder(started="1"),
        "",
        "{",
    ):  # gone, another process now, half-written
        (tmp_path / ".lock").write_text(content)
        with RunLock(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_is_never_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(holder(pid=gone_pid(), host="elsewhere"))
    with pytest.raises(RunConflictError) as caught, RunLock(tmp_path):
        pass
    assert f"remove {tmp_path / '.lock'}" in caught.value.fix
    assert (tmp_path / ".lock").exists()


def test_of_many_processes_that_start_at_once_one_gets_in(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from pronghorn.errors import RunConflictError
        from pronghorn.training.lock import RunLock
        folder, start = Path(sys.argv[1]), float(sys.argv[2])
        time.sleep(max(0, start - time.time()))
        try:
            with RunLock(folder):
                print("in", flush=True)
                sys.stdin.read()
        except RunConflictError:
            print("refused", flush=True)
        """
    )
    import time

    (tmp_path / ".lock").write_text(holder(pid=gone_pid()))
    command = [sys.executable, "-c", script, str(tmp_path), str(time.time() + 1.5)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout]
    for racer in racers:
        racer.communicate(timeout=30)
    assert sorted(said) == ["in", *["refused"] * 7]


def test_train_refuses_a_folder_in_use(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"), pytest.raises(RunConflictError, match="is in use by process"):
        train(make_config())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == []


def test_train_refuses_a_folder_that_holds_something_else(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years")
    with pytest.raises(RunConflictError, match=r"is not a run folder: no run\.yaml, but thesis\.tex"):
        train(make_config())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunConflictError, match="file is a file"):
        RunFolder(tmp_path / "file").create()
    with pytest.raises(RunConflictError, match="cannot be made: Not a directory"):
        RunFolder(tmp_path / "file/below").create()
    assert (tmp_path / "run/thesis.tex").read_text() == "years"
