"""Tiny models whose greedy answers are far from any tie: "the same tokens" means something in bfloat16.

A random model's two best logits often lie within bfloat16 rounding. Here the base is trained until it has
memorised one answer to each prompt, and the adapter until it has memorised another: every greedy step has a
wide margin, and a missing or wrongly merged adapter gives other tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from tests import tiny

EOS_ID = 3
BASE, TRAINED = 1, 2  # seeds of the answers that the base and the adapter have memorised
PROMPTS = ([1, 40, 41, 42, 43], [1, 90, 91, 92], [1, 150, 151, 152, 153, 154])
ANSWER_TOKENS = 12  # including the end token
MAX_TOKENS = ANSWER_TOKENS + 4  # room to show a model that does not stop

# vLLM's CPU attention serves head sizes of 32, 64, 80, ... and not the 16 of tests/tiny.py
_WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}
_HEAD: dict[str, Any] = {"head_dim": 32}
_GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32}
OVERRIDES: dict[str, dict[str, Any]] = {
    "llama": _WIDE,
    "mistral": {**_WIDE, **_HEAD},
    "qwen2": _WIDE,
    "qwen3": {**_WIDE, **_HEAD},
    "gemma2": {**_WIDE, **_GEMMA},
    "gemma3": {**_WIDE, **_GEMMA},
    "phi3": _WIDE,
    # all four experts: with fewer, bfloat16 rounding in the router changes which experts are chosen
    "mixtral": {**_WIDE, **_HEAD, "num_experts_per_tok": 4},
    "qwen3_moe": {**_WIDE, **_HEAD, "num_experts_per_tok": 4},
}


def answers(seed: int) -> list[list[int]]:
    """One random answer per prompt, each ending with the end token."""
    generator = torch.Generator().manual_seed(seed)
    count = ANSWER_TOKENS - 1
    return [[*torch.randint(10, 500, (count,), generator=generator).tolist(), EOS_ID] for _ in PROMPTS]


def memorise(model: Any, seed: int, *, steps: int, rate: float) -> None:
    """Train what is trainable in ``model`` until it answers the prompts with ``answers(seed)``."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers(seed), strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor(
        [
            [-100] * len(prompt) + answer + [-100] * (longest - len(prompt) - len(answer))
            for prompt, answer in zip(PROMPTS, answers(seed), strict=True)
        ]
    )
    model.train()
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def write_pair(folder: Path, family: str, **lora: Any) -> tuple[Path, Path]:
    """Write ``folder/base`` (bfloat16) and ``folder/adapter`` (saved by PEFT alone); returns both paths.

    ``lora`` are further options of the adapter's LoraConfig.
    """
    base, adapter = folder / "base", folder / "adapter"
    model = tiny.model(family, **OVERRIDES[family])
    memorise(model, BASE, steps=60, rate=3e-3)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=EOS_ID, max_new_tokens=ANSWER_TOKENS, do_sample=False
    )
    model.save_pretrained(base, max_shard_size="200KB")
    tiny.tokenizer().save_pretrained(base)

    torch.manual_seed(2)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    wrapped = get_peft_model(loaded, LoraConfig(**options))
    memorise(wrapped, TRAINED, steps=80, rate=1e-2)
    wrapped.save_pretrained(adapter)
    return base, adapter


def load(base: Path, adapter: Path | None = None) -> Any:
    """A float32 model from stored files, with the adapter applied by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@torch.no_grad()
def logits(model: Any, seed: int = TRAINED) -> torch.Tensor:
    """Logits over prompt + answer(seed) of every prompt, [rows * tokens, vocabulary]."""
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, answers(seed), strict=True)]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


@torch.no_grad()
def greedy(model: Any) -> list[list[int]]:
    """What transformers generates for each prompt, the end token included."""
    generated = []
    for prompt in PROMPTS:
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=EOS_ID,
        )
        generated.append(out[0, len(prompt) :].tolist())
    return generated


@torch.no_grad()
def narrowest_margin(model: Any, seed: int) -> float:
    """The smallest distance between the best and the second logit along the memorised answers."""
    gaps = []
    for prompt, answer in zip(PROMPTS, answers(seed), strict=True):
        row = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best, second = row.topk(2).values.unbind(-1)
        gaps.append(float((best - second).min()))
    return min(gaps)
