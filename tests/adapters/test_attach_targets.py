"""Target names become full module names, in every family, or an error that lists what is there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import DEFAULT_TARGETS, LoraOptions
from pronghorn.adapters.targets import resolve_targets
from pronghorn.errors import AdapterError, NotSupportedError
from tests import tiny
from tests.stack import experts_are_stacked, require_family

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
_SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# mixture-of-experts models that also have dense or shared MLPs under the same names
MIXED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
    "qwen3_next": {
        "head_dim": 16,
        "num_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
    },
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32},
}


def mixed(name: str) -> Any:
    require_family(name)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**_SMALL, **MIXED[name]}))


def leaves(model: Any, **options: Any) -> set[str]:
    found = resolve_targets(model, LoraOptions(**options))
    return {name.rpartition(".")[2] for name in [*found.modules, *found.parameters]}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_dense_families_take_the_default_names(family: str) -> None:
    model = tiny.model(family)
    found = resolve_targets(model, LoraOptions(targets=DEFAULT_TARGETS))
    assert len(found.modules) == 14 and not found.parameters
    assert set(found.modules) == set(resolve_targets(model, LoraOptions()).modules)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in found.modules)


def test_fused_products_stand_for_their_parts() -> None:
    model = tiny.model("phi3")
    assert leaves(model, targets=DEFAULT_TARGETS) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with pytest.raises(
        AdapterError, match=r"holds q_proj, k_proj, v_proj as one weight \(qkv_proj\)"
    ) as caught:
        leaves(model, targets=["q_proj", "v_proj"])
    assert "add k_proj" in caught.value.fix


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts(family: str) -> None:
    model = tiny.model(family)
    if not experts_are_stacked():
        parts = {"mixtral": {"w1", "w2", "w3"}, "qwen3_moe": {"gate_proj", "up_proj", "down_proj"}}
        assert parts[family] <= leaves(model) and len(resolve_targets(model, LoraOptions()).modules) >= 32
        return
    assert leaves(model, targets=DEFAULT_TARGETS) == leaves(model)
    assert {"gate_up_proj", "down_proj", "q_proj"} <= leaves(model)
    with pytest.raises(AdapterError, match="gate_up_proj of the stacked experts"):
        leaves(model, targets=["gate_proj", "q_proj"])
    with pytest.raises(NotSupportedError, match="lora_dropout cannot be used with an adapter on"):
        attach_lora(model, LoraOptions(dropout=0.1), say=None)
    assert leaves(tiny.model("mixtral"), targets=["w2"]) == {"down_proj"}


@pytest.mark.parametrize("name", MIXED)
def test_dense_and_shared_mlps_of_mixed_models_get_their_adapter(name: str, tmp_path: Path) -> None:
    base = mixed(name)
    base.save_pretrained(tmp_path / "base")
    head = base.get_output_embeddings()
    wanted = [module for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
    weights = {id(module.weight) for module in wanted}
    model = attach_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraOptions(r=4), say=None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(3, 99)[None]  # enough tokens that each expert has some
    model.train()(ids, labels=ids).loss.backward()
    silent = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert silent == []
    adapted = {
        key.partition(".lora_A")[0].replace(".base_layer", "")
        for key in model.state_dict()
        if ".lora_A." in key and not (experts_are_stacked() and ".experts" in key)
    }
    assert len(adapted) == len(weights)

    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = model.eval()(IDS).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            stock = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
            )
        assert torch.equal(want, stock.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("targets", "said", "fix"),
    [
        (["q_porj"], "names 'q_porj'", "did you mean q_proj"),
        (["self_attn"], "only a LlamaAttention, which cannot carry an adapter", "all-linear"),
        (["q_proj", "fc1"], "names 'fc1'", "down_proj, embed_tokens, gate_proj"),
        ("q_proj", "matches no full module name", 'target_modules=["q_proj"]'),
        (".*(", "is not a regular expression", ""),
        (".*nothing", "matches no full module name", "model.embed_tokens"),
    ],
)
def test_names_that_match_nothing(targets: Any, said: str, fix: str) -> None:
    with pytest.raises(AdapterError, match="target_modules") as caught:
        leaves(tiny.model("llama"), targets=targets)
    assert said in caught.value.message and fix in caught.value.fix


def test_regular_expressions_and_full_names() -> None:
    model = tiny.model("llama")
    found = resolve_targets(model, LoraOptions(targets=r".*layers\.1\..*(q|v)_proj"))
    assert found.modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    one = resolve_targets(model, LoraOptions(targets=["layers.0.self_attn.q_proj"]))
    assert one.modules == ("model.layers.0.self_attn.q_proj",)


def test_layers() -> None:
    model = tiny.model("llama", num_hidden_layers=4)

    def used(**options: Any) -> set[str]:
        found = resolve_targets(model, LoraOptions(targets=["q_proj", "lm_head"], **options)).modules
        return {name.split(".")[2] if "layers" in name else name for name in found}

    assert used(layers=[1, 3]) == {"1", "3", "lm_head"}
    assert used(layers=2, layers_pattern="layers") == {"2", "lm_head"}
    assert used(last_layers=2) == {"2", "3", "lm_head"}
    for wrong in ({"layers": [4]}, {"layers": [-1]}, {"layers": []}, {"last_layers": 5}):
        with pytest.raises(AdapterError, match="layers"):
            used(**wrong)


def test_the_router_and_the_head_are_left_alone_by_all_linear() -> None:
    config = AutoConfig.for_model("phimoe", **{**_SMALL, "num_local_experts": 4})
    model = AutoModelForCausalLM.from_config(config)
    wrapped = attach_lora(model, LoraOptions(r=4), say=None)
    assert not any(
        "router" in name or "lm_head" in name for name, p in wrapped.named_parameters() if p.requires_grad
    )
    wrapped.train()(IDS, labels=IDS).loss.backward()


def test_target_parameters() -> None:
    model = tiny.model("llama")
    found = resolve_targets(model, LoraOptions(targets=(), target_parameters=["0.mlp.up_proj.weight"]))
    assert found.parameters == ("model.layers.0.mlp.up_proj.weight",)
    with pytest.raises(AdapterError, match=r"target_parameters names 'mlp\.upp'"):
        resolve_targets(model, LoraOptions(targets=(), target_parameters=["mlp.upp"]))


def test_modules_to_save_win_over_targets_and_must_exist() -> None:
    model = tiny.model("llama")
    found = resolve_targets(model, LoraOptions(targets=["q_proj", "lm_head"], modules_to_save=["lm_head"]))
    assert {name.rpartition(".")[2] for name in found.modules} == {"q_proj"}
    with pytest.raises(AdapterError, match="modules_to_save names 'lm_haed'"):
        resolve_targets(model, LoraOptions(modules_to_save=["lm_haed"]))


def test_what_peft_refuses_is_an_error_of_ours() -> None:
    model = tiny.model("llama")
    model.config.model_type = "falcon_h1"  # PEFT refuses out_proj and conv1d of Mamba-based models
    model.model.layers[0].self_attn.out_proj = nn.Linear(64, 64)
    with pytest.raises(AdapterError, match=r"PEFT refuses this adapter on LlamaForCausalLM: .*out_proj"):
        attach_lora(model, LoraOptions(), say=None)
