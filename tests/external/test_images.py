"""Merged models with an image tower are asked about images: transformers and the real vLLM answer alike.

The adapter has memorised an answer to each pair of question and image, so an image that is not seen, or seen
otherwise than at training, gives other tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pronghorn.export.run import export
from pronghorn.export.verify_engine import FACTOR
from tests import multimodal
from tests.external.memorised import EOS_ID
from tests.external.test_vllm_images import TORCHVISION
from tests.external.vllm_engine import ENGINE_SECONDS, PYTHON

pytestmark = pytest.mark.external

SCRIPT = Path(__file__).with_name("image_answers.py")
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
# family -> what stands for the image in a prompt
MARKS = {
    "gemma3": "<start_of_image>", "mistral3": "[IMG]", "qwen2_5_vl": _QWEN_MARK, "qwen3_vl": _QWEN_MARK,
}  # fmt: skip
QUESTIONS = ("Which animal is it?", "Say the colour.")
ANSWER_TOKENS = 8  # including the end token
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """One family: a merged folder, base + adapter in float32, and what each engine said of the folder."""

    truth: Any
    inputs: list[Inputs]
    answers: list[list[int]]
    transformers: list[dict[str, Any]]
    vllm: list[dict[str, Any]]


def run(engine: str, folders: list[Path], questions: list[list[str]], scratch: Path) -> list[Any]:
    """A job of ``image_answers.py``."""
    job, out = scratch / f"{engine}.json", scratch / f"{engine}.pt"
    given = {"engine": engine, "folders": [str(one) for one in folders], "asked": questions}
    job.write_text(json.dumps({**given, "max_tokens": ANSWER_TOKENS + 4}))
    libraries = f"{Path(__file__).parent / 'torchvision_ops'}{os.pathsep}{TORCHVISION}"
    done = subprocess.run(
        [PYTHON, SCRIPT, job, out],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": libraries},
        capture_output=True, text=True, timeout=ENGINE_SECONDS * len(folders), check=False,
    )  # fmt: skip
    if not out.exists():
        pytest.fail(f"{engine} exited with code {done.returncode}:\n{done.stderr[-4000:]}")
    found: list[Any] = torch.load(out)
    return found


def questions(family: str, images: list[Path]) -> list[list[str]]:
    """Every question about every image."""
    return [[f"{MARKS[family]}{text}", str(image)] for text in QUESTIONS for image in images]


def continued(inputs: Inputs, answer: list[int]) -> Inputs:
    """The inputs with an answer behind the prompt."""
    tail = {
        "input_ids": torch.tensor([answer]),
        "attention_mask": torch.ones(1, len(answer), dtype=torch.long),
    }
    width = inputs["input_ids"].shape
    return {
        name: torch.cat([x, tail.get(name, torch.zeros(1, len(answer), dtype=x.dtype))], 1)
        if x.shape == width
        else x
        for name, x in inputs.items()
    }


def answer_logits(model: Any, inputs: Inputs, answer: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] before each token of an answer."""
    logits = model(**continued(inputs, answer)).logits[0]
    return logits[inputs["input_ids"].shape[1] - 1 : -1]


def memorise(model: Any, inputs: list[Inputs], answers: list[list[int]], *, steps: int = 120) -> None:
    """Train what is trainable until each question about each image has its own answer."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        for one, answer in zip(inputs, answers, strict=True):
            logits = answer_logits(model, one, answer).float()
            torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Asked]:
    home = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    images = [home / "blue.npy", home / "noise.npy"]
    ramp = np.linspace(0, 255, 28 * 28, dtype=np.uint8).reshape(28, 28)
    np.save(images[0], np.stack([ramp * 0, ramp.T // 2, ramp], -1))
    np.save(images[1], generator.integers(0, 256, (28, 28, 3), dtype=np.uint8))
    count = len(QUESTIONS) * len(images)
    answers = [[*row, EOS_ID] for row in generator.integers(10, 400, (count, ANSWER_TOKENS - 1)).tolist()]
    found = {}
    for family in MARKS:
        root = home / family
        base = multimodal.write_base(root / "base", family)
        ((*processed,),) = run("processor", [base], questions(family, images), root)
        inputs = [one["inputs"] for one in processed]

        def train(model: Any, inputs: list[Inputs] = inputs) -> None:
            memorise(model, inputs, answers)

        adapter = multimodal.write_adapter(root / "adapter", base, r=8, lora_alpha=16, train=train)
        merged = export(adapter, root / "merged").folder
        (ours,) = run("transformers", [merged], questions(family, images), root)
        (served,) = run("vllm", [merged], questions(family, images), root)
        found[family] = Asked(multimodal.load(base, adapter), inputs, answers, ours, served)
    return found


@pytest.mark.parametrize("family", MARKS)
@torch.no_grad()
def test_both_engines_answer_about_images_as_base_and_adapter(asked: dict[str, Asked], family: str) -> None:
    one = asked[family]
    truth, rounded = [], []
    for inputs, answer, ours, served in zip(one.inputs, one.answers, one.transformers, one.vllm, strict=True):
        logits = answer_logits(one.truth, inputs, answer).float()
        best, second = logits.topk(2).values.unbind(-1)
        assert float((best - second).min()) > 2.0, "too close to a tie to prove anything"
        assert logits.argmax(-1).tolist() == answer
        assert torch.equal(ours["inputs"]["input_ids"], inputs["input_ids"]), "the processor is the base's"
        assert torch.equal(served["inputs"]["input_ids"], inputs["input_ids"])
        assert ours["tokens"] == served["tokens"] == answer
        truth.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
        rounded.append(torch.tensor(ours["rounded"]))
    exact = torch.cat(truth)

    def off(said: list[list[float]]) -> float:
        return float((torch.tensor(said).flatten() - exact).abs().mean())

    noise = float((torch.cat(rounded) - exact).abs().mean())
    in_float32, in_vllm = (off([x["logprobs"] for x in said]) for said in (one.transformers, one.vllm))
    print(family, "mean |dlogp| in bfloat16:", noise, "merged, float32:", in_float32, "vLLM:", in_vllm)
    assert max(in_float32, in_vllm) <= FACTOR * noise + 1e-4


@pytest.mark.parametrize("family", MARKS)
@torch.no_grad()
def test_the_image_is_what_is_answered_about(asked: dict[str, Asked], family: str) -> None:
    one = asked[family]
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(one.inputs[first]["input_ids"], one.inputs[second]["input_ids"])
        assert one.vllm[first]["tokens"] != one.vllm[second]["tokens"]
