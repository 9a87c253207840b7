"""The model stays an ordinary one: a user's own SFTTrainer and Trainer train it as we do."""

from __future__ import annotations

import inspect
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import LoraOptions
from pronghorn.loading.load import load
from pronghorn.training.collate import PadCollator
from pronghorn.training.config import parse_config
from pronghorn.training.material import gather
from pronghorn.training.progress import Narrator
from pronghorn.training.run import train
from pronghorn.training.trainer import Schedule, sft_arguments
from tests import tiny
from tests.training.conftest import MakeConfig
from tests.training.test_config import MINIMAL

NO_DROPOUT = {"r": 4, "dropout": 0.0}


class Losses(transformers.TrainerCallback):
    """Collects the logged losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def own_script(
    kind: Any, make_config: MakeConfig, tmp_path: Path, model: Any, tokenizer: Any, rows: Any
) -> list[float]:
    """What a user writes: the trainer of a library, its arguments, our model."""
    training = make_config()["training"]
    losses = Losses()
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / kind.__name__),
        "per_device_train_batch_size": training["batch_size"],
        "gradient_accumulation_steps": training["gradient_accumulation"],
        "num_train_epochs": training["epochs"],
        "learning_rate": training["learning_rate"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "data_seed": 42,
    }
    if kind is trl.SFTTrainer:
        built = kind(
            model=model,
            args=trl.SFTConfig(**arguments, max_length=None),
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[losses],
        )
    else:
        built = kind(
            model=model,
            args=transformers.TrainingArguments(**arguments),
            train_dataset=rows,
            data_collator=PadCollator(tokenizer.pad_token_id),
            callbacks=[losses],
        )
    built.train()
    return losses.values


@pytest.mark.parametrize("kind", [trl.SFTTrainer, transformers.Trainer])
def test_our_model_in_a_users_own_script_trains_as_in_our_run(
    make_config: MakeConfig, tmp_path: Path, base: Path, kind: Any
) -> None:
    ours = train(make_config("ours", lora=NO_DROPOUT, data={"eval": []}, training={"accelerate": False}))
    model, tokenizer = load(base, say=None)
    model = attach_lora(model, LoraOptions(**NO_DROPOUT), say=None)
    rows = gather(parse_config(make_config("rows", data={"eval": []})), Narrator(quiet=True)).rows
    losses = own_script(kind, make_config, tmp_path, model, tokenizer, rows)
    if kind is trl.SFTTrainer:
        rounded = [round(loss, 4) for loss in ours.losses]  # as transformers 4.56 logs them
        assert losses in (list(ours.losses), rounded)
    assert losses == pytest.approx(ours.losses, rel=1e-4)
    ids = tokenizer("import torch", return_tensors="pt")["input_ids"]
    assert model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_one_model_through_both_trainers_and_out_to_peft(
    make_config: MakeConfig, tmp_path: Path, base: Path
) -> None:
    model, tokenizer = load(base, say=None)
    model = attach_lora(model, LoraOptions(**NO_DROPOUT), say=None)
    rows = datasets.Dataset.from_list(
        [{"input_ids": [5, 6, 7, 8 + i], "labels": [-100, 6, 7, 8 + i]} for i in range(9)]
    )
    first = own_script(trl.SFTTrainer, make_config, tmp_path, model, tokenizer, rows)
    second = own_script(transformers.Trainer, make_config, tmp_path, model, tokenizer, rows)
    assert second[0] < first[0]
    model.save_pretrained(tmp_path / "adapter")
    from peft import AutoPeftModelForCausalLM

    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_run_sends_no_ping_and_plain_trl_would(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base_trainer = pytest.importorskip("trl.trainer.base_trainer")
    pings: list[str] = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda topic, **kwargs: pings.append(topic))
    monkeypatch.delenv("CI", raising=False)
    train(make_config(training={"max_steps": 1}))
    assert pings == []
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6], "labels": [5, 6]}])
    arguments = trl.SFTConfig(str(tmp_path / "plain"), report_to=[], use_cpu=True, bf16=False)
    trl.SFTTrainer(tiny.model("llama"), arguments, train_dataset=rows, processing_class=tiny.tokenizer())
    assert pings == ["trl/SFTTrainer"]


def public_objects() -> dict[str, int]:
    """Identity of every public function, class and method that training could be tempted to replace."""
    found: dict[str, int] = {}
    for module in (
        transformers,
        transformers.Trainer,
        trl,
        trl.SFTTrainer,
        torch,
        torch.nn.functional,
        os,
        signal,
    ):
        for name in dir(module):
            if not name.startswith("_"):
                try:
                    value = inspect.getattr_static(module, name)
                except AttributeError:
                    continue
                if callable(value):
                    found[f"{module.__name__}.{name}"] = id(value)
    return found


def test_a_run_leaves_libraries_environment_and_handlers_as_they_were(make_config: MakeConfig) -> None:
    train(make_config("first", training={"max_steps": 1}))  # whatever the libraries load lazily is loaded now
    before = public_objects(), dict(os.environ), signal.getsignal(signal.SIGINT)
    train(make_config("second", training={"max_steps": 1}))
    assert (public_objects(), dict(os.environ), signal.getsignal(signal.SIGINT)) == before


def test_the_arguments_say_what_the_configuration_says(tmp_path: Path) -> None:
    training = {
        "learning_rate": 3e-4,
        "schedule": "constant",
        "warmup_ratio": 0.25,
        "optimizer": "sgd",
        "recompute": False,
    }
    config = parse_config(
        {**MINIMAL, "seed": 5, "training": {**training, "max_steps": 8, "precision": "bf16"}}
    )
    schedule = Schedule.of(config, rows=10)
    assert schedule == Schedule(steps_per_epoch=2, total_steps=8, warmup_steps=2)
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    arguments = sft_arguments(config, schedule, tmp_path, model)
    assert arguments.learning_rate == 3e-4 and arguments.lr_scheduler_type == "constant_with_warmup"
    assert arguments.warmup_steps == 2 and arguments.max_steps == 8 and arguments.optim == "sgd"
    assert arguments.bf16 and not arguments.fp16 and not arguments.gradient_checkpointing
    assert arguments.seed == arguments.data_seed == 5 and not arguments.logging_nan_inf_filter
    assert arguments.report_to == [] and arguments.run_name == "a"


@pytest.mark.parametrize(
    ("dtype", "precision", "bf16"), [("bfloat16", "auto", True), ("float32", "auto", False)]
)
def test_precision_follows_the_base(tmp_path: Path, dtype: str, precision: str, bf16: bool) -> None:
    config = parse_config({**MINIMAL, "training": {"precision": precision}})
    model = SimpleNamespace(device=torch.device("cpu"), dtype=getattr(torch, dtype))
    assert sft_arguments(config, Schedule(1, 1, 0), tmp_path, model).bf16 is bf16


def test_partial_epochs_round_up() -> None:
    config = parse_config(
        {**MINIMAL, "training": {"epochs": 1.5, "batch_size": 3, "gradient_accumulation": 2}}
    )
    assert Schedule.of(config, rows=19) == Schedule(steps_per_epoch=4, total_steps=6, warmup_steps=0)
