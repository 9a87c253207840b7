"""Run by test_checkpoint.py: seals in a forked child that dies at its n-th file operation, for every n.

Prints one JSON line: how many points were tried, and what was wrong after any of them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from pronghorn.training.checkpoint import REQUIRED_FILES, damage, list_checkpoints, newest_valid, rotate, seal
from pronghorn.training.folder import RunFolder

STEPS, KEEP = 3, 2  # the last seal removes the oldest
CHANGING = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}


def die_at(point: int) -> None:
    """End this process, as by kill -9, before its ``point``-th operation on files."""
    left = point

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os._exit(9)

    def audit(event: str, arguments: object) -> None:
        if event in CHANGING:
            count()

    def fsync(descriptor: int) -> None:
        count()  # what it does to the disk plays no part when a process dies

    sys.addaudithook(audit)
    os.fsync = fsync


def go_on(folder: RunFolder, done: int) -> None:
    """What a run does with its folder: clean up, find the newest checkpoint, seal the rest."""
    folder.clean()
    newest = newest_valid(folder.checkpoints, lambda line: None)
    rotate(folder.checkpoints, KEEP)  # the kill may have come between the seal and this
    for step in range(newest.step + 1 if newest else 1, STEPS + 1):
        written = folder.scratch / f"checkpoint-{step}"
        written.mkdir()
        for name in REQUIRED_FILES[:-1]:
            (written / name).write_bytes(bytes([step]) * 5000)
        seal(written, folder.checkpoints, step, {"step": step})
        os.write(done, bytes([step]))  # from here on this step may not be lost
        rotate(folder.checkpoints, KEEP)


def main() -> None:
    root = RunFolder(Path(sys.argv[1]))
    wrong: list[str] = []
    point = 0
    os.fsync = lambda descriptor: None
    while True:
        point += 1
        shutil.rmtree(root.root, ignore_errors=True)
        root.root.mkdir()
        reading, done = os.pipe()
        child = os.fork()
        if child == 0:
            die_at(point)
            go_on(root, done)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.close(done)
        sealed = os.read(reading, 100)
        os.close(reading)
        visible = list_checkpoints(root.checkpoints)
        newest = visible[0].step if visible else 0
        if visible and damage(visible[0].path):
            wrong.append(f"point {point}: step-{newest} is visible and {damage(visible[0].path)}")
        if sealed and newest < sealed[-1]:
            wrong.append(f"point {point}: step {sealed[-1]} was sealed, step {newest} is there")
        if newest > 1 and len([one for one in visible if not damage(one.path)]) < 2:
            wrong.append(f"point {point}: fewer than two valid checkpoints after step {newest}")
        go_on(root, os.open(os.devnull, os.O_WRONLY))
        left = sorted(path.name for path in root.checkpoints.iterdir())
        if left != ["step-2", "step-3"]:
            wrong.append(f"point {point}: after going on there are {left}")
        if os.waitstatus_to_exitcode(status) == 0:
            break
    print(json.dumps({"points": point - 1, "wrong": wrong}))


if __name__ == "__main__":
    main()
