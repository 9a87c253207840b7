"""The portable adapter computes what the adapter computed; what cannot be served is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pronghorn.adapters.portable import ALLOWED_RANKS, blockers, max_lora_rank
from pronghorn.errors import AdapterError, ExportError, NotSupportedError
from pronghorn.export.class_modules import class_modules, serving_name
from pronghorn.export.run import export
from pronghorn.serving.vllm import plan_serving
from tests import tiny
from tests.multimodal import write_base
from tests.stack import experts_are_stacked

IDS = torch.tensor([[5, 60, 7, 8, 90, 10, 200]])
PATTERNS: dict[str, Any] = {
    "rslora": {"use_rslora": True},
    "alpha": {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 20}},
    "rank": {"rank_pattern": {"k_proj": 2, "layers.0.self_attn.o_proj": 11}},
    "all": {"r": 6, "lora_alpha": 5, "use_rslora": True, "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"down_proj": 9}, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


@torch.no_grad()
def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, adapter).eval()
    return wrapped(input_ids=IDS).logits


@pytest.mark.parametrize("kind", PATTERNS)
def test_peft_computes_the_same_from_the_plain_form(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base, **PATTERNS[kind])
    report = export(adapter, tmp_path / "portable", format="adapter", verify=False)
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    stored = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    ranks = {t.shape[0] if "_A" in n else t.shape[1] for n, t in stored.items()}
    assert ranks == {config["r"]}
    before, after = logits(base, adapter), logits(base, tmp_path / "portable")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=IDS).logits
    assert (before - plain).abs().max() > 0.1
    assert (before - after).abs().max() < 1e-5
    assert "folded into B" in report.changes[0]
    again = export(tmp_path / "portable", tmp_path / "twice", format="adapter", base=base, verify=False)
    assert again.bytes_written == report.bytes_written
    twice = load_file(tmp_path / "twice" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, twice[name]) for name, tensor in stored.items())


def test_the_result_is_verified_against_the_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base, use_rslora=True)
    report = export(adapter, tmp_path / "portable", format="adapter")
    assert report.verified
    assert "logits equal base + adapter" in {row.name for row in report.checks}
    from pronghorn.export import portable

    real = portable.write_all

    def forgetful(descriptor: int, data: Any, at: int) -> int:
        return real(descriptor, bytes(len(data)), at) if at > 20_000 else real(descriptor, data, at)

    monkeypatch.setattr(portable, "write_all", forgetful)
    with pytest.raises(ExportError, match="would break a promise"):
        export(adapter, tmp_path / "broken", format="adapter")
    assert not (tmp_path / "broken").exists()


def test_a_half_precision_adapter_keeps_the_product_exact(base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base, r=4, lora_alpha=6)
    file = adapter / "adapter_model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    export(adapter, tmp_path / "portable", format="adapter", verify=False)
    found = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    for name, tensor in halves.items():
        assert found[name].dtype is (torch.float32 if "lora_B" in name else torch.bfloat16)
        assert torch.equal(found[name].float(), tensor.float() * (1.5 if "lora_B" in name else 1.0))


BLOCKED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA: vLLM refuses DoRA"),
    "bias": ({"bias": "all", "target_modules": ["q_proj"]}, "bias: vLLM refuses trained biases"),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, "vLLM refuses LoRA's own bias"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save: vLLM refuses modules trained in full"),
    "tokens": ({"trainable_token_indices": [3, 9]}, "trainable_token_indices: vLLM refuses"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': it changed the base"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BLOCKED)
def test_what_cannot_be_served_is_named_with_the_remedy(tmp_path: Path, kind: str) -> None:
    options, said = BLOCKED[kind]
    family = "qwen2" if kind == "bias" else "llama"
    base = tiny.write_base(tmp_path / "base", family)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, **options)
    if kind == "pissa":  # PEFT converts on saving only when asked; the config keeps the name
        assert json.loads((adapter / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    for act in (lambda: export(adapter, tmp_path / "out", format="adapter"), lambda: plan_serving(adapter)):
        with pytest.raises(NotSupportedError) as caught:
            act()
        assert said in caught.value.message
        assert "merge" in caught.value.fix or "convert it with PEFT" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_every_blocker_is_named_at_once(base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(
        tmp_path / "adapter", base, use_dora=True, modules_to_save=["lm_head"], r=600
    )
    assert [one.what for one in blockers(adapter)] == ["DoRA", "modules_to_save", "rank 600"]


def test_experts_are_refused(tmp_path: Path) -> None:
    if not experts_are_stacked():
        pytest.skip("experts are modules here: their adapters are those of linears")
    base = tiny.write_base(tmp_path / "base", "qwen3_moe")
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = tiny.write_adapter(
        tmp_path / "adapter", base, target_parameters=named, target_modules=["q_proj"]
    )
    assert [one.what for one in blockers(adapter)] == ["target_parameters"]


def test_changed_embeddings_are_refused_and_equal_copies_left_out(base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["embed_tokens", "q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    stored = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
    assert stored
    report = export(adapter, tmp_path / "portable", format="adapter", verify=False)
    assert report.left_out == ("model.embed_tokens.weight (equal to the base's)",)
    tensors[stored[0]][7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NotSupportedError, match="changed embeddings"):
        export(adapter, tmp_path / "other", format="adapter", verify=False)


def test_a_module_the_class_lacks_or_of_other_widths_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    moved = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(moved, file)
    with pytest.raises(AdapterError, match=r"layers\.7\..*ignore it and answer as the base"):
        export(adapter, tmp_path / "out", format="adapter", base=base)
    narrow = {n: t[:, :32].contiguous() if "q_proj.lora_A" in n else t for n, t in tensors.items()}
    save_file(narrow, file)
    with pytest.raises(AdapterError, match="q_proj"):
        export(adapter, tmp_path / "out", format="adapter", base=base)


def test_ranks() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 12, 16, 17, 512)] == [1, 8, 16, 16, 32, 512]
    assert max_lora_rank(ALLOWED_RANKS[-1] + 1) is None


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 with an image tower."""
    text = {key: value for key, value in tiny.config("gemma3").to_dict().items() if key != "architectures"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    built = AutoModelForImageTextToText.from_config(config)
    return write_base(tmp_path_factory.mktemp("gemma") / "base", "gemma3", "since 4.52", built=built)


def test_a_text_adapter_gets_the_names_of_the_multimodal_class(multimodal: Path, tmp_path: Path) -> None:
    text = tiny.write_base(tmp_path / "text", "gemma3")
    adapter = tiny.write_adapter(tmp_path / "adapter", text, target_modules=["q_proj", "down_proj"])
    with pytest.raises(AdapterError, match="answer as the base") as caught:
        plan_serving(adapter, base=multimodal)
    assert "--format adapter" in caught.value.fix
    report = export(adapter, tmp_path / "portable", format="adapter", base=multimodal, verify=False)
    assert any("renamed" in line for line in report.changes)
    stored = load_file(tmp_path / "portable" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in stored)
    plan = plan_serving(tmp_path / "portable", base=multimodal)
    assert plan.arguments["max_lora_rank"] == 8
    model = AutoModelForImageTextToText.from_pretrained(multimodal, dtype=torch.float32)
    plain = model(input_ids=IDS).logits
    wrapped = PeftModel.from_pretrained(model, tmp_path / "portable").eval()
    assert (wrapped(input_ids=IDS).logits - plain).abs().max() > 0.01


def test_a_multimodal_adapter_gets_the_names_of_the_text_class(base: Path) -> None:
    known = class_modules(base)
    for prefix in ("model.language_model.", "language_model.model.", "model."):
        assert serving_name(f"{prefix}layers.0.mlp.up_proj", known) == "model.layers.0.mlp.up_proj"
    assert serving_name("model.layers.9.mlp.up_proj", known) is None


def test_an_adapter_in_the_image_tower_is_refused(multimodal: Path, tmp_path: Path) -> None:
    shutil.copytree(multimodal, tmp_path / "base")
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_{}.weight"
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file({name.format("A"): torch.ones(4, 32), name.format("B"): torch.ones(32, 4)},
              folder / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(multimodal)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert [one.what for one in blockers(folder)] == ["LoRA in an image or sound tower"]
