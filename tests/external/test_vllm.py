"""What was trained is what the real vLLM serves: a merged folder, and base + adapter by LoRARequest."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import pronghorn
from tests.external import memorised, vllm_engine
from tests.external.memorised import BASE, MAX_TOKENS, PROMPTS, TRAINED

pytestmark = pytest.mark.external

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
MIXTURES = ("mixtral", "qwen3_moe")  # vLLM's CPU build dies at warm-up with LoRA on these: merged only


@dataclass(frozen=True)
class Served:
    """One family's folders and vLLM's answers, each a list with one entry per prompt."""

    base: Path
    adapter: Path
    merged: Path
    from_merged: list[dict[str, Any]]
    from_base: list[dict[str, Any]] | None
    from_adapter: list[dict[str, Any]] | None


def serve(families: tuple[str, ...], folder: Path) -> dict[str, Served]:
    """Train, merge and serve ``families`` in one vLLM process, two engine starts for each dense family."""
    folders: dict[str, tuple[Path, Path, Path]] = {}
    engines: list[dict[str, Any]] = []
    for family in families:
        base, adapter = memorised.write_pair(folder / family, family)
        merged = folder / family / "merged"
        pronghorn.export(adapter, merged)
        folders[family] = base, adapter, merged
        asked = {"prompts": PROMPTS, "max_tokens": MAX_TOKENS}
        engines.append({"model": str(merged), **asked})
        if family in DENSE:
            engines.append({"model": str(base), "adapters": [str(adapter)], **asked})
    answers = iter(vllm_engine.run(engines, folder))
    served = {}
    for family in families:
        (from_merged,) = next(answers)
        from_base, from_adapter = next(answers) if family in DENSE else (None, None)
        served[family] = Served(*folders[family], from_merged, from_base, from_adapter)
    return served


def check_merged(served: Served) -> None:
    """vLLM's greedy tokens and prompt log-probabilities on the merged folder are those of base + adapter."""
    trained = memorised.load(served.base, served.adapter)
    assert memorised.narrowest_margin(trained, TRAINED) > 2.0, "too close to a tie to prove anything"
    expected = memorised.greedy(trained)
    assert [answer["tokens"] for answer in served.from_merged] == expected
    assert expected != memorised.greedy(memorised.load(served.base)), "the adapter changes nothing"
    for prompt, answer in zip(PROMPTS, served.from_merged, strict=True):
        distance = (torch.tensor(answer["prompt_logprobs"]) - prompt_logprobs(trained, prompt)).abs().mean()
        assert distance < 0.1  # bfloat16 arithmetic alone gives 0.01 to 0.03


def check_adapter(served: Served) -> None:
    """vLLM's greedy tokens through LoRARequest are those of base + adapter; without it, those of the base."""
    assert served.from_base is not None
    assert served.from_adapter is not None
    base, trained = memorised.load(served.base), memorised.load(served.base, served.adapter)
    assert memorised.narrowest_margin(base, BASE) > 2.0, "too close to a tie to prove anything"
    assert [answer["tokens"] for answer in served.from_base] == memorised.greedy(base)
    assert [answer["tokens"] for answer in served.from_adapter] == memorised.greedy(trained)
    assert served.from_adapter != served.from_base, "the adapter changes nothing"


def check_logits(served: Served) -> None:
    """The merged files give the logits of base + adapter; the same check fails if one adapter tensor is lost.

    The tolerance is 1.5 times what rounding PEFT's own float32 merge once to bfloat16 does to the logits.
    """
    trained = memorised.load(served.base, served.adapter)
    truth = memorised.logits(trained)
    rounded = copy.deepcopy(trained).merge_and_unload().to(torch.bfloat16).float()
    tolerance = 1.5 * rms(memorised.logits(rounded) - truth)
    merged = memorised.logits(memorised.load(served.merged))

    assert rms(merged - truth) <= tolerance
    assert rms(memorised.logits(memorised.load(served.base)) - truth) >= 100 * tolerance
    halves = [(name, half) for name, half in trained.named_parameters() if "lora_" in name]
    assert len(halves) >= 12
    for name, half in halves:
        kept = half.detach().clone()
        half.data.zero_()
        assert rms(merged - memorised.logits(trained)) > tolerance, f"without {name} the check passes"
        half.data.copy_(kept)


def rms(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(values.square().mean().sqrt())


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    """Log-probability of each prompt token after the first, [tokens - 1]."""
    scores = model(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.mark.smoke
def test_smoke_one_family_through_both_roads(tmp_path: Path) -> None:
    served = serve(("llama",), tmp_path)["llama"]
    check_logits(served)
    check_merged(served)
    check_adapter(served)


@pytest.fixture(scope="module")
def every_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    return serve(DENSE + MIXTURES, tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("family", DENSE + MIXTURES)
def test_merged_folder_answers_as_base_and_adapter(every_family: dict[str, Served], family: str) -> None:
    check_logits(every_family[family])
    check_merged(every_family[family])


@pytest.mark.parametrize("family", DENSE)
def test_lora_request_answers_as_base_and_adapter(every_family: dict[str, Served], family: str) -> None:
    check_adapter(every_family[family])
