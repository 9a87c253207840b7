"""The self-test before a packed run: it accepts models whose rows stay apart, and refuses all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pronghorn.errors import NotSupportedError
from pronghorn.training.isolation import MOST_BOUND, Isolation, measure_isolation, require_isolation
from tests import tiny
from tests.stack import require_family

LEAKING: dict[str, dict[str, Any]] = {
    "gpt_oss": {  # its mask is made without the positions
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 32,
    },
    "qwen3_next": {  # the state of a linear attention layer runs on into the next row
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}


def leaking(model_type: str, dtype: torch.dtype, *, trained: bool = True) -> Any:
    """A tiny model of a family that leaks; without ``trained`` its weights are as small as initialised."""
    require_family(model_type)
    torch.manual_seed(0)
    common = {**tiny.config("llama").to_dict(), **LEAKING[model_type]}
    kept = {name: common[name] for name in [*LEAKING[model_type], *tiny._COMMON]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **kept))
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_families_whose_rows_stay_apart_are_accepted(family: str, dtype: torch.dtype) -> None:
    found = require_isolation(tiny.model(family, dtype=dtype))
    assert 0 < found.difference < 1e-5 < found.bound < found.largest


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_are_accepted(attention: str) -> None:
    model = tiny.model("gemma3")
    model.set_attn_implementation(attention)
    assert require_isolation(model).difference < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(LEAKING))
def test_families_that_leak_are_refused_with_the_figures(family: str, dtype: torch.dtype) -> None:
    model = leaking(family, dtype)
    found = measure_isolation(model)
    assert found.difference > 1000 * found.bound
    with pytest.raises(NotSupportedError) as caught:
        require_isolation(model)
    text = str(caught.value)
    assert type(model).__name__ in text and f"{found.difference:.1e} (bound {found.bound:.1e})" in text
    assert "fix: set data.packing=false" in text


def test_the_smallest_leak_known_is_seen() -> None:
    """An untrained lfm2 mixes hardly anything: 2e-4 of its largest logit."""
    assert not measure_isolation(leaking("lfm2", torch.float32, trained=False)).holds


def test_a_model_without_positions_is_refused_with_its_own_error() -> None:
    model = tiny.model("llama")
    inner = model.forward

    def forward(input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:
        return inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model.forward = forward
    with pytest.raises(
        NotSupportedError, match=r"LlamaForCausalLM cannot compute packed rows: .*position_ids"
    ):
        require_isolation(model)


def test_numbers_that_are_no_numbers_are_refused() -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("nan")
    assert not measure_isolation(model).holds
    with pytest.raises(NotSupportedError, match="differ by nan"):
        require_isolation(model)


def test_rounding_in_16_bits_raises_the_bound_but_not_beyond_a_leak() -> None:
    assert Isolation(difference=0.03, control=0.01, largest=1.0).holds  # 4 x what mere rounding does
    assert not Isolation(difference=0.03, control=0.001, largest=1.0).holds
    assert Isolation(difference=0.0, control=9.0, largest=1.0).bound == MOST_BOUND


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.model("llama", dtype=torch.bfloat16).train()
    model.model.layers[0].eval()
    state = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    require_isolation(model)
    assert {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()} == state
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
