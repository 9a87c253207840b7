"""What was trained is what vLLM serves: a merged folder, and base + adapter by LoRARequest, on the real engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.external import memorised, vllm_engine

pytestmark = pytest.mark.external

DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
MIXTURES = ("mixtral", "qwen3_moe")  # vLLM's CPU build refuses LoRA on these at warm-up: merged only


def merge(base: Path, adapter: Path, target: Path) -> Path:
    """Placeholder."""
    model = memorised.load(base, adapter).merge_and_unload().to(torch.bfloat16)
    model.save_pretrained(target, max_shard_size="200KB")
    memorised.tiny.tokenizer().save_pretrained(target)
    return target


@dataclass(frozen=True)
class Served:
    """One family's folders and vLLM's answers, each a list with one entry per prompt."""

    base: Path
    adapter: Path
    merged: Path
    from_base: list[dict[str, Any]] | None
    from_adapter: list[dict[str, Any]] | None
    from_merged: list[dict[str, Any]]


def serve(families: tuple[str, ...], folder: Path) -> dict[str, Served]:
    """Train, merge and serve ``families`` in one vLLM process, two engine starts for each dense family."""
    folders: dict[str, tuple[Path, Path, Path]] = {}
    engines = []
    for family in families:
        base, adapter = memorised.write_pair(folder / family, family)
        merged = merge(base, adapter, folder / family / "merged")
        folders[family] = base, adapter, merged
        shared = {"prompts": memorised.PROMPTS, "max_tokens": memorised.ANSWER_TOKENS + 4}
        engines.append({"model": str(merged), **shared})
        if family in DENSE:
            engines.append({"model": str(base), "adapters": [str(adapter)], **shared})
    answers = iter(vllm_engine.run(engines, folder))
    served = {}
    for family in families:
        (from_merged,) = next(answers)
        plain, adapted = next(answers) if family in DENSE else (None, None)
        served[family] = Served(*folders[family], plain, adapted, from_merged)
    return served


def check_merged(served: Served) -> None:
    """vLLM's greedy tokens and prompt log-probabilities on the merged folder are those of base + adapter."""
    trained = memorised.load(served.base, served.adapter)
    assert memorised.narrowest_margin(trained, seed=2) > 2.0, (
        "the answers are too close to a tie to prove anything"
    )
    expected = memorised.greedy(trained)
    assert [answer["tokens"] for answer in served.from_merged] == expected
    assert expected != memorised.greedy(memorised.load(served.base)), "the adapter changes nothing"
    for prompt, answer in zip(memorised.PROMPTS, served.from_merged, strict=True):
        distance = (torch.tensor(answer["prompt_logprobs"]) - prompt_logprobs(trained, prompt)).abs().mean()
        assert distance < 0.1  # bfloat16 arithmetic alone gives 0.01 to 0.03


def check_adapter(served: Served) -> None:
    """vLLM's greedy tokens through LoRARequest are those of base + adapter; without it, those of the base."""
    assert served.from_base is not None
    assert served.from_adapter is not None
    base, trained = memorised.load(served.base), memorised.load(served.base, served.adapter)
    assert memorised.narrowest_margin(base, seed=1) > 2.0, (
        "the answers are too close to a tie to prove anything"
    )
    assert [answer["tokens"] for answer in served.from_base] == memorised.greedy(base)
    assert [answer["tokens"] for answer in served.from_adapter] == memorised.greedy(trained)
    assert served.from_adapter != served.from_base, "the adapter changes nothing"


@torch.no_grad()
def prompt_logprobs(model: Any, prompt: list[int]) -> torch.Tensor:
    """Log-probability of each prompt token after the first, [tokens - 1]."""
    scores = model(input_ids=torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0]


@pytest.mark.smoke
def test_smoke_one_family_through_both_roads(tmp_path: Path) -> None:
    served = serve(("llama",), tmp_path)["llama"]
    check_merged(served)
    check_adapter(served)


@pytest.fixture(scope="module")
def every_family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    return serve(DENSE + MIXTURES, tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize("family", DENSE + MIXTURES)
def test_merged_folder_gives_the_tokens_of_base_and_adapter(
    every_family: dict[str, Served], family: str
) -> None:
    check_merged(every_family[family])


@pytest.mark.parametrize("family", DENSE)
def test_lora_request_gives_the_tokens_of_base_and_adapter(
    every_family: dict[str, Served], family: str
) -> None:
    check_adapter(every_family[family])
