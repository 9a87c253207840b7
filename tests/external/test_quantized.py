"""Quantised folders in the real vLLM and in transformers with compressed-tensors: both read the codes right.

The truth is a model with the weights decoded by pronghorn's verifier: an engine that reads a scale, a nibble
or a group wrongly is far from it. w8a8 and fp8 also quantise activations, in the engine only.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import pronghorn
from pronghorn.export.verify_decode import load_decoded
from pronghorn.export.verify_folder import Folder
from tests.external import memorised, vllm_engine
from tests.external.memorised import MAX_TOKENS, PROMPTS, TRAINED, answers
from tests.external.test_vllm import prompt_logprobs, rms

pytestmark = pytest.mark.external

# (family, format) -> mean distance of prompt log-probabilities that the engine's own rounding explains;
# bfloat16 arithmetic gives 0.02, int8 activations 0.03, FP8 activations 0.1
CASES = {
    ("llama", "w4a16"): 0.06, ("llama", "w8a8"): 0.09, ("llama", "fp8"): 0.3, ("qwen2", "w4a16"): 0.06,
}  # fmt: skip
SCRIPT = Path(__file__).with_name("transformers_logits.py")
ROWS = [prompt + answer for prompt, answer in zip(PROMPTS, answers(TRAINED), strict=True)]


@dataclass(frozen=True)
class Read:
    """One quantised folder, vLLM's answers, and transformers' logits [tokens, vocabulary] of each row."""

    base: Path
    adapter: Path
    folder: Path
    vllm: list[dict[str, Any]]
    transformers: list[torch.Tensor]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Read]:
    home = tmp_path_factory.mktemp("quantised")
    pairs = {family: memorised.write_pair(home / family, family) for family, _ in CASES}
    folders = {case: home / "-".join(case) for case in CASES}
    for (family, name), folder in folders.items():
        pronghorn.export(pairs[family][1], folder, format=name)
    jobs = [
        {"model": str(folder), "prompts": PROMPTS, "max_tokens": MAX_TOKENS} for folder in folders.values()
    ]
    served = vllm_engine.run(jobs, home)
    logits = through_transformers(list(folders.values()), home)
    return {
        case: Read(*pairs[case[0]], folder, answer[0], [torch.tensor(row) for row in rows])
        for (case, folder), answer, rows in zip(folders.items(), served, logits, strict=True)
    }


def through_transformers(folders: list[Path], home: Path) -> list[list[list[list[float]]]]:
    """Logits by transformers in vLLM's environment, which has compressed-tensors."""
    job, out = home / "logits-job.json", home / "logits.json"
    job.write_text(json.dumps({"models": [str(folder) for folder in folders], "ids": ROWS}))
    finished = subprocess.run(
        [vllm_engine.PYTHON, SCRIPT, job, out],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    found: list[list[list[list[float]]]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_vllm_serves_the_decoded_weights(
    everything: dict[tuple[str, str], Read], case: tuple[str, str]
) -> None:
    read = everything[case]
    twin = load_decoded(Folder(read.folder), read.base)
    trained = memorised.load(read.base, read.adapter)
    assert memorised.narrowest_margin(twin, TRAINED) > 1.0, "too close to a tie to prove anything"
    assert [answer["tokens"] for answer in read.vllm] == memorised.greedy(twin) == memorised.greedy(trained)
    plain = memorised.load(read.base)
    distances = []
    for prompt, answer in zip(PROMPTS, read.vllm, strict=True):
        said = torch.tensor(answer["prompt_logprobs"])
        distances.append(float((said - prompt_logprobs(twin, prompt)).abs().mean()))
        assert float((said - prompt_logprobs(plain, prompt)).abs().mean()) > 2 * CASES[case]
    print(case, "mean |dlogp| of vLLM to the decoded weights:", distances)
    assert max(distances) < CASES[case]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_transformers_reads_the_decoded_weights(
    everything: dict[tuple[str, str], Read], case: tuple[str, str]
) -> None:
    read = everything[case]
    twin = memorised.logits(load_decoded(Folder(read.folder), read.base))
    found = torch.cat(read.transformers)
    apart, trained = rms(found - twin), rms(twin - memorised.logits(memorised.load(read.base)))
    print(case, "rms of logits to the decoded weights:", apart, "of the base's:", trained)
    assert apart < 0.1 * trained
