"""An adapter on a quantised base in the real vLLM: it answers as PEFT does on the decoded base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pronghorn.errors import NotSupportedError
from pronghorn.export.run import export
from pronghorn.export.verify_decode import load_decoded
from pronghorn.export.verify_folder import Folder
from pronghorn.serving.vllm import plan_serving
from tests import tiny
from tests.external import memorised, vllm_engine
from tests.external.memorised import MAX_TOKENS, PROMPTS

pytestmark = pytest.mark.external

# mean distance of the answers' log-probabilities that the engine's own rounding explains: 0.002 was measured
# with bfloat16 arithmetic, and for fp8 with activations in FP8; without the adapter it is 8
ROUNDING = {"w4a16": 0.02, "fp8": 0.02}


@dataclass(frozen=True)
class Served:
    """vLLM's answers on quantised bases by format, [plain, adapter][prompt]."""

    base: Path
    adapter: Path
    folders: dict[str, Path]
    answers: dict[str, list[list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    home = tmp_path_factory.mktemp("quantised-base")
    base, adapter = memorised.write_pair(home, "llama")
    idle = tiny.write_adapter(home / "idle", base, scale=0.0)
    folders = {name: export(idle, home / name, format=name).folder for name in (*ROUNDING, "w8a8")}
    jobs = []
    for name in ROUNDING:
        plan = plan_serving(adapter, base=folders[name])
        assert plan.arguments["enable_lora"] is True
        asked = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}
        jobs.append({"model": str(plan.model), "adapters": [str(plan.adapter)], **asked})
    answers = vllm_engine.run(jobs, home)
    return Served(base, adapter, folders, dict(zip(ROUNDING, answers, strict=True)))


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probability of each token of an answer."""
    scores = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return scores.float().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("name", ROUNDING)
def test_vllm_answers_as_peft_on_the_decoded_base(served: Served, name: str) -> None:
    twin = load_decoded(Folder(served.folders[name]), served.base)
    plain, found = served.answers[name]
    assert [answer["tokens"] for answer in plain] == memorised.greedy(twin), "the base by itself"
    trained = PeftModel.from_pretrained(twin, served.adapter).eval()
    assert memorised.narrowest_margin(trained, memorised.TRAINED) > 1.0, "too close to a tie"
    assert [answer["tokens"] for answer in found] == memorised.greedy(trained)
    for prompt, answer, alone in zip(PROMPTS, found, plain, strict=True):
        said = torch.tensor(answer["logprobs"])
        apart = float((said - logprobs(trained, prompt, answer["tokens"])).abs().mean())
        with trained.disable_adapter():
            without = float((said - logprobs(trained, prompt, answer["tokens"])).abs().mean())
        print(name, "mean |dlogp| to PEFT on the decoded base:", apart, "to the base alone:", without)
        assert apart < ROUNDING[name] < without / 4
        assert answer["tokens"] != alone["tokens"]


def test_what_vllms_cpu_build_cannot_do_is_refused_before(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotSupportedError, match="vLLM's CPU build ends at its start with any adapter"):
        plan_serving(served.adapter, base=served.folders["w8a8"])
    job = {"model": str(served.folders["w8a8"]), "adapters": [str(served.adapter)], "prompts": PROMPTS,
           "max_tokens": 1}  # fmt: skip
    (served.base.parent / "answers.json").unlink()
    with pytest.raises(pytest.fail.Exception, match="'NoneType' object has no attribute 'device'"):
        vllm_engine.run([job], served.base.parent)
