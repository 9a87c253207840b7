"""Merged models with an image tower, and their language models alone, in the real vLLM and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.export.onto import MergeFormat
from pronghorn.export.repair import repair
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from tests import multimodal
from tests.external import memorised
from tests.external.memorised import BASE, MAX_TOKENS, PROMPTS, TRAINED
from tests.external.vllm_engine import ENGINE_SECONDS, PYTHON, ROOT

pytestmark = pytest.mark.external

PROGRAM = ROOT / "src" / "pronghorn" / "export" / "verify_in_vllm.py"
TORCHVISION = ROOT / ".venv-torchvision"
FAMILIES = tuple(multimodal.FAMILIES)
ROWS = [prompt + answer for prompt, answer in zip(PROMPTS, memorised.answers(TRAINED), strict=True)]


@dataclass
class Trained:
    """Folders made of one trained family by what they are, and what its base + adapter says."""

    greedy: list[list[int]]
    logprobs: list[torch.Tensor]
    margin: float
    folders: dict[str, Path] = field(default_factory=dict)


def train(root: Path, family: str) -> Trained:
    """Base and adapter that have memorised their answers, merged in every layout and as text alone."""
    built = multimodal.model(family)
    memorised.memorise(built, BASE, steps=60, rate=3e-3)
    bases = {
        layout: multimodal.write_base(root / layout.replace(" ", "-"), family, layout, built=built)
        for layout in multimodal.LAYOUTS[family]
    }
    adapter = multimodal.write_adapter(
        root / "adapter", bases["hub"], r=8, lora_alpha=16,
        train=lambda model: memorised.memorise(model, TRAINED, steps=80, rate=1e-2),
    )  # fmt: skip
    truth = multimodal.load(bases["hub"], adapter)
    assert memorised.greedy(truth) != memorised.greedy(multimodal.load(bases["hub"]))
    found = Trained(memorised.greedy(truth), logprobs(truth), memorised.narrowest_margin(truth, TRAINED))
    for layout, base in bases.items():
        found.folders[layout] = root / f"merged-{base.name}"
        export(adapter, found.folders[layout], base=base)
    if family in ("gemma3", "mistral3"):
        found.folders["text"] = root / "text"
        export(adapter, root / "text", base=bases["hub"], format=MergeFormat(text_only=True))
    if family == "gemma3":
        found.folders["repaired"] = root / "repaired"
        repair(found.folders["one level less"], root / "repaired")
        found.folders["no image processor"] = shutil.copytree(found.folders["hub"], root / "without")
        (root / "without" / "preprocessor_config.json").unlink()
    return found


@torch.no_grad()
def logprobs(model: Any) -> list[torch.Tensor]:
    """Log-probabilities of each row's tokens after the first."""
    found = []
    for row in ROWS:
        scores = model(input_ids=torch.tensor([row])).logits[0, :-1].float().log_softmax(-1)
        found.append(scores.gather(-1, torch.tensor(row[1:])[:, None])[:, 0])
    return found


def ask(folders: Mapping[str, Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """What vLLM makes of each folder; one engine after the other in one process."""
    for needed in (PYTHON, TORCHVISION):
        if not needed.exists():
            pytest.fail(f"{needed} is missing: `make {needed.relative_to(ROOT).parts[0]}` makes it")
    asked = {"rows": ROWS, "prompts": PROMPTS, "max_tokens": MAX_TOKENS, "positions": 256,
             "chat": [{"role": "user", "content": "Hello there"}]}  # fmt: skip
    job, out = scratch / "job.json", scratch / "out.jsonl"
    job.write_text(json.dumps([{"folder": str(folder), **asked} for folder in folders.values()]))
    libraries = f"{Path(__file__).parent / 'torchvision_ops'}{os.pathsep}{TORCHVISION}"
    done = subprocess.run(
        [PYTHON, PROGRAM, job, out],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": libraries},
        capture_output=True, text=True, timeout=ENGINE_SECONDS * len(folders), check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    found = {line["folder"]: line for line in lines if "begun" not in line}
    if len(found) != len(folders):
        pytest.fail(f"vLLM exited with code {done.returncode}:\n{done.stderr[-4000:]}")
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return {family: train(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def answers(
    trained: dict[str, Trained], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    folders = {
        f"{family}, {name}": folder
        for family, one in trained.items()
        for name, folder in one.folders.items()
        if (family, name) in SERVED
    }
    return ask(folders, tmp_path_factory.mktemp("vllm"))


REFUSED = [("gemma3", "one level less"), ("gemma3", "no image processor")]
RIGHT = [
    ("gemma3", "hub"), ("gemma3", "since 4.52"), ("gemma3", "repaired"), ("gemma3", "text"),
    ("mistral3", "hub"), ("mistral3", "text"), ("qwen2_5_vl", "hub"), ("qwen3_vl", "hub"),
]  # fmt: skip
SERVED = {*REFUSED, *RIGHT}


@pytest.mark.parametrize(("family", "name"), RIGHT)
def test_vllm_answers_as_base_and_adapter(
    trained: dict[str, Trained], answers: dict[str, dict[str, Any]], family: str, name: str
) -> None:
    one, found = trained[family], answers[f"{family}, {name}"]
    assert one.margin > 2.0, "too close to a tie to prove anything"
    assert found["error"] is None
    assert found["tokens"] == one.greedy
    for truth, ours in zip(one.logprobs, found["logprobs"], strict=True):
        assert (truth - torch.tensor(ours)).abs().mean() < 0.1  # bfloat16 arithmetic alone gives 0.01 to 0.03
    assert verify(one.folders[name]).engine("vllm").outcome == "right"


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_vllm_refuses_is_told_without_it(
    trained: dict[str, Trained], answers: dict[str, dict[str, Any]], family: str, name: str
) -> None:
    said = {"one level less": "no module or parameter named 'vision_tower.embeddings'"}
    assert said.get(name, "load image processor") in answers[f"{family}, {name}"]["error"]
    assert verify(trained[family].folders[name]).engine("vllm").outcome == "refused"
