"""Adapter folders are classified tensor by tensor; what cannot be merged is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.adapters.files import choose_adapter, read_adapter
from pronghorn.errors import AdapterError, NotSupportedError
from tests import tiny
from tests.stack import experts_are_stacked


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_plain_pairs(base: Path, tmp_path: Path) -> None:
    adapter = read_adapter(tiny.write_adapter(tmp_path / "a", base, r=4, lora_alpha=8))
    assert len(adapter.pairs) == 14 and not adapter.saved and not adapter.tokens and adapter.record is None
    pair = next(pair for pair in adapter.pairs if pair.parameter == "model.layers.1.mlp.down_proj.weight")
    assert (pair.a.shape, pair.b.shape, pair.rank, pair.scaling) == ((4, 96), (64, 4), 4, 2.0)
    used = [entry.name for pair in adapter.pairs for entry in pair.entries]
    assert sorted(used) == sorted(adapter.shard.tensors)


def test_rank_alpha_and_rslora_are_peft_s(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "rank_pattern": {"q_proj": 8, "layers.0.mlp.down_proj": 2, r"model.layers.\d.mlp.up_proj": 3},
        "alpha_pattern": {"q_proj": 3, "k_proj": 11},
        "use_rslora": True,
    }
    folder = tiny.write_adapter(tmp_path / "a", base, **options)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    for pair in read_adapter(folder).pairs:
        layer = model.base_model.model.get_submodule(pair.parameter.removesuffix(".weight"))
        assert (pair.rank, pair.scaling) == (layer.r["default"], layer.scaling["default"])
    assert {pair.rank for pair in read_adapter(folder).pairs} == {2, 3, 4, 8}
    assert any(pair.scaling == 11 / math.sqrt(4) for pair in read_adapter(folder).pairs)


def test_everything_else_that_can_be_merged(base: Path, tmp_path: Path) -> None:
    saved = read_adapter(
        tiny.write_adapter(tmp_path / "a", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert list(saved.saved) == ["lm_head.weight"]
    embedded = read_adapter(tiny.write_adapter(tmp_path / "b", base, target_modules=["embed_tokens"]))
    assert embedded.pairs[0].embedding and embedded.pairs[0].parameter == "model.embed_tokens.weight"
    assert list(embedded.saved) == ["model.embed_tokens.weight"]
    rows = read_adapter(
        tiny.write_adapter(tmp_path / "c", base, target_modules=["q_proj"], trainable_token_indices=[7, 5])
    )
    assert [(one.parameter, one.indices) for one in rows.tokens] == [("model.embed_tokens.weight", (7, 5))]
    dora = read_adapter(tiny.write_adapter(tmp_path / "d", base, target_modules=["q_proj"], use_dora=True))
    assert all(pair.magnitude is not None and pair.magnitude.shape == (64,) for pair in dora.pairs)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_stacked_experts(family: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    pairs = {pair.parameter: pair for pair in read_adapter(tiny.write_adapter(tmp_path / "a", base)).pairs}
    if not experts_are_stacked():
        assert sum("layers.0." in name and ".experts.3." in name for name in pairs) == 3
        assert not any(pair.stacked for pair in pairs.values())
        return
    fused, down = (pairs[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert fused.stacked and down.stacked and not pairs["model.layers.0.mlp.gate.weight"].stacked
    assert (fused.rank, down.rank, fused.scaling, down.scaling) == (8, 4, 2.0, 2.0)
    assert (fused.a.shape[0], down.a.shape[0]) == (32, 16)


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "new_thing"]
)
def test_initialisations_that_change_the_base_are_refused(base: Path, tmp_path: Path, init: str) -> None:
    folder = edit_config(tiny.write_adapter(tmp_path / "a", base), init_lora_weights=init)
    with pytest.raises(NotSupportedError, match=f"init_lora_weights='{init}'"):
        read_adapter(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_other_initialisations_are_not(base: Path, tmp_path: Path, init: Any) -> None:
    assert read_adapter(edit_config(tiny.write_adapter(tmp_path / "a", base), init_lora_weights=init)).pairs


@pytest.mark.parametrize(
    "option", ["use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication"]
)
def test_options_that_no_weight_can_express_are_refused(base: Path, tmp_path: Path, option: str) -> None:
    folder = edit_config(tiny.write_adapter(tmp_path / "a", base), **{option: [1]})
    with pytest.raises(NotSupportedError, match=f"uses {option}"):
        read_adapter(folder)
    with pytest.raises(NotSupportedError, match="IA3"):
        read_adapter(edit_config(folder, peft_type="IA3", **{option: None}))


KEY = "base_model.model.model.layers.0.self_attn.q_proj."


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "B missing": (lambda t: t.pop(KEY + "lora_B.weight"), r"q_proj lacks lora_B\.weight"),
    "A missing": (lambda t: t.pop(KEY + "lora_A.weight"), r"q_proj lacks lora_A\.weight"),
    "adapter name left in": (
        rename(KEY + "lora_A.weight", KEY + "lora_A.default.weight"),
        r"lora_A\.default",
    ),
    "foreign prefix": (rename(KEY + "lora_A.weight", "diffusion.x.lora_A.weight"), r"diffusion\.x\.lora_A"),
    "unknown part": (rename(KEY + "lora_A.weight", KEY + "lora_E"), "lora_E, which is no tensor"),
    "ranks differ": (lambda t: t.update({KEY + "lora_B.weight": torch.ones(64, 3)}), "do not multiply"),
    "rank not the config's": (
        lambda t: t.update(
            {KEY + "lora_A.weight": torch.ones(3, 64), KEY + "lora_B.weight": torch.ones(64, 3)}
        ),
        "the rank 4, its tensors have 3",
    ),
    "convolution": (lambda t: t.update({KEY + "lora_A.weight": torch.ones(4, 64, 1, 1)}), "do not multiply"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_name_the_tensor(base: Path, tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    folder = edit_tensors(tiny.write_adapter(tmp_path / "a", base), change)
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


def test_broken_configs(base: Path, tmp_path: Path) -> None:
    folder = tiny.write_adapter(
        tmp_path / "a", base, target_modules=["q_proj"], trainable_token_indices=[1, 2]
    )
    for indices in ([1], [1, 1], [1, -1], None, {"lm_head": [1, 2]}):
        with pytest.raises(AdapterError, match="does not give a token index"):
            read_adapter(edit_config(folder, trainable_token_indices=indices))
    edit_config(folder, trainable_token_indices=[1, 2])
    with pytest.raises(AdapterError, match="alpha None"):
        read_adapter(edit_config(folder, lora_alpha=None))


def test_an_adapter_of_any_name_is_found_and_several_need_a_choice(base: Path, tmp_path: Path) -> None:
    assert choose_adapter(tiny.write_adapter(tmp_path / "one", base)) == tmp_path / "one"
    tiny.write_adapter(tmp_path / "two", base, adapter_name="poet")
    assert choose_adapter(tmp_path / "two") == tmp_path / "two" / "poet"
    tiny.write_adapter(tmp_path / "two", base)
    with pytest.raises(AdapterError, match="holds 2 adapters: default, poet"):
        choose_adapter(tmp_path / "two")
    assert choose_adapter(tmp_path / "two", "poet").name == "poet"
    assert choose_adapter(tmp_path / "two", "default") == tmp_path / "two"
    with pytest.raises(AdapterError, match="has no adapter 'x', only default, poet"):
        choose_adapter(tmp_path / "two", "x")
    with pytest.raises(AdapterError, match="holds no adapter"):
        choose_adapter(base)


def test_checkpoints_beside_a_final_adapter_are_no_choice(base: Path, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "run", base)
    tiny.write_adapter(tmp_path / "run" / "checkpoint-10", base)
    assert choose_adapter(tmp_path / "run") == tmp_path / "run"
