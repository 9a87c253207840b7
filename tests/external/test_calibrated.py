"""w4a16 calibrated by the real llm-compressor: closer to the model than rounding, on rows it has not seen."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import pronghorn
from pronghorn.errors import ExportError
from pronghorn.export.onto import MergeFormat
from pronghorn.export.verify_decode import load_decoded
from pronghorn.export.verify_folder import Folder
from scripts.first_run import commands
from tests import tiny
from tests.export.test_whole import same_weights
from tests.external import memorised, vllm_engine
from tests.external.memorised import PROMPTS
from tests.external.test_vllm import prompt_logprobs
from tests.serving.test_docs import TEXT, needs_llm_compressor

pytestmark = pytest.mark.external

PYTHON = vllm_engine.ROOT / ".venv-gptq" / "bin" / "python"
WIDTH, HELD_OUT = 64, 24
MAX_TOKENS = 4


@dataclass(frozen=True)
class Made:
    """A base, an adapter, and the folders of both ways to choose codes; rows of text no training saw."""

    base: Path
    adapter: Path
    rounded: Path
    calibrated: Path
    report: Any
    held_out: list[list[int]]


def train(model: Any, rows: list[list[int]], steps: int, rate: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    order = random.Random(0)
    model.train()
    for _ in range(steps):
        ids = torch.tensor(order.sample(rows, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is missing: `make .venv-gptq` builds llm-compressor's environment")
    home = tmp_path_factory.mktemp("calibrated")
    ids = tiny.tokenizer()(Path(torch.__file__).read_text(encoding="utf-8"))["input_ids"]
    rows = [ids[at : at + WIDTH] for at in range(0, len(ids) - WIDTH, WIDTH)]
    random.Random(1).shuffle(rows)
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    model = tiny.model("llama", **memorised.OVERRIDES["llama"])
    train(model, rows, 120, 2e-3)
    model.to(torch.bfloat16).save_pretrained(home / "base", max_shard_size="200KB")
    tiny.tokenizer().save_pretrained(home / "base")
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    wrapped = get_peft_model(memorised.load(home / "base"), LoraConfig(**options))
    train(wrapped, rows, 40, 5e-3)
    wrapped.save_pretrained(home / "adapter")
    texts = [json.dumps({"text": tiny.tokenizer().decode(row)}) for row in rows[:128]]
    (home / "rows.jsonl").write_text("\n".join(texts))
    wanted = MergeFormat("w4a16", calibrate=home / "rows.jsonl", calibrate_python=PYTHON)
    report = pronghorn.export(home / "adapter", home / "calibrated", format=wanted)
    pronghorn.export(home / "adapter", home / "rounded", format="w4a16")
    return Made(home / "base", home / "adapter", home / "rounded", home / "calibrated", report, held_out)


@torch.no_grad()
def divergence(truth: Any, model: Any, rows: list[list[int]]) -> float:
    """KL(truth, model), mean over tokens."""
    p, q = (one(input_ids=torch.tensor(rows)).logits.double().log_softmax(-1) for one in (truth, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_is_closer_than_rounding_on_rows_it_has_not_seen(made: Made) -> None:
    truth = memorised.load(made.base, made.adapter)
    rounded, calibrated = (
        divergence(truth, load_decoded(Folder(folder), made.base), made.held_out)
        for folder in (made.rounded, made.calibrated)
    )
    print("KL to base + adapter on held-out rows: rounded", rounded, "calibrated", calibrated)
    assert calibrated < 0.8 * rounded


def test_the_folder_is_the_rounded_one_but_for_its_codes(made: Made) -> None:
    assert made.report.verified
    assert "chosen by GPTQ (llm-compressor) on 128 rows" in made.report.changes[0]
    checks = {row.name: row.detail for row in made.report.checks}
    assert "14 tensors hold calibrated codes" in checks["weights equal base + adapter, rounded once"]
    names = {path.name for path in made.rounded.iterdir()}
    assert {path.name for path in made.calibrated.iterdir()} == names
    other = 0
    for name in sorted(names):
        one, two = made.rounded / name, made.calibrated / name
        if name.endswith(".safetensors"):
            left, right = load_file(one), load_file(two)
            assert {key: (x.shape, x.dtype) for key, x in left.items()} == {
                key: (x.shape, x.dtype) for key, x in right.items()
            }
            differ = {key for key in left if not torch.equal(left[key], right[key])}
            assert all(key.endswith(("weight_packed", "weight_scale")) for key in differ)
            other += len(differ)
        elif name not in ("config.json", "model.safetensors.index.json"):
            assert one.read_bytes() == two.read_bytes(), name
    assert other >= 14
    config = json.loads((made.calibrated / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"].pop("actorder") == "static"
    assert config == json.loads((made.rounded / "config.json").read_text())


def test_a_merged_folder_gets_the_same_codes(made: Made, tmp_path: Path) -> None:
    pronghorn.export(made.adapter, tmp_path / "merged", verify=False)
    wanted = MergeFormat("w4a16", calibrate=made.base.parent / "rows.jsonl", calibrate_python=PYTHON)
    report = pronghorn.export(tmp_path / "merged", tmp_path / "out", format=wanted)
    assert same_weights(tmp_path / "out", made.calibrated)
    checks = {row.name: row.detail for row in report.checks}
    assert "14 tensors hold calibrated codes" in checks["weights equal the base, rounded once"]


def test_the_command_of_the_docs_runs(made: Made, tmp_path: Path) -> None:
    (command,) = [line for line in commands(TEXT) if needs_llm_compressor(line)]
    (tmp_path / "helper").symlink_to(made.adapter)
    (tmp_path / "rows.jsonl").symlink_to(made.base.parent / "rows.jsonl")
    (tmp_path / ".venv-gptq").symlink_to(PYTHON.parents[1])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "KL, nats a token" in done.stdout and "vllm serve" in done.stdout


def test_vllm_serves_the_calibrated_codes(made: Made, tmp_path: Path) -> None:
    job = {"model": str(made.calibrated), "prompts": PROMPTS, "max_tokens": MAX_TOKENS}
    ((answers,),) = vllm_engine.run([job], tmp_path)
    twin, rounded = (load_decoded(Folder(folder), made.base) for folder in (made.calibrated, made.rounded))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        said = torch.tensor(answer["prompt_logprobs"])
        near, far = (float((said - prompt_logprobs(one, prompt)).abs().mean()) for one in (twin, rounded))
        print("mean |dlogp| of vLLM to the calibrated codes:", near, "to the rounded ones:", far)
        assert near < 0.06 < far


def test_what_llm_compressor_says_is_told_and_nothing_appears(made: Made, tmp_path: Path) -> None:
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\nexec {PYTHON} -c \'raise OSError(28, "full")\'\n'
    )
    stub.chmod(0o755)
    wanted = MergeFormat("w4a16", calibrate=made.base.parent / "rows.jsonl", calibrate_python=stub)
    with pytest.raises(ExportError, match=r"llm-compressor failed with code 1: .*full"):
        pronghorn.export(made.adapter, tmp_path / "out", format=wanted, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["python"]
