"""What a layer saves, to the byte, and which products run how often."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.attention.interface import groups_are_fused
from pronghorn.memory.counter import saved_bytes
from pronghorn.patching.accelerate import accelerate
from tests import tiny
from tests.patching.build import batch

WIDTH, INNER, HEADS, KV_WIDTH, RANK = 64, 96, 4, 32, 4


def model(layers: int) -> Any:
    base = tiny.model("llama", dtype=torch.bfloat16, num_hidden_layers=layers)
    made = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    made.enable_input_require_grads()
    return made.train()


def test_saved_bytes_of_a_layer_are_exactly_what_the_documentation_says() -> None:
    tokens, kept = 64, []
    for layers in (1, 2):
        one = model(layers)
        accelerate(one)
        kept.append(saved_bytes(one, lambda m=one: m(**batch(1, tokens), use_cache=False).loss))
    norms = 2 * (2 * WIDTH + 4)
    kv_width = KV_WIDTH if groups_are_fused() else WIDTH
    attention = 2 * (WIDTH + 2 * kv_width) + 2 * WIDTH + 4 * HEADS
    output_adapter, mlp = 2 * RANK, 2 * 2 * INNER
    assert kept[1] - kept[0] == tokens * (norms + attention + output_adapter + mlp)


@pytest.mark.parametrize(("recompute", "forwards", "downs"), [(None, 1, 1), ("full", 2, 1)])
def test_each_base_product_runs_once_and_the_down_product_never_again(
    recompute: str | None, forwards: int, downs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model(2)
    accelerate(one, recompute=recompute)
    base = one.get_base_model().model.layers[0]
    weights = {name: getattr(base.mlp, name).base_layer.weight for name in ("gate_proj", "down_proj")}
    count = dict.fromkeys(weights, 0)
    real = torch.nn.functional.linear

    def counted(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        for name, weight in weights.items():
            count[name] += w is weight
        return real(x, w, b)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    one(**batch(), use_cache=False).loss.backward()
    assert count == {"gate_proj": forwards, "down_proj": downs}
