"""Folders appear whole or not at all; copies are exact."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pronghorn.errors import ExportError
from pronghorn.weights import writer
from pronghorn.weights.writer import StagedFolder, copy_bytes, copy_file, exchange


def fill(folder: Path, text: str = "new") -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "b.txt").write_text(text)
    (folder / "a.txt").write_text(text)
    (folder / "a.txt").chmod(0o600)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}


@pytest.fixture
def umask() -> Iterator[int]:
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def test_a_folder_appears_whole_with_umask_modes(tmp_path: Path, umask: int) -> None:
    target = tmp_path / "deep" / "[odd] name"
    with StagedFolder(target) as staging:
        assert staging.parent == target.parent and not target.exists()
        fill(staging)
    assert content(target) == {"a.txt": "new", "inner/b.txt": "new"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in target.rglob("*.txt")}
    assert modes == {0o640} and stat.S_IMODE(target.stat().st_mode) == 0o750
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_nothing_appears_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), StagedFolder(tmp_path / "t") as staging:
        fill(staging)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_overwrite_and_survives_an_error(tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    with StagedFolder(target) as staging:  # empty: nothing to lose
        fill(staging, "one")
    with pytest.raises(ExportError, match="exists and is not empty"), StagedFolder(target):
        raise AssertionError
    with pytest.raises(ValueError, match="x"), StagedFolder(target, overwrite=True) as staging:
        fill(staging, "two")
        raise ValueError("x")
    assert content(target)["a.txt"] == "one"
    (target / "extra.txt").write_text("old")
    with StagedFolder(target, overwrite=True) as staging:
        fill(staging, "two")
    assert content(target) == {"a.txt": "two", "inner/b.txt": "two"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_appears_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with pytest.raises(ExportError, match="exists and is not empty"), StagedFolder(target) as staging:
        fill(staging)
        target.mkdir()
        (target / "precious.txt").write_text("mine")
    assert content(target) == {"precious.txt": "mine"} and list(tmp_path.iterdir()) == [target]


def test_a_file_is_not_a_target(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("x")
    with pytest.raises(ExportError, match="is not a folder"), StagedFolder(tmp_path / "t", overwrite=True):
        raise AssertionError


def test_a_link_to_a_folder_keeps_being_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with StagedFolder(tmp_path / "link") as staging:
        fill(staging)
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "real")["a.txt"] == "new"


def test_exchange_without_the_kernel_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    exchange(tmp_path / "one", tmp_path / "two")
    assert content(tmp_path / "one") == {"x.txt": "two"} and content(tmp_path / "two") == {"x.txt": "one"}
    monkeypatch.setattr(writer.ctypes, "CDLL", lambda *_, **__: object())
    exchange(tmp_path / "one", tmp_path / "two")
    assert content(tmp_path / "one") == {"x.txt": "one"} and content(tmp_path / "two") == {"x.txt": "two"}
    assert len(list(tmp_path.iterdir())) == 2


KILLED = """
import sys, time
from pathlib import Path
from pronghorn.weights.writer import StagedFolder
with StagedFolder(Path(sys.argv[1])) as staging:
    (staging / "half.txt").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_no_target_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "t"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with StagedFolder(target) as staging:  # the other is alive: its staging stays
        assert len(list(tmp_path.iterdir())) == 2
        fill(staging)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.01)
    assert len(list(tmp_path.iterdir())) == 2
    with StagedFolder(target, overwrite=True) as staging:
        fill(staging)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kernel", [True, False])
def test_copies_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool) -> None:
    if not kernel:
        monkeypatch.setattr(writer, "_COPY_BYTES", 1000)
        monkeypatch.delattr(os, "copy_file_range")
    source = tmp_path / "a"
    source.write_bytes(os.urandom(12_345))
    copy_file(source, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == source.read_bytes()
    with source.open("rb") as reading, (tmp_path / "c").open("w+b") as writing:
        copy_bytes(reading.fileno(), writing.fileno(), 100, 5_000, 7)
        with pytest.raises(OSError, match="shorter"):
            copy_bytes(reading.fileno(), writing.fileno(), 12_000, 1_000, 6_000)
        writing.seek(7)
        assert writing.read(5_000) == source.read_bytes()[100:5_100]
