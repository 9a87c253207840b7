"""Sealed checkpoints: whole or absent at every kill point, damage named, rotation, modes, full disk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from pronghorn.errors import TrainingError
from pronghorn.training.checkpoint import (
    MANIFEST_NAME,
    REQUIRED_FILES,
    Checkpoint,
    damage,
    list_checkpoints,
    newest_valid,
    rotate,
    seal,
)
from pronghorn.training.folder import RunFolder
from pronghorn.training.run import RunResult, train
from tests.training.conftest import MakeConfig
from tests.training.test_resume import assert_same


def written(folder: Path, step: int = 1, leave_out: str = "") -> Path:
    """What the Trainer leaves: the files needed to go on (small here), one of mode 0600, and a pickle."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in REQUIRED_FILES[:-1]:
        if name != leave_out:
            (path / name).write_bytes(bytes([step]) * 1000)
    if leave_out != "adapter_model.safetensors":
        (path / "adapter_model.safetensors").chmod(0o600)
    (path / "training_args.bin").write_bytes(b"pickle")
    return path


def sealed(tmp_path: Path, step: int = 1) -> Checkpoint:
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    return seal(written(tmp_path / "scratch", step), tmp_path / "checkpoints", step, {"step": step})


def test_a_kill_at_every_file_operation_leaves_the_newest_visible_checkpoint_valid(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.kill_points", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["points"] > 150


def test_all_is_synced_before_the_name_appears_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_sync(descriptor)

    def rename(source: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    sealed(tmp_path)
    named = events.index("rename step-1")
    assert {f"sync {name}" for name in (*REQUIRED_FILES, MANIFEST_NAME)} <= set(events[:named])
    assert events[named + 1 :] == ["sync checkpoints"]


def test_file_modes_follow_the_umask_and_pickles_stay_out(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        checkpoint = sealed(tmp_path)
    finally:
        os.umask(old)
    assert {oct(path.stat().st_mode & 0o777) for path in checkpoint.path.iterdir()} == {"0o640"}
    assert oct(checkpoint.path.stat().st_mode & 0o777) == "0o750"
    assert sorted(path.name for path in checkpoint.path.iterdir()) == sorted([*REQUIRED_FILES, MANIFEST_NAME])


@pytest.mark.parametrize("name", REQUIRED_FILES[:-1])
def test_what_lacks_a_file_needed_to_resume_is_not_sealed(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(TrainingError, match=f"step 1 lacks {name}"):
        seal(written(tmp_path / "scratch", leave_out=name), tmp_path / "checkpoints", 1, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("name", [*REQUIRED_FILES, MANIFEST_NAME])
@pytest.mark.parametrize("how", ["removed", "cut", "flipped"])
def test_damage_is_found_and_named(tmp_path: Path, name: str, how: str) -> None:
    checkpoint = sealed(tmp_path)
    assert damage(checkpoint.path) == ""
    path = checkpoint.path / name
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if how == "flipped" else content[:-1])
    said = damage(checkpoint.path)
    if name != MANIFEST_NAME:
        assert said.startswith(f"{name} ")
    elif how != "flipped":
        assert said.startswith(MANIFEST_NAME)
    else:
        assert said  # a flipped digit may make the manifest unreadable, or make it disagree with a file


def test_a_checkpoint_sealed_without_a_needed_file_is_damaged(tmp_path: Path) -> None:
    checkpoint = sealed(tmp_path)
    manifest = json.loads((checkpoint.path / MANIFEST_NAME).read_text())
    del manifest["files"]["scheduler.pt"]
    (checkpoint.path / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert damage(checkpoint.path) == "scheduler.pt is missing"


def test_rotation_keeps_the_newest_valid_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        sealed(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step-3/optimizer.pt").write_bytes(b"cut")
    rotate(folder, 2)
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [10, 3, 2]
    told: list[str] = []
    (folder / "step-10" / MANIFEST_NAME).unlink()
    newest = newest_valid(folder, told.append)
    assert newest is not None and newest.step == 2
    assert [line.partition("step-")[2] for line in told] == [
        "10: MANIFEST.json is missing",
        "3: optimizer.pt has 3 bytes, sealed were 1000",
    ]


def test_what_a_killed_process_left_is_cleaned(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.clean()
    kept = sealed(tmp_path)
    for name in (
        "checkpoints/.trash-step-0",
        "checkpoints/.step-2.staging-0123abcd",
        ".adapter.staging-0123abcd",
    ):
        written(tmp_path / name)
    written(folder.scratch, 7)
    (tmp_path / ".manifest.json.partial").write_text("{")
    (tmp_path / "metrics.jsonl").write_text("")
    folder.clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".scratch",
        "checkpoints",
        "metrics.jsonl",
        "scratch",
    ]
    assert list(folder.checkpoints.iterdir()) == [kept.path] and list(folder.scratch.iterdir()) == []


class DiskFullAt(TrainerCallback):
    """From step ``step`` on, no file may grow beyond ``size`` bytes, as on a disk with that much room."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "size", [4_000, 40_000]
)  # the adapter (33 kB) does not fit; the optimizer (83 kB) does not
def test_a_full_disk_leaves_the_last_good_checkpoint(
    make_config: MakeConfig, straight: RunResult, size: int
) -> None:
    config = make_config("full")
    try:
        with pytest.raises(
            TrainingError, match=r"checkpoint of step 8 could not be written.*last good.* is step 4"
        ):
            train(config, callbacks=[DiskFullAt(8, size)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    folder = RunFolder(Path(config["output"]["folder"]))
    assert [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)] == [4]
    resumed = train(config)
    assert resumed.resumed_from == 4
    assert_same(straight, resumed)
