"""Settings that llama.cpp would compute differently are refused by name; positions are transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.export.gguf_models import ARCHITECTURES, ModelPlan, architecture_of, plan_model, settings_of
from pronghorn.export.gguf_rope import rope_of
from pronghorn.weights.folder import open_weights
from tests import tiny


def plan(folder: Path) -> ModelPlan:
    config = json.loads((folder / "config.json").read_text())
    return plan_model(open_weights(folder), config, settings_of(folder))


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama.cpp's llama"),
        ("gemma2", {"query_pre_attn_scalar": 8}, "is 8; llama.cpp's gemma2 scales by 16"),
        ("gemma2", {"final_logit_softcapping": None}, "unlike llama.cpp's gemma2"),
        ("gemma2", {"tie_word_embeddings": False}, "which llama.cpp's gemma2 cannot hold"),
        ("qwen3", {"attention_bias": True}, r"2 tensors have no place in .*o_proj\.bias"),
        ("qwen2", {"num_attention_heads": 4, "head_dim": 32}, "4 heads of 32 are not hidden_size 64"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope scaling 'dynamic' is not computed",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                                 "rope_theta": 1e4}},
            "llama.cpp's qwen2 has no llama3 rope scaling",
        ),
    ],
)  # fmt: skip
def test_settings_of_another_computation(
    family: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base", family, **settings)
    with pytest.raises(NotSupportedError, match=said):
        plan(base)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, "GGUF of 'gpt2' is not proven here; it is for llama, mistral"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "multimodal, its text model is",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "only causal language",
        ),
    ],
)
def test_other_models(config: dict[str, Any], said: str) -> None:
    with pytest.raises(NotSupportedError, match=said):
        architecture_of(config)


def test_a_window_that_llama_cpp_lacks_limits_the_context(tmp_path: Path) -> None:
    found = plan(tiny.write_base(tmp_path / "one", "mistral", sliding_window=100))
    assert found.metadata["llama.context_length"] == 100
    assert any("the context is limited to 100 tokens (model: 256)" in told for told in found.warnings)
    whole = plan(tiny.write_base(tmp_path / "two", "mistral", sliding_window=None))
    assert whole.metadata["llama.context_length"] == 256
    assert whole.warnings == ()


def test_layers_that_follow_the_rule_need_no_list(tmp_path: Path) -> None:
    sixth = ["sliding_attention"] * 5 + ["full_attention"]
    found = plan(tiny.write_base(tmp_path / "base", "gemma3", num_hidden_layers=6, layer_types=sixth))
    assert "gemma3.attention.sliding_window_pattern" not in found.metadata
    assert found.warnings == ()


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 10000.0}  # fmt: skip


def test_llama3_factors_are_transformers_own(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama", rope_parameters=LLAMA3)
    factors = plan(base).computed["rope_freqs.weight"]
    frequencies = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(factors), frequencies.float(), rtol=1e-6)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_both_forms_of_rope_settings_say_the_same(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama", rope_parameters=LLAMA3)
    config, settings = json.loads((base / "config.json").read_text()), settings_of(base)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    assert rope_of("llama", older, settings) == rope_of("llama", config, settings)
    gemma = tiny.write_base(tmp_path / "gemma", "gemma3")
    config, settings = json.loads((gemma / "config.json").read_text()), settings_of(gemma)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    older |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert rope_of("gemma3", older, settings) == rope_of("gemma3", config, settings)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attention_factor": 2.0}, "yarn with attention_factor of its own"),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, "yarn with mscale of its own"),
        ({"truncate": False}, "yarn with truncate false"),
    ],
)
def test_yarn_of_another_kind(more: dict[str, Any], said: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    settings = {"max_position_embeddings": 256}
    found = rope_of("qwen2", {"rope_parameters": yarn}, settings)
    assert found.metadata["rope.scaling.original_context_length"] == 64
    usual = {**yarn, "attention_factor": 0.1 * math.log(4) + 1}
    assert rope_of("qwen2", {"rope_parameters": usual}, settings) == found
    with pytest.raises(NotSupportedError, match=said):
        rope_of("qwen2", {"rope_parameters": {**yarn, **more}}, settings)


def test_long_factors_tell_how_to_start(tmp_path: Path) -> None:
    long = {"rope_type": "longrope", "original_max_position_embeddings": 128, "rope_theta": 10000.0,
            "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}  # fmt: skip
    base = tiny.write_base(
        tmp_path / "base", "phi3", rope_parameters=long, original_max_position_embeddings=128
    )
    found = plan(base)
    assert found.computed["rope_factors_long.weight"] == [2.0] * 8
    assert found.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(math.sqrt(1 + 1 / 7))
    assert any("start it with -c 128" in told for told in found.warnings)


def test_what_is_missing_or_of_another_type_is_named(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", shard="1GB")
    weights = load_file(base / "model.safetensors")
    missing = {name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}
    save_file(missing, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotSupportedError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        plan(base)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(
        {**weights, name: weights[name].to(torch.int8)}, base / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(NotSupportedError, match=r"up_proj\.weight is I8"):
        plan(base)
    headless = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    save_file(headless, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotSupportedError, match="has no lm_head and is not tied"):
        plan(base)
    (base / "config.json").write_text('{"model_type": "unheard"}')
    with pytest.raises(SourceError, match="transformers cannot read"):
        settings_of(base)


def test_the_families_are_those_that_are_proven() -> None:
    assert set(ARCHITECTURES) == {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}
