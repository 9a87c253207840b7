"""What a run leaves behind, on every family; what it shows; bases in bfloat16; going on from an adapter."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pronghorn.errors import (
    AdapterError,
    ConfigError,
    DataError,
    NotSupportedError,
    OutOfMemoryError,
    RunConflictError,
    SourceError,
)
from pronghorn.loading.load import load
from pronghorn.training.manifest import add_fallbacks
from pronghorn.training.metrics import MetricsLog, read_metrics, row_from_logs
from pronghorn.training.run import train
from pronghorn.training.trainer import RunTrainer
from tests import tiny
from tests.stack import only_newer_peft, peft_trains_head_rows
from tests.training.conftest import MakeConfig


def test_the_run_folder_holds_all_there_is_to_know(make_config: MakeConfig, base: Path) -> None:
    result = train(make_config())
    assert sorted(path.name for path in result.folder.iterdir()) == [
        "adapter",
        "checkpoints",
        "inspect.html",
        "manifest.json",
        "metrics.jsonl",
        "run.yaml",
    ]
    assert (result.folder / "inspect.html").read_text().count("<h3>row ") == 5
    resolved = yaml.safe_load((result.folder / "run.yaml").read_text())
    assert resolved["lora"]["r"] == 4 and resolved["training"]["weight_decay"] == 0.0
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["base"]["path"] == str(base) and manifest["base"]["fingerprint"].startswith("ph1:")
    assert len(manifest["data"]["data_hash"]) == 64 and manifest["seeds"] == {
        "run": 42,
        "data": 0,
        "lora": 3407,
    }
    assert {"python", "torch", "transformers", "peft", "trl"} <= manifest["versions"].keys()
    assert manifest["trainable_parameters"] == 7424 and len(manifest["trainable"]) == 28
    record = json.loads((result.adapter / "pronghorn.json").read_text())
    assert record["base_fingerprint"] == manifest["base"]["fingerprint"]
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        path.name for path in result.adapter.iterdir()
    }


def test_new_tokens_train_and_are_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    words = ["<tool>", "</tool>"]
    rows = tmp_path / "tools.jsonl"
    row = {"prompt": "call", "completion": " <tool>add</tool>"}
    rows.write_text("".join(json.dumps({**row, "prompt": f"call {n}"}) + "\n" for n in range(12)))
    data = {"train": str(rows), "eval": ()}
    config = make_config(model={"new_tokens": words}, data=data, training={"max_steps": 3})
    with only_newer_peft(NotSupportedError, newer=peft_trains_head_rows()):
        result = train(config)
    record = json.loads((result.adapter / "pronghorn.json").read_text())
    assert record["vocab_rows"] == 514
    assert record["tokenizer_changes"] == ["tokenizer.json: taken from the adapter (2 new tokens)"]
    saved = load_file(result.adapter / "adapter_model.safetensors")
    rows_of = [tensor for name, tensor in saved.items() if "trainable_tokens_delta" in name]
    assert [list(tensor.shape) for tensor in rows_of] == [[2, 64], [2, 64]]
    assert not torch.equal(rows_of[0][0], rows_of[0][1])  # both began as the same mean
    _, tokenizer = load(result.adapter, say=None)
    assert tokenizer.convert_tokens_to_ids(words) == [512, 513]
    more = make_config("more", model={"name": str(result.adapter)}, data=data, training={"max_steps": 1})
    train({**more, "lora": None})  # goes on with the rows that were saved
    with pytest.raises(AdapterError, match="already has an adapter, which would not train the new tokens"):
        train(
            {
                **make_config("again"),
                "model": {"name": str(result.adapter), "new_tokens": ["<x>"]},
                "lora": None,
            }
        )


def test_metrics_have_every_step_once(make_config: MakeConfig) -> None:
    result = train(make_config())
    rows = read_metrics(result.folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[0].keys() == {
        "step", "loss", "learning_rate", "grad_norm", "token_accuracy", "epoch", "tokens", "seconds"
    }  # fmt: skip
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 8]
    assert steps[-1]["tokens"] == 2 * steps[3]["tokens"]  # two epochs of the same rows, padding not counted
    assert result.losses == tuple(row["loss"] for row in steps) and result.eval is not None
    assert result.eval["eval_loss"] == rows[-1]["eval_loss"] < rows[2]["loss"]


def test_metrics_continue_after_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 2, 3):
        log.append({"step": step})
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 2, 3]
    log.continue_after(2)
    assert log.path.read_text().splitlines() == ['{"step": 1}', '{"step": 2}', '{"step": 2}']
    assert row_from_logs({"train_runtime": 3.0, "train_loss": 1.0}, 3) is None


DIFFERENT = ("gemma2", "phi3", "qwen3_moe")  # softcapped logits, fused projections, experts


@pytest.mark.parametrize(
    "family",
    [
        *DIFFERENT,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in tiny.FAMILIES
            if name not in (*DIFFERENT, "llama")
        ),
    ],
)
def test_every_family_learns(make_config: MakeConfig, tmp_path: Path, family: str) -> None:
    base = tiny.write_base(tmp_path / family, family)
    lora = {"r": 4, "dropout": 0.0}
    result = train(make_config(model={"name": str(base)}, lora=lora, training={"learning_rate": 0.005}))
    rows = [row["eval_loss"] for row in read_metrics(result.folder / "metrics.jsonl") if "eval_loss" in row]
    assert rows[-1] < rows[0]
    weights = load_file(result.adapter / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)


def test_a_bfloat16_base_resumes_bit_for_bit_too(make_config: MakeConfig, tmp_path: Path) -> None:
    from pronghorn.errors import Preempted
    from tests.training.test_resume import SignalAt, assert_same

    model = {"name": str(tiny.write_base(tmp_path / "base", "qwen3", dtype=torch.bfloat16))}
    straight, config = train(make_config("straight", model=model)), make_config("stopped", model=model)
    with pytest.raises(Preempted):
        train(config, callbacks=[SignalAt(5)])
    assert_same(straight, train(config))


def test_going_on_from_an_adapter(make_config: MakeConfig) -> None:
    first = train(make_config("first"))
    config: dict[str, Any] = make_config("second", model={"name": str(first.adapter)})
    with pytest.raises(ConfigError, match="is an adapter with a rank and targets"):
        train(config)
    del config["lora"]
    second = train(config)
    assert second.eval is not None and first.eval is not None
    assert second.eval["eval_loss"] < first.eval["eval_loss"]
    assert yaml.safe_load((second.folder / "run.yaml").read_text())["lora"] is None
    assert train(config).was_finished


def test_going_on_from_an_adapter_whose_base_moved(
    make_config: MakeConfig, base: Path, tmp_path: Path
) -> None:
    few = {"max_steps": 1}
    first, moved = shutil.copytree(base, tmp_path / "first"), tmp_path / "moved"
    adapter = train(make_config(model={"name": str(first)}, training=few)).adapter
    first.rename(moved)
    config = make_config("more", model={"name": str(adapter)}, training=few, lora=None)
    with pytest.raises(AdapterError, match=r"is not here: .*\n.*model\.base in run\.yaml"):
        train(config)
    config["model"]["base"] = str(moved)
    assert train(config).steps == 1


def test_the_resolved_file_in_the_run_folder_is_the_same_run(make_config: MakeConfig) -> None:
    result = train(make_config())
    assert train(result.folder / "run.yaml").was_finished


def test_a_template_of_the_run_is_saved_with_the_adapter(make_config: MakeConfig, tmp_path: Path) -> None:
    template = tiny.CHATML.replace("\\n", " ")
    (tmp_path / "own.jinja").write_text(template)
    rows = [
        {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": w}]}
        for w in "wxyz"
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "chat.jsonl"), "eval": [], "template": str(tmp_path / "own.jinja")}
    result = train(make_config(data=data, training={"max_steps": 1}))
    assert (result.adapter / "chat_template.jinja").read_text() == template
    assert json.loads((result.folder / "manifest.json").read_text())["data"]["template_hash"]


def test_a_mistake_is_corrected_in_the_same_folder(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sealed yet, so another configuration takes nothing away: not "holds another run"."""
    with pytest.raises(SourceError, match="nowhere"):
        train(make_config(model={"name": str(tmp_path / "nowhere")}))
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3, "completion": "x"}\n')
    with pytest.raises(DataError, match="bad"):
        train(make_config(data={"train": str(tmp_path / "bad.jsonl")}))
    few = {"max_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match="step 1"):
        patch.setattr(RunTrainer, "training_step", out_of_memory)
        train(make_config(training={**few, "batch_size": 4}))
    result = train(make_config(training=few))
    assert result.steps == 1
    assert yaml.safe_load((result.folder / "run.yaml").read_text())["training"]["batch_size"] == 3
    assert json.loads((result.folder / "manifest.json").read_text())["data"]["train_rows"] == 19


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError


def test_a_run_yaml_of_the_user_is_never_replaced(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text("model: mine  # a comment\n")
    with pytest.raises(RunConflictError, match=r"run\.yaml was not written by a run"):
        train(make_config())
    assert (tmp_path / "run/run.yaml").read_text() == "model: mine  # a comment\n"


def test_plain_lines_when_stdout_is_no_terminal(
    make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    train(make_config(logging={"progress": "auto", "every_steps": 3}))
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "eval" not in line] == ["1/8", "3/8", "6/8", "8/8"]
    assert [line.split()[1] for line in lines if "eval loss" in line] == ["3/8", "6/8", "8/8"]
    assert "\r" not in out + err and "it/s" not in err and "{'loss'" not in out
    assert "7,424 of" in out and "19 to train, 7 to evaluate" in out


def test_nothing_is_printed_when_asked(make_config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    train(make_config(logging={"progress": "none"}))
    assert capfd.readouterr() == ("", "")


def test_a_bar_on_a_terminal(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    train(make_config(logging={"progress": "auto"}))
    assert "training" in terminal.getvalue() and "8/8" in terminal.getvalue() and "━" in terminal.getvalue()


def test_the_accelerated_run_is_the_plain_run(make_config: MakeConfig) -> None:
    lora = {"r": 4, "dropout": 0.0}
    settings = {"fast": {}, "tiled": {"mlp_tile_tokens": 5}, "plain": {"accelerate": False}}
    fast, tiled, plain = (
        train(make_config(name, lora=lora, training=setting)) for name, setting in settings.items()
    )
    # two orders of summation in float32, carried through 8 steps
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)
    assert tiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert json.loads((tiled.folder / "manifest.json").read_text())["acceleration"]["mlp_tile_tokens"] == 5
    kinds = json.loads((fast.folder / "manifest.json").read_text())["acceleration"]["kinds"]
    assert all(
        kinds[kind]["found"] == kinds[kind]["replaced"] for kind in ("norm", "mlp", "qkv", "o", "loss")
    )
    assert "acceleration" not in json.loads((plain.folder / "manifest.json").read_text())


def test_calls_that_ran_the_original_are_in_the_manifest(make_config: MakeConfig) -> None:
    """A float32 base under bfloat16 autocast: its linears are replaced, and decline every call."""
    options = {"lora": {"r": 4, "dropout": 0.0}, "training": {"precision": "bf16", "recompute": False}}
    run = train(make_config(**options))
    found = json.loads((run.folder / "manifest.json").read_text())["acceleration"]
    passes = 8 * 2 - 2  # two batches a step, but one in the last of each of two epochs
    why = "the weights are torch.float32, the computation is in torch.bfloat16"
    assert found["kinds"]["mlp"] == {"found": 2, "replaced": 2, "left": {}}
    assert found["fallbacks"]["mlp"] == {why: 2 * passes}


def test_the_precision_is_that_of_the_run_whatever_the_environment_says(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    brief = {"max_steps": 2}
    exact = train(make_config("exact", training=brief)).losses
    train(make_config("rounded", training={**brief, "precision": "bf16"}))
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ  # transformers 4 would leave it there
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert train(make_config("again", training=brief)).losses == exact
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_fallbacks_of_several_legs_add_up(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"acceleration": {"fallbacks": {}}, "seeds": {"run": 1}}))
    add_fallbacks(path, {"mlp": {"one": 2}})
    total = add_fallbacks(path, {"mlp": {"one": 3, "two": 1}, "qkv": {"one": 1}})
    assert total == {"mlp": {"one": 5, "two": 1}, "qkv": {"one": 1}}
    assert json.loads(path.read_text()) == {"acceleration": {"fallbacks": total}, "seeds": {"run": 1}}
