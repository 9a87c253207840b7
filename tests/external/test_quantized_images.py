"""Quantised multimodal folders in the real vLLM and transformers: both compute the decoded weights.

The truth is a model with the weights decoded by pronghorn's verifier. vLLM on a CPU has no kernel for NVFP4,
which transformers alone proves. Rows are text; the tower is loaded, and its bytes are the base's.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_decode import load_decoded
from pronghorn.export.verify_folder import Folder
from tests import multimodal
from tests.export.damage import edit_json
from tests.export.test_quantized_images import IGNORED
from tests.external import memorised
from tests.external.memorised import TRAINED
from tests.external.test_quantized import through_transformers
from tests.external.test_vllm import rms
from tests.external.test_vllm_images import ask, logprobs

pytestmark = pytest.mark.external

# (family, layout, format)
SERVED = [
    ("gemma3", "hub", "w4a16"), ("gemma3", "hub", "w8a8"), ("gemma3", "hub", "fp8"),
    ("gemma3", "since 4.52", "w4a16"), ("mistral3", "hub", "w4a16"), ("qwen2_5_vl", "hub", "w4a16"),
    ("qwen3_vl", "hub", "w4a16"),
]  # fmt: skip
DECODED = [(family, "hub", "nvfp4") for family in multimodal.FAMILIES]
# what ``ignore`` lists -> what vLLM says of Gemma 3 in w4a16, None where it answers right
BROKEN = {"names of transformers": "has no attribute 'data'", "names of the hub": None}
# mean distance of vLLM's log-probabilities that bfloat16 and quantised activations explain; w4a16 itself
# moves them by 0.02
APART = {"w4a16": 0.01, "w8a8": 0.02, "fp8": 0.05}
# the same of logits in transformers, relative to their size
ROUNDING = {"w4a16": 0.015, "nvfp4": 0.015, "w8a8": 0.025, "fp8": 0.06}


@dataclass(frozen=True)
class Made:
    """A folder, the base it was quantised from, and its weights as the verifier decodes them."""

    base: Path
    folder: Path
    twin: Any


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Made]:
    home = tmp_path_factory.mktemp("images")
    cases, built = [*SERVED, *DECODED], {}
    for family in dict.fromkeys(family for family, _, _ in cases):
        built[family] = multimodal.model(family)
        memorised.memorise(built[family], TRAINED, steps=60, rate=3e-3)
    found = {}
    for family, layout, name in cases:
        base = home / f"{family}-{layout.replace(' ', '-')}"
        if not base.exists():
            multimodal.write_base(base, family, layout, built=built[family])
        folder = export(base, home / f"{base.name}-{name}", format=name, verify=False).folder
        found[family, layout, name] = Made(base, folder, load_decoded(Folder(folder), base))
    return found


@pytest.fixture(scope="module")
def answers(
    made: dict[tuple[str, str, str], Made], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    home = tmp_path_factory.mktemp("vllm")
    folders = {"-".join(case): made[case].folder for case in SERVED}
    for name in BROKEN:
        folders[name] = Path(shutil.copytree(made["gemma3", "hub", "w4a16"].folder, home / name))
        settings = json.loads((folders[name] / "config.json").read_text())["quantization_config"]
        listed = {**settings, "ignore": [*IGNORED[name][0], "lm_head"]}
        edit_json(folders[name] / "config.json", quantization_config=listed)
    return ask(folders, home)


@pytest.mark.parametrize("case", SERVED, ids="-".join)
def test_vllm_serves_the_decoded_weights(
    made: dict[tuple[str, str, str], Made], answers: dict[str, dict[str, Any]], case: tuple[str, str, str]
) -> None:
    one, found = made[case], answers["-".join(case)]
    assert found["error"] is None
    assert found["tokens"] == memorised.greedy(one.twin)
    apart = [
        float((truth - torch.tensor(ours)).abs().mean())
        for truth, ours in zip(logprobs(one.twin), found["logprobs"], strict=True)
    ]
    print(case, "mean |dlogp| of vLLM to the decoded weights:", apart)
    assert max(apart) < APART[case[2]]
    assert verify(one.folder).engine("vllm").outcome == "right"


def test_transformers_reads_the_decoded_weights(
    made: dict[tuple[str, str, str], Made], tmp_path: Path
) -> None:
    found = through_transformers([one.folder for one in made.values()], tmp_path)
    for (case, one), rows in zip(made.items(), found, strict=True):
        twin = memorised.logits(one.twin)
        apart = rms(torch.cat([torch.tensor(row) for row in rows]) - twin) / rms(twin)
        print(case, "rms of logits to the decoded weights, of their own:", apart)
        assert apart < ROUNDING[case[2]], case


@pytest.mark.parametrize("name", BROKEN)
def test_a_tower_by_other_names_is_as_the_shallow_verdict_says(
    made: dict[tuple[str, str, str], Made], answers: dict[str, dict[str, Any]], name: str
) -> None:
    said, wanted = answers[name]["error"], BROKEN[name]
    assert wanted in said if wanted else said is None
    assert IGNORED[name][1][1] == ("refused" if wanted else "right")
