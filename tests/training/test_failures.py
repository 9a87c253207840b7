"""What stops a run: NaN, no memory, signals. Each says what to do, and leaves the last good state."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pronghorn.errors import (
    ConfigError,
    MissingDependencyError,
    NonFiniteLossError,
    OutOfMemoryError,
    Preempted,
)
from pronghorn.training.checkpoint import list_checkpoints
from pronghorn.training.config import parse_config
from pronghorn.training.failures import is_out_of_memory, out_of_memory
from pronghorn.training.folder import RunFolder
from pronghorn.training.run import RunResult, train
from pronghorn.training.signals import StopSignals
from tests.training.conftest import MakeConfig
from tests.training.test_config import MINIMAL
from tests.training.test_resume import SignalAt, assert_same


class At(TrainerCallback):
    """Does something to the model when a step begins."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.act(model)


def spoil_base(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))


def spoil_gradient(value: float) -> Any:
    def act(model: Any) -> None:
        tensor = next(t for n, t in model.named_parameters() if "layers.1" in n and "lora_B" in n)
        tensor.register_hook(lambda gradient: torch.full_like(gradient, value))

    return act


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (spoil_base, "the loss of step 6 is nan"),
        (spoil_gradient(float("nan")), r"the gradient norm of step 6 is nan, in .*layers\.1\..*lora_B"),
        (spoil_gradient(float("inf")), r"the gradient norm of step 6 is (nan|inf), in .*layers\.1\..*lora_B"),
        (spoil_gradient(1e25), "the gradient norm of step 6 is inf; nothing"),  # its square overflows float32
    ],
)
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_number_that_is_not_finite_stops_the_run_and_is_saved_nowhere(
    make_config: MakeConfig, act: Any, said: str, clip: float
) -> None:
    sections = {"training": {"max_grad_norm": clip}, "checkpoints": {"every_steps": 2, "keep": 9}}
    config = make_config("spoilt", **sections)
    with pytest.raises(NonFiniteLossError, match=said) as caught:
        train(config, callbacks=[At(6, act)])
    assert caught.value.exit_code == 3 and "training.learning_rate" in caught.value.fix
    folder = RunFolder(Path(config["output"]["folder"]))
    assert [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)] == [4, 2]
    for path in folder.root.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    assert "NaN" not in folder.metrics.read_text() and not folder.adapter.exists()


def test_after_it_the_run_goes_on_from_the_last_good_checkpoint(
    make_config: MakeConfig, straight: RunResult
) -> None:
    config = make_config("spoilt")
    with pytest.raises(NonFiniteLossError):
        train(config, callbacks=[At(6, spoil_base)])
    assert_same(straight, train(config))


def test_a_run_without_memory_names_the_setting(make_config: MakeConfig) -> None:
    config = make_config("full")
    with pytest.raises(OutOfMemoryError, match="out of memory in training of step 3") as caught:
        train(config, callbacks=[At(3, lambda model: torch.empty(1 << 60))])  # the CPU allocator's own error
    assert "training.batch_size is 3: set it to 1" in caught.value.fix and caught.value.exit_code == 4
    assert not (Path(config["output"]["folder"]) / ".lock").exists()


@pytest.mark.parametrize(
    ("sections", "phase", "fix"),
    [
        ({"training": {"recompute": False}}, "training", "training.recompute is false"),
        (
            {"training": {"batch_size": 4, "gradient_accumulation": 2}},
            "training",
            "from 2 to 4 for the same rows",
        ),
        (
            {"training": {"batch_size": 1}, "model": {"name": "b", "max_seq_length": 512}},
            "training",
            "is 512",
        ),
        ({"eval": {"batch_size": 8}}, "evaluation", "eval.batch_size is 8: set it to 4"),
        ({"model": {"name": "b", "dtype": "float32"}}, "loading", "model.dtype is float32"),
    ],
)
def test_the_setting_to_change_depends_on_where_it_happened(
    sections: dict[str, Any], phase: str, fix: str
) -> None:
    assert fix in out_of_memory(parse_config({**MINIMAL, **sections}), 5, phase).fix


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(
        ValueError("not enough memory")
    )


def test_a_second_ctrl_c_ends_it_at_once_and_the_run_can_go_on(
    make_config: MakeConfig, straight: RunResult
) -> None:
    config = make_config("twice")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[SignalAt(6, signal.SIGINT), SignalAt(6, signal.SIGINT)])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    folder = RunFolder(Path(config["output"]["folder"]))
    assert not (folder.root / ".lock").exists()
    assert [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)] == [4]
    assert_same(straight, train(config))


def test_a_repeated_sigterm_changes_nothing() -> None:
    with StopSignals() as stop:
        stop.in_loop = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGTERM"


def test_a_signal_before_the_first_step_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped by SIGTERM before the first step") as caught, StopSignals():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_it_trains_and_leaves_the_handlers_alone(make_config: MakeConfig) -> None:
    before, seen = signal.getsignal(signal.SIGINT), []
    config = make_config("thread", training={"max_steps": 1})
    results: list[RunResult] = []
    look = At(1, lambda model: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=lambda: results.append(train(config, callbacks=[look])))
    thread.start()
    thread.join()
    assert results and results[0].steps == 1 and seen == [before]


def test_trackers_are_checked_before_anything_is_loaded(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"logging\.report_to: .*wandbb is not supported") as caught:
        train(make_config("a", logging={"report_to": ["wandbb"]}, model={"name": "/nowhere"}))
    assert "tensorboard" in caught.value.message
    with pytest.raises(MissingDependencyError, match="clearml is not installed"):
        train(make_config("b", logging={"report_to": "clearml"}, model={"name": "/nowhere"}))


def test_several_processes_on_gpus_are_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError.__mro__[1], match="WORLD_SIZE is 2: training on several GPUs"):
        train(make_config())
    assert os.environ["WORLD_SIZE"] == "2"
