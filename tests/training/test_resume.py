"""A resumed run equals the uninterrupted one bit for bit: losses, evaluations, adapter, optimizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.errors import Preempted, RunConflictError, TrainingError
from pronghorn.training.callbacks import FlowCallback, RunContext
from pronghorn.training.checkpoint import damage, list_checkpoints
from pronghorn.training.config import parse_config
from pronghorn.training.folder import RunFolder
from pronghorn.training.metrics import read_metrics
from pronghorn.training.run import RunResult, train
from pronghorn.training.trainer import LoopState, Schedule
from tests.training.conftest import MakeConfig, write_rows


class SignalAt(TrainerCallback):
    """Sends this process a signal while it is in step ``step`` (or in the evaluation after it)."""

    def __init__(self, step: int, number: int = signal.SIGTERM, *, during: str = "step") -> None:
        self.step, self.number, self.during = step, number, during

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.during == "step" and state.global_step == self.step - 1:
            signal.raise_signal(self.number)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            self.during == "evaluation" and state.global_step == self.step
        ):  # logged just before it is evaluated
            signal.raise_signal(self.number)


def rows_without_time(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same(one: RunResult, other: RunResult) -> None:
    """Everything that a run leaves is the same, bit for bit."""
    assert rows_without_time(one.folder) == rows_without_time(other.folder)
    assert one.losses == other.losses and one.eval == other.eval
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    states = [list_checkpoints(run.folder / "checkpoints")[0] for run in (one, other)]
    assert states[0].step == states[1].step
    for name in ("optimizer.pt", "scheduler.pt"):
        left, right = (torch.load(state.path / name, weights_only=True) for state in states)
        assert_equal_trees(left, right)


def assert_equal_trees(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal_trees(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            assert_equal_trees(*pair)
    else:
        assert left == right


# with dropout the replaced linears hand their calls to the originals, without it they do the work
@pytest.mark.parametrize(
    ("recompute", "dropout", "accelerate", "stops"),
    [
        (False, 0.1, True, (1, 4, 6, 8)),
        (True, 0.1, False, (5,)),
        (True, 0.0, True, (3,)),
        ("auto", 0.0, True, (6,)),
    ],
)
def test_stopped_at_any_step_and_resumed_equals_straight(
    make_config: MakeConfig, recompute: bool | str, dropout: float, accelerate: bool, stops: tuple[int, ...]
) -> None:
    sections = {
        "training": {"recompute": recompute, "accelerate": accelerate},
        "lora": {"r": 4, "dropout": dropout},
    }
    straight = train(make_config("straight", **sections))
    assert (
        straight.steps == 8
    )  # 19 rows in batches of 3, 2 batches a step: 4 steps an epoch, the last one partial
    for stop in stops:
        config = make_config(f"stopped-{stop}", **sections)
        with pytest.raises(Preempted, match=f"SIGTERM after step {stop} of 8"):
            train(config, callbacks=[SignalAt(stop)])
        assert not (Path(config["output"]["folder"]) / "adapter").exists()
        resumed = train(config)
        assert resumed.resumed_from == stop
        assert_same(straight, resumed)


def test_stopped_again_and_again(make_config: MakeConfig, straight: RunResult) -> None:
    config = make_config("often")
    for stop in (2, 3, 7):
        with pytest.raises(Preempted):
            train(config, callbacks=[SignalAt(stop, signal.SIGINT)])
    assert_same(straight, train(config))


def test_a_stop_during_an_evaluation_ends_it_and_it_is_made_up_for(
    make_config: MakeConfig, straight: RunResult
) -> None:
    config = make_config("evaluating")
    with pytest.raises(Preempted, match="after step 6"):
        train(config, callbacks=[SignalAt(6, during="evaluation")])
    steps = [
        row["step"]
        for row in read_metrics(Path(config["output"]["folder"]) / "metrics.jsonl")
        if "eval_loss" in row
    ]
    assert steps == [3]
    assert_same(straight, train(config))


def test_whole_epochs_and_a_cosine_with_another_optimizer(make_config: MakeConfig) -> None:
    shape = {"schedule": "cosine", "warmup_ratio": 0.3, "optimizer": "adafactor", "gradient_accumulation": 1}
    sections: dict[str, Any] = {
        "training": shape,
        "eval": {"every_steps": None},
        "checkpoints": {"every_steps": None},
    }
    straight, config = train(make_config("straight", **sections)), make_config("stopped", **sections)
    assert [row["step"] for row in read_metrics(straight.folder / "metrics.jsonl") if "eval_loss" in row] == [
        7,
        14,
    ]
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(7)])
    assert_same(straight, train(config))


def test_modules_trained_in_full_are_restored(make_config: MakeConfig) -> None:
    lora = {"modules_to_save": ["embed_tokens"], "bias": "none", "use_rslora": True}
    straight, config = train(make_config("straight", lora=lora)), make_config("stopped", lora=lora)
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(5)])
    assert_same(straight, train(config))


def test_the_newest_valid_checkpoint_is_used_and_the_damaged_one_named(
    make_config: MakeConfig, straight: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("damaged", logging={"progress": "plain"})
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(6)])
    folder = Path(config["output"]["folder"])
    assert [checkpoint.step for checkpoint in list_checkpoints(folder / "checkpoints")] == [6, 4]
    optimizer = folder / "checkpoints/step-6/optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    capsys.readouterr()
    resumed = train(config)
    assert "step-6: optimizer.pt differs from what was sealed (sha256)" in capsys.readouterr().out
    assert resumed.resumed_from == 4
    assert_same(straight, resumed)


def test_a_finished_run_says_so_and_does_nothing(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(logging={"progress": "plain"})
    first = train(config)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    again = train(config)
    assert "is a finished run" in capsys.readouterr().out
    assert again.was_finished and again.losses == first.losses and again.eval == first.eval
    assert before == {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}


def test_a_run_killed_before_its_adapter_was_written_only_writes_it(make_config: MakeConfig) -> None:
    config = make_config()
    first = train(config)
    expected = (first.adapter / "adapter_model.safetensors").read_bytes()
    for path in first.adapter.iterdir():
        path.unlink()
    first.adapter.rmdir()
    again = train(config)
    assert again.resumed_from == 8 and again.losses == first.losses
    assert (again.adapter / "adapter_model.safetensors").read_bytes() == expected


def test_another_configuration_is_refused_with_key_old_and_new(make_config: MakeConfig) -> None:
    train(make_config())
    with pytest.raises(RunConflictError) as caught:
        train(make_config(training={"learning_rate": 0.02}, lora={"r": 8}))
    assert "training.learning_rate: 0.01 in the run folder, 0.02 now" in caught.value.message
    assert "lora.r: 4 in the run folder, 8 now" in caught.value.message
    assert caught.value.exit_code == 2


def test_what_changes_nothing_in_the_result_may_change(make_config: MakeConfig, straight: RunResult) -> None:
    config = make_config("stopped")
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(2)])
    changed = make_config(
        "stopped",
        checkpoints={"every_steps": 1, "keep": 3},
        logging={"every_steps": 2},
        training={"recompute": False},  # what the advice after an out-of-memory error may change
    )
    resumed = train(changed)
    assert_same(straight, resumed)
    assert yaml.safe_load((resumed.folder / "run.yaml").read_text())["checkpoints"]["keep"] == 3


def test_changed_rows_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    data = {"train": str(write_rows(tmp_path / "train.jsonl", 12))}
    config = make_config(data=data)
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(2)])
    write_rows(tmp_path / "train.jsonl", 12, seed=9)
    with pytest.raises(RunConflictError, match=r"data\.data_hash"):
        train(config)


def test_a_checkpoint_that_peft_does_not_restore_is_an_error(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(2)])
    checkpoint = Path(config["output"]["folder"]) / "checkpoints/step-2"
    progress = json.loads((checkpoint / "progress.json").read_text())
    name = next(iter(progress["weights"]))
    progress["weights"][name] = "0" * 64
    reseal(checkpoint, "progress.json", json.dumps(progress))
    with pytest.raises(TrainingError, match=name.replace(".", r"\.")):
        train(config)


def reseal(checkpoint: Path, name: str, text: str) -> None:
    """Change a file of a checkpoint and the digest in its manifest."""
    import hashlib

    (checkpoint / name).write_text(text)
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["files"][name] = {
        "size": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (checkpoint / "MANIFEST.json").write_text(json.dumps(manifest))


def test_an_epoch_that_lost_its_last_step_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    """What transformers 4.56 does on resume, told to the callback."""
    context = RunContext(
        parse_config(make_config()), RunFolder(tmp_path), Schedule(4, 8, 0), LoopState(), True
    )
    flow = FlowCallback(context)
    flow.on_epoch_end(None, SimpleNamespace(global_step=4), SimpleNamespace(should_training_stop=False))
    flow.on_epoch_end(None, SimpleNamespace(global_step=3), SimpleNamespace(should_training_stop=True))
    with pytest.raises(TrainingError, match="an epoch of 4 steps ended after step 3: transformers"):
        flow.on_epoch_end(None, SimpleNamespace(global_step=3), SimpleNamespace(should_training_stop=False))


def test_the_command_stops_on_sigterm_with_75_and_goes_on(make_config: MakeConfig, tmp_path: Path) -> None:
    long = {"epochs": 5}
    straight = train(make_config("straight", training=long))
    config = make_config("command", training=long, logging={"progress": "plain", "every_steps": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pronghorn.cli.main", "train", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    metrics = tmp_path / "command/metrics.jsonl"
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(read_metrics(metrics)) < 7:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert (
        errors.startswith("error: stopped by SIGTERM after step") and "run the same command again" in errors
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout and "\r" not in done.stdout + done.stderr
    again = CliRunner().invoke(app, command[3:])
    assert again.exit_code == 0 and "is a finished run" in again.stdout
    assert_same(straight, train(config))


@pytest.mark.slow
def test_killed_at_many_moments_it_still_ends_where_the_straight_run_does(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"training": {"epochs": 20}, "checkpoints": {"every_steps": 1}}
    straight, config = train(make_config("straight", **sections)), make_config("killed", **sections)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pronghorn.cli.main", "train", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    metrics, checkpoints = tmp_path / "killed/metrics.jsonl", tmp_path / "killed/checkpoints"
    for round_ in range(6):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        seen = len(read_metrics(metrics))
        while process.poll() is None and len(read_metrics(metrics)) < seen + 6:
            time.sleep(0.001)
        time.sleep(0.004 * round_)  # another moment of the step, or of the checkpoint, each time
        process.kill()
        process.wait()
        newest = list_checkpoints(checkpoints)[0]
        assert damage(newest.path) == "" and newest.step >= 4 * (round_ + 1)
    assert_same(straight, train(config))
