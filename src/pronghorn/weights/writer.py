"""Folders that appear whole or not at all, and bytes copied by the kernel.

The order that survives a crash at any point: stage beside the target, write, sync every file and folder,
rename, sync the parent. safetensors writes files with mode 0600 and no sync; here both are put right.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from pronghorn.errors import ExportError

_COPY_BYTES = 8 * 2**20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class StagedFolder:
    """``with StagedFolder(target) as staging:`` write into ``staging``; the block's end makes it ``target``.

    On an error inside the block nothing appears and the staging folder is removed. An empty ``target`` is
    taken over; one with content needs ``overwrite``, is swapped in one step and its old content removed.
    What an earlier, killed process staged for the same target is cleared.

    Raises:
        ExportError: ``target`` has content and ``overwrite`` is false, or it is not a folder.
        OSError: the disk is full or read-only; nothing appears.
    """

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self._staging: Path | None = None
        self._lock = -1

    def __enter__(self) -> Path:
        self._check_target()
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._clear_abandoned()
        self._staging = self._make_staging()
        return self._staging

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._staging is not None
        try:
            if kind is None:
                apply_umask(self._staging)
                sync_tree(self._staging)
                self._check_target()
                self._publish(self._staging)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if not self.target.is_dir():
            raise ExportError(f"{self.target} exists and is not a folder", fix="choose another target")
        if not self.overwrite and any(self.target.iterdir()):
            raise ExportError(
                f"{self.target} exists and is not empty",
                fix="choose another target, or say overwrite=True (--overwrite) to replace the folder",
            )

    def _prefix(self) -> str:
        return f".{self.target.name}.staging-"

    def _make_staging(self) -> Path:
        while True:
            staging = self.target.parent / (self._prefix() + secrets.token_hex(4))
            staging.mkdir()
            self._lock = os.open(staging, os.O_RDONLY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process took it for abandoned between mkdir and lock
                os.close(self._lock)
                continue
            except OSError:  # a file system without locks: nobody can clear it then, which is safe
                return staging
            if os.fstat(self._lock).st_nlink > 0 and staging.exists():
                return staging
            os.close(self._lock)

    def _clear_abandoned(self) -> None:
        """Remove staging folders of this target whose process is gone (its lock went with it)."""
        for path in self.target.parent.glob(glob.escape(self._prefix()) + "*"):
            try:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                pass  # alive, or a file system without locks
            finally:
                os.close(lock)

    def _publish(self, staging: Path) -> None:
        if self.target.is_dir() and any(self.target.iterdir()):
            exchange(staging, self.target)
        else:
            staging.rename(self.target)
        sync_path(self.target.parent)


def exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step (renameat2); where the kernel cannot, in three renames with a way back."""
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        if (
            library.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
            == 0
        ):
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), str(second))
    aside = first.with_name(first.name + "-old")
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)


def apply_umask(folder: Path) -> None:
    """Give every file below ``folder`` the mode of a new file under the process's umask.

    The folder was made with mkdir, so its mode shows the umask (asking the process for it means setting it).
    """
    mode = folder.stat().st_mode & 0o666
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                path.chmod(mode)


def sync_path(path: Path) -> None:
    """Put a file or folder on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Put every file and folder below ``folder``, and itself, on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_path(Path(root, name))
        sync_path(Path(root))


def copy_bytes(source: int, target: int, start: int, count: int, at: int) -> None:
    """Copy ``count`` bytes between open files, from ``start`` to ``at``, in the kernel where it can.

    Raises:
        OSError: the disk is full, or the source is shorter than ``start + count``.
    """
    done = 0
    kernel = hasattr(os, "copy_file_range")
    while done < count:
        size = count - done
        if kernel:
            try:
                moved = os.copy_file_range(source, target, size, start + done, at + done)
            except OSError as error:  # another file system, or one without the call
                if error.errno not in (
                    errno.EXDEV,
                    errno.EINVAL,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                    errno.EPERM,
                ):
                    raise
                kernel = False
                continue
        else:
            moved = write_all(target, os.pread(source, min(size, _COPY_BYTES), start + done), at + done)
        if moved == 0:
            raise OSError(errno.EIO, "the source file became shorter while it was copied")
        done += moved


def write_all(descriptor: int, data: bytes | memoryview, at: int) -> int:
    """Write all of ``data`` at byte ``at`` of an open file; returns the number of bytes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], at + done)
    return len(view)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content (links followed, modes not kept)."""
    with source.open("rb") as reading, target.open("xb") as writing:
        copy_bytes(reading.fileno(), writing.fileno(), 0, os.fstat(reading.fileno()).st_size, 0)
