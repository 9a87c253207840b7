from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pronghorn.errors import ConfigError
from pronghorn.memory.counter import saved_bytes
from pronghorn.memory.layers import RecomputePlan, layers_of
from pronghorn.patching.accelerate import accelerate
from tests.patching.build import adapted, assert_same, batch, step


def same_bits(one: Any, two: Any) -> bool:
    return torch.equal(one[0], two[0]) and all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def kept(model: Any) -> int:
    """What the layers keep: the loss's own gradient is the same for every mode."""
    return saved_bytes(model, lambda: model(**batch(2, 64), use_cache=False).loss)


@pytest.mark.parametrize("mode", ["full", "unsloth", "auto"])
def test_losses_and_gradients_are_the_same_bits(mode: str) -> None:
    plain = adapted()
    plain.enable_input_require_grads()
    accelerate(plain)
    model = adapted()
    report = accelerate(model, recompute=mode, activation_bytes=0)
    assert report.count("recompute") == (2, 2)
    assert report.model_check.startswith("equal")
    assert same_bits(step(model), step(plain))


def test_full_recompute_runs_every_layer_again_and_auto_only_as_many_as_needed() -> None:
    runs: list[int] = []
    for budget in (0, 10**9):
        model = adapted()
        accelerate(model, recompute="auto", activation_bytes=budget)
        count = 0

        def hook(*_: Any) -> None:
            nonlocal count
            count += 1

        for layer in layers_of(model):
            layer.self_attn.register_forward_pre_hook(hook)
        step(model)
        runs.append(count)
    assert runs == [4, 2]


def test_plan_recomputes_the_fewest_layers_that_fit() -> None:
    plan = RecomputePlan(mode="auto", layers=8, kept_bytes=100, input_bytes=10, budget_bytes=500_000)
    assert plan.recomputed(tokens=100) == 0
    assert plan.recomputed(tokens=1_000) == 5  # 5 inputs, 3 kept and the one being recomputed: 450 000
    assert plan.recomputed(tokens=10_000) == 8
    counts = [plan.recomputed(tokens) for tokens in range(0, 5_000, 50)]
    assert counts == sorted(counts)


def test_auto_measures_what_a_layer_saves() -> None:
    model = adapted()
    report = accelerate(model, recompute="auto", activation_bytes=10**9)
    plan = next(s.plan for s in report.switches if s.kind == "recompute")
    tokens = 256
    measured = saved_bytes(model.train(), lambda: model(**batch(1, tokens), use_cache=False).loss)
    assert abs(plan.kept_bytes * plan.layers * tokens - measured) < 0.1 * measured


def test_a_trainer_that_switches_checkpointing_on_gets_ours(tmp_path: Any) -> None:
    model = adapted()
    accelerate(model, recompute="unsloth")
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        gradient_checkpointing=True,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    row = {k: v[0] for k, v in batch(1, 12).items()}
    Trainer(model, arguments, train_dataset=[row] * 2).train()
    functions = {type(layer._gradient_checkpointing_func).__name__ for layer in layers_of(model)}
    assert functions == {"LayerFunction"}


def test_undo_and_copies() -> None:
    model = adapted()
    report = accelerate(model, recompute="full")
    assert_same(step(copy.deepcopy(model)), step(adapted()))
    report.undo()
    assert not any(layer.gradient_checkpointing for layer in layers_of(model))
    assert "gradient_checkpointing_enable" not in model.get_base_model().__dict__
    assert_same(step(model), step(adapted()))


def test_unknown_mode() -> None:
    with pytest.raises(ConfigError, match=r"recompute='ful': unknown") as error:
        accelerate(adapted(), recompute="ful")
    assert "full, unsloth, auto" in error.value.fix
