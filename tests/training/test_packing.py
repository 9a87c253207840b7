"""Packed runs: what the model is given, the same numbers as separate rows, and resume to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pronghorn.errors import NotSupportedError, Preempted, RunConflictError
from pronghorn.training.collate import NOT_FOR_THE_MODEL, TOKENS, PackCollator, PadCollator, RowCollator
from pronghorn.training.evaluation import TokenTotals, add_batch
from pronghorn.training.metrics import read_metrics
from pronghorn.training.run import train
from tests import tiny
from tests.training.conftest import MakeConfig
from tests.training.test_evaluation import ragged_rows

PACKED = {"packing": True, "pack_tokens": 64}
SHORT = {"max_seq_length": 48}


def bins_of(rows: list[dict[str, list[int]]], groups: list[list[int]]) -> list[dict[str, list[int]]]:
    """Rows put end to end as said."""
    return [
        {
            "input_ids": [token for index in group for token in rows[index]["input_ids"]],
            "labels": [label for index in group for label in rows[index]["labels"]],
            "lengths": [len(rows[index]["input_ids"]) for index in group],
        }
        for group in groups
    ]


def test_collated_bins() -> None:
    rows = [{"input_ids": [i] * n, "labels": [i] * n} for i, n in ((1, 3), (2, 1), (3, 2))]
    batch = RowCollator(9)(bins_of(rows, [[0, 1, 2], [2]]))
    assert batch["input_ids"].tolist() == [[1, 1, 1, 2, 3, 3], [3, 3, 9, 9, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch["labels"].tolist() == [
        [-100, 1, 1, -100, -100, 3],
        [-100, 3, -100, -100, -100, -100],
    ]
    assert batch[TOKENS].tolist() == [6, 2] and "attention_mask" not in batch
    assert "attention_mask" in RowCollator(9)(rows)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gemma2", "eager"),  # softcapped: has no sdpa
        ("gemma3", "sdpa"),
        ("phi3", "sdpa"),
        ("qwen3_moe", "sdpa"),
    ],
)
def test_packed_padded_and_alone_are_one_loss_and_one_gradient(family: str, attention: str) -> None:
    """Against float64, packed and padded may be no further from the truth than rows one by one, x2."""
    rows = ragged_rows(8)
    groups = [[0, 5, 2], [7, 1, 4], [6, 3]]
    cuts = {
        "alone": [PadCollator(0)([row]) for row in rows],
        "padded": [PadCollator(0)(rows)],
        "packed": [PackCollator(0)(bins_of(rows, groups))],
        "bins alone": [PackCollator(0)(bins_of(rows, [group])) for group in groups],
    }
    model = tiny.model(family)
    model.set_attn_implementation(attention)
    if family == "qwen3_moe" and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matrix products know no float64
    found = {name: summed(model, batches) for name, batches in cuts.items()}
    loss, gradient, logits = summed(model.double(), cuts["alone"])
    allowed = [
        distance(value, truth) for value, truth in zip(found["alone"], (loss, gradient, logits), strict=True)
    ]
    for name in ("padded", "packed", "bins alone"):
        for value, truth, bound in zip(found[name], (loss, gradient, logits), allowed, strict=True):
            assert distance(value, truth) <= 2 * bound + 1e-7, name


def summed(
    model: Any, batches: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss over all batches divided by all trained tokens, its gradient, and sorted log-probabilities."""
    model.zero_grad()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    scores: list[torch.Tensor] = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        wanted = targets != -100
        chosen = logits[wanted].log_softmax(-1).gather(-1, targets[wanted][:, None])
        (-chosen.sum() / count).backward()
        scores.append(chosen.detach().flatten())
    all_scores = torch.cat(scores).double()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    return -all_scores.sum() / count, gradient, all_scores.sort().values


def distance(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


def test_packed_evaluation_would_be_the_same() -> None:
    model, rows = tiny.model("llama"), ragged_rows(7)
    padded, packed = TokenTotals(), TokenTotals()
    add_batch(padded, model, model, PadCollator(0)(rows))
    add_batch(packed, model, model, PackCollator(0)(bins_of(rows, [[0, 3, 6], [1, 2, 4, 5]])))
    assert packed.tokens == padded.tokens and packed.correct == padded.correct
    assert packed.loss == pytest.approx(padded.loss, rel=1e-6)


def test_a_packed_run_takes_the_step_of_separate_rows(make_config: MakeConfig) -> None:
    """All rows in one step: 19x1, one bin at a time, two bins at a time."""
    found = []
    for name, data, batch, steps in (
        ("rows", {}, 1, 19),
        ("bins", PACKED, 1, 99),
        ("pairs", PACKED, 2, 99),
    ):
        sections: dict[str, Any] = {
            "model": SHORT,
            "data": data,
            "training": {"batch_size": batch, "gradient_accumulation": steps, "max_steps": 1},
            "lora": {"dropout": 0.0},
        }
        result = train(make_config(name, **sections))
        row = next(row for row in read_metrics(result.folder / "metrics.jsonl") if "loss" in row)
        found.append({key: row[key] for key in ("loss", "grad_norm", "tokens")})
        assert result.eval is not None
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


class StopAfter(transformers.TrainerCallback):
    """Asks for a stop as a signal would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


def test_a_packed_run_resumes_bit_for_bit(make_config: MakeConfig) -> None:
    sections: dict[str, Any] = {"data": PACKED, "model": SHORT, "training": {"batch_size": 1, "epochs": 3}}
    straight = train(make_config("straight", **sections))
    with pytest.raises(Preempted):
        train(make_config("stopped", **sections), callbacks=[StopAfter(3)])
    resumed = train(make_config("stopped", **sections))
    assert resumed.resumed_from == 3 and straight.steps > 4
    assert resumed.losses == straight.losses and resumed.eval == straight.eval
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in (straight, resumed))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_manifest_says_how_the_rows_were_packed(make_config: MakeConfig) -> None:
    sections: dict[str, Any] = {"data": PACKED, "model": SHORT, "training": {"max_steps": 1}}
    result = train(make_config(**sections))
    path = result.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["data"]["packing"]["rows"] == 19 and manifest["data"]["packing"]["bin_tokens"] == 64
    manifest["data"]["packing"]["layout_hash"] = "other"
    path.write_text(json.dumps(manifest))
    (result.folder / "adapter").rename(result.folder / "moved")
    with pytest.raises(RunConflictError, match=r"data\.packing"):
        train(make_config(**sections))


def test_the_self_test_runs_before_training_and_says_so(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train(make_config(data=PACKED, model=SHORT, training={"max_steps": 1}, logging={"progress": "plain"}))
    said = " ".join("".join(capsys.readouterr()).split())
    assert "packing: logits packed and alone differ by" in said and "% filled" in said


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_16_bit_base_trains_packed(make_config: MakeConfig, tmp_path: Path, family: str) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    run = {"model": {"name": str(base), **SHORT}, "training": {"max_steps": 3}}
    losses = train(make_config("packed", data=PACKED, **run)).losses
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_a_leaking_base_is_refused_before_a_step(make_config: MakeConfig, tmp_path: Path) -> None:
    from tests.training.test_isolation import leaking

    folder = tmp_path / "lfm2"
    leaking("lfm2", torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with pytest.raises(NotSupportedError, match="see each other in Lfm2ForCausalLM"):
        train(make_config(model={"name": str(folder), **SHORT}, data=PACKED, training={"max_steps": 1}))
