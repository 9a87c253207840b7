"""Preference rows through TRL's DPOTrainer, one step cut in every way; a part of benchmarks/parity.py.

The truth is what each loss says of all pairs of the step at once, in float64, on the ids that the inspector
shows. The reference is the model without its adapter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from benchmarks.one_step import (
    Found,
    Recorder,
    arguments_for_a_step,
    evaluated_and_stepped,
    gradient_of,
    line,
)
from pronghorn import rows_for_trl
from pronghorn.data.options import DataOptions
from pronghorn.data.preference_rows import examine_preferences
from pronghorn.data.rows import from_rows
from tests import tiny

LIMIT = 64
BETA = 0.1
LOSSES = (("sigmoid",), ("ipo",), ("sigmoid", "sft"))
# name, passes in a step, pairs in a pass, pairs
CUTS = (
    ("8x1", 8, 1, 8),
    ("4x2", 4, 2, 8),
    ("1x8", 1, 8, 8),
    ("partial step 3x1 of 8x1", 8, 1, 3),
    ("partial step 2+1 of 4x2", 4, 2, 3),
)


def pairs(count: int) -> list[dict[str, str]]:
    """Preference rows of uneven length."""
    chosen = random.Random(count)
    words = [f" {word}" for word in ("class", "return", "import", "torch", "self", "value", "error", "none")]

    def text(most: int) -> str:
        return "".join(chosen.choices(words, k=chosen.randint(1, most)))

    return [
        {"prompt": f"{n}:{text(8)}", "chosen": text(9), "rejected": f"{text(9)} no"} for n in range(count)
    ]


def all_at_once(
    base: Path, adapter: Path, rows: Sequence[dict[str, str]], losses: Sequence[str], dtype: torch.dtype
) -> Found:
    """The loss of all pairs in one piece, each answer in a forward pass of its own."""
    options = DataOptions(train="rows", isolate=False)
    examined = examine_preferences("preference", [from_rows(rows)], [], options, tiny.tokenizer(), LIMIT)
    encoded = [examined.encoded(index) for index in range(len(rows))]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).to(dtype)

    def log_probabilities() -> torch.Tensor:
        return torch.stack(
            [torch.stack([_log_probability(model, row.prompt, a) for a in row.answers]) for row in encoded]
        )

    with torch.no_grad(), model.disable_adapter():
        reference = log_probabilities()
    policy = log_probabilities()
    lengths = torch.tensor([[len(answer) for answer in row.answers] for row in encoded], dtype=dtype)
    loss = sum(_loss(name, policy, reference, lengths) for name in losses)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    return Found(loss.item(), gradient_of(model), loss.item())


def _log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum()


def _loss(name: str, policy: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What a loss says of all pairs of a step.

    Args:
        name: as TRL calls it.
        policy: [pairs, 2], log probabilities of chosen and rejected answers.
        reference: the same without the adapter.
        lengths: [pairs, 2], tokens of the answers.
    """
    ratios = policy - reference
    if name == "ipo":
        ratios = ratios / lengths
        return ((ratios[:, 0] - ratios[:, 1] - 1 / (2 * BETA)) ** 2).mean()
    if name == "sft":
        return -policy[:, 0].sum() / lengths[:, 0].sum()
    return -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def through_trl(
    base: Path, adapter: Path, rows: Sequence[dict[str, str]], losses: Sequence[str], passes: int, batch: int
) -> Found:
    """One step of DPOTrainer on the rows, as ``rows_for_trl`` gives them."""
    tokenizer, recorder = tiny.tokenizer(), Recorder()
    data = rows_for_trl(rows, tokenizer, max_length=LIMIT, isolate=False).train
    options = trl.DPOConfig(
        **arguments_for_a_step(adapter.parent / "dpo", passes, batch),
        max_length=LIMIT,
        loss_type=list(losses),
        beta=BETA,
        gradient_checkpointing=False,
    )
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=options,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig.from_pretrained(adapter),
        callbacks=[recorder],
    )
    set_peft_model_state_dict(trainer.model, load_file(adapter / "adapter_model.safetensors"))
    return evaluated_and_stepped(trainer, recorder)


def lines(folder: Path) -> Iterator[str]:
    """The lines of the table."""
    base = tiny.write_base(folder / "base", "llama", dtype=torch.float32)
    adapter = tiny.write_adapter(folder / "adapter", base)
    for losses in LOSSES:
        for count in sorted({cut[3] for cut in CUTS}):
            rows = pairs(count)
            truth = all_at_once(base, adapter, rows, losses, torch.float64)
            single = all_at_once(base, adapter, rows, losses, torch.float32)
            yield line(f"{' + '.join(losses)}, {count} pairs", "pair by pair, float32", single, truth)
            for name, passes, batch, _ in (cut for cut in CUTS if cut[3] == count):
                found = through_trl(base, adapter, rows, losses, passes, batch)
                yield line(name, "TRL DPOTrainer", found, truth)
