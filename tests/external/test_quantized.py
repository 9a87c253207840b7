"""Quantised folders in the real vLLM, in transformers and in compressed-tensors itself: all read the codes
right.

The truth is a model with the weights decoded by pronghorn's verifier: an engine that reads a scale, a nibble
or a group wrongly is far from it. w8a8 and fp8 also quantise activations, in the engine only. vLLM on a CPU
has no kernel for NVFP4, and none for quantised experts without AMX: those are decoded by the library that
both engines use, and held against base + adapter in float32.
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
from safetensors.torch import load_file

import pronghorn
from pronghorn.export.verify import verify
from pronghorn.export.verify_codes import coded
from pronghorn.export.verify_decode import decode, load_decoded
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
DECODED = (("llama", "nvfp4"), ("mixtral", "w4a16"), ("mixtral", "fp8"), ("qwen3_moe", "w4a16"),
           ("qwen3_moe", "fp8"))  # fmt: skip
LIBRARY = Path(__file__).with_name("library_decode.py")
SCRIPT = Path(__file__).with_name("transformers_logits.py")
IN_VLLM = Path(pronghorn.__file__).parent / "export" / "verify_in_vllm.py"
# relative distance of a weight to base + adapter that rounding explains; normal values: 0.095, 0.1, 0.026
LOST = {"w4a16": 0.15, "nvfp4": 0.13, "w8a8": 0.015, "fp8": 0.035}
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
    every = (*CASES, *DECODED)
    pairs = {family: memorised.write_pair(home / family, family) for family, _ in every}
    folders = {case: home / "-".join(case) for case in every}
    for (family, name), folder in folders.items():
        pronghorn.export(pairs[family][1], folder, format=name)
    jobs = [{"model": str(folders[case]), "prompts": PROMPTS, "max_tokens": MAX_TOKENS} for case in CASES]
    served = dict(zip(CASES, vllm_engine.run(jobs, home), strict=True))
    logits = through_transformers(list(folders.values()), home)
    subprocess.run([vllm_engine.PYTHON, LIBRARY, home, *folders.values()], check=True)
    return {
        case: Read(*pairs[case[0]], folder, served.get(case, [[]])[0], [torch.tensor(row) for row in rows])
        for (case, folder), rows in zip(folders.items(), logits, strict=True)
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


@pytest.mark.parametrize("case", [*CASES, *DECODED], ids="-".join)
def test_transformers_reads_the_decoded_weights(
    everything: dict[tuple[str, str], Read], case: tuple[str, str]
) -> None:
    read = everything[case]
    twin = memorised.logits(load_decoded(Folder(read.folder), read.base))
    found = torch.cat(read.transformers)
    apart, trained = rms(found - twin), rms(twin - memorised.logits(memorised.load(read.base)))
    print(case, "rms of logits to the decoded weights:", apart, "of the base's:", trained)
    assert apart < 0.1 * trained


@pytest.mark.parametrize("case", [*CASES, *DECODED], ids="-".join)
def test_the_library_decodes_what_the_verifier_decodes(
    everything: dict[tuple[str, str], Read], case: tuple[str, str]
) -> None:
    read = everything[case]
    found = load_file(read.folder.with_suffix(".safetensors"))
    weights = coded(Folder(read.folder))
    assert found.keys() == weights.keys()
    truth = base_and_adapter(read)
    for name, one in weights.items():
        ours, _ = decode(one, 0, one.shape[0])
        theirs, exact = found[name].float(), truth[name]
        # the library computes in bfloat16: one rounding of the scale, one of the product
        assert bool(((theirs - ours).abs() <= 2.0**-7 * ours.abs()).all()), name
        lost, kept = (theirs - exact).norm() / exact.norm(), (ours - exact).norm() / exact.norm()
        assert lost < 1.05 * kept + 2.0**-8
        assert kept < LOST[case[1]], (name, float(kept))


def base_and_adapter(read: Read) -> dict[str, torch.Tensor]:
    """Matrices of base + adapter in float32, by PEFT's merge, under their names in the files."""
    found: dict[str, torch.Tensor] = {}
    for name, values in memorised.load(read.base, read.adapter).merge_and_unload().state_dict().items():
        module, _, leaf = name.rpartition(".")
        if values.dim() == 3:  # transformers stacks the experts, and gate on up
            for number, expert in enumerate(values):
                leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
                for one, part in zip(leaves, expert.chunk(len(leaves)), strict=True):
                    found[f"{module}.{number}.{one}.weight"] = part
        else:
            found[name] = values
    stored = {name for file in read.base.glob("*.safetensors") for name in load_file(file)}
    mixtral = (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    for name in list(found):
        other = name
        for ours, theirs in mixtral:
            other = other.replace(f".{ours}.", f".{theirs}.")
        if name not in stored and other in stored:
            found[other] = found[name]
    return found


def test_vllm_on_a_cpu_takes_nvfp4_as_far_as_its_kernels(everything: dict[tuple[str, str], Read]) -> None:
    folder = everything["llama", "nvfp4"].folder
    assert verify(folder, base=everything["llama", "nvfp4"].base).passed
    asked = {"folder": str(folder), "rows": [], "prompts": [PROMPTS[0]], "max_tokens": 1, "chat": []}
    asked["positions"] = 128
    job, out = folder.parent / "job.json", folder.parent / "stop.jsonl"
    job.write_text(json.dumps([asked]))
    command = [vllm_engine.PYTHON, IN_VLLM, job, out]
    subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False, timeout=300)
    error = json.loads(out.read_text().splitlines()[-1])["error"]
    # the folder's config became the weight-only NVFP4 scheme, for which only CUDA has a kernel
    assert "MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available" in error
