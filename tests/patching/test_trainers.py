"""Whole runs of trainers with and without acceleration: the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.trl_head import fuse_trl_head
from tests import tiny
from tests.patching.build import adapted, batch

OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "seed": 1,
}


def rows() -> list[dict[str, Any]]:
    made = batch(8, 17)
    return [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in zip(*made.values(), strict=True)]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("recompute", [None, "unsloth"])
def test_transformers_trainer(tmp_path: Path, recompute: str | None) -> None:
    found = []
    for fast in (False, True):
        model = adapted()
        if fast:
            accelerate(model, recompute=recompute)
        found.append(
            losses(Trainer(model, TrainingArguments(str(tmp_path), **OPTIONS), train_dataset=rows()))
        )
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert found[0][-1] < found[0][0]


def test_trl_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    found = []
    for fast in (False, True):
        model = adapted()
        arguments = trl.SFTConfig(str(tmp_path), max_length=None, **OPTIONS)
        trainer = trl.SFTTrainer(
            model,
            arguments,
            train_dataset=datasets.Dataset.from_list(rows()),
            processing_class=tiny.tokenizer(),
        )
        if fast:
            report = accelerate(model)
            assert fuse_trl_head(model).startswith(("replaced", "left: TRL has not"))
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert all(forward.calls for forward in report.forwards["mlp"])


def test_a_forward_that_keeps_its_logits_where_there_are_labels() -> None:
    """As TRL 1.4 to 1.14 puts one on a model."""
    model = adapted()
    base = model.get_base_model()
    plain = base.forward

    def forward(labels: Any = None, **inputs: Any) -> Any:
        out = plain(labels=labels, **inputs)
        if labels is not None:
            out.logits = None
        return out

    base.forward = forward
    report = accelerate(model)
    assert report.model_check.startswith("equal"), report.model_check
    assert report.count("mlp") == (2, 2)
