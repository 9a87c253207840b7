"""Two processes that train one run: the losses, the gradient and the evaluation of one process, and
resuming."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pronghorn.errors import RunConflictError
from pronghorn.training.checkpoint import damage, list_checkpoints
from pronghorn.training.metrics import read_metrics
from pronghorn.training.ranks import SharedOrder
from pronghorn.training.run import train
from tests.training.conftest import MakeConfig

# One step's update of plain gradient descent is the gradient. Without dropout, for each process draws
# its own.
SECTIONS: dict[str, Any] = {
    "lora": {"r": 4, "dropout": 0.0},
    "training": {"optimizer": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5, "schedule": "constant"},
}


TRAIN = ("pronghorn.cli.main", "train")


def launch(
    config: dict[str, Any], path: Path, *, module: tuple[str, ...] = TRAIN, fails: bool = False
) -> str:
    """``torchrun`` with two processes on the command line; what it printed."""
    path.write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "-m", *module, str(path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_processes_are_one(make_config: MakeConfig, tmp_path: Path) -> None:
    """19 rows in steps of 12: the second process has no row in the last micro-batch of an epoch."""
    shared = {**SECTIONS, "eval": {"every_steps": 2, "batch_size": 2}}
    one = train(make_config("one", **{**shared, "training": {**SECTIONS["training"], "batch_size": 6}}))
    config = make_config("two", **{**shared, "training": {**SECTIONS["training"], "batch_size": 3}})
    printed = launch({**config, "logging": {"progress": "plain"}}, tmp_path / "run.yaml")
    assert printed.count("training 4 steps") == 1
    folder = tmp_path / "two"
    ours, theirs = read_metrics(folder / "metrics.jsonl"), read_metrics(one.folder / "metrics.jsonl")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    assert [row["tokens"] for row in ours if "loss" in row] != []
    for mine, other in zip(ours, theirs, strict=True):
        for name in {*mine, *other} & {
            "loss",
            "eval_loss",
            "eval_tokens",
            "eval_token_accuracy",
            "grad_norm",
        }:
            assert mine[name] == pytest.approx(other[name], rel=2e-6), (mine["step"], name)
    mine, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, one.folder))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-7), name
    assert json.loads((folder / "manifest.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_signal_to_one_of_two_stops_both_and_they_resume(make_config: MakeConfig, tmp_path: Path) -> None:
    launch(make_config("straight"), tmp_path / "straight.yaml")
    config = make_config("stopped")
    printed = launch(config, tmp_path / "run.yaml", module=("tests.training.rank_signal",), fails=True)
    for reason in ("SIGTERM", "a signal to another process"):
        assert f"stopped by {reason} after step 3 of 4" in printed
    folder = tmp_path / "stopped"
    (sealed,) = list_checkpoints(folder / "checkpoints")
    assert sealed.step == 3 and not damage(sealed.path) and not (folder / "adapter").exists()
    with pytest.raises(RunConflictError, match=r"processes: 2 in the run folder, 1 now"):
        train(config)
    printed = launch({**config, "logging": {"progress": "plain"}}, tmp_path / "run.yaml")
    assert f"resuming from {sealed.path}, 1 of 4 steps to go" in printed
    one, other = train(config), train(make_config("straight"))  # both are finished: nothing is trained
    assert one.losses == other.losses and one.eval == other.eval
    mine, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_order_is_that_of_one_process_and_then_blank() -> None:
    order = SharedOrder(7, seed=3, batch=2)
    first = list(order)
    assert sorted(first[:7]) == list(range(7)) and first[7:] == [7]
    order.set_epoch(1)
    assert list(order) != first and len(order) == 8
