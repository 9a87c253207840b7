"""The names notebooks use: each keyword has its effect or is refused, from loading to the merged folder."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pronghorn.adapters.attach import attach_lora
from pronghorn.errors import AdapterError, ConfigError, ExportError, NotSupportedError
from pronghorn.export.formats import format_of_method
from pronghorn.fast.model import FastLanguageModel
from pronghorn.loading.load import load
from tests import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def recomputes(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_the_usual_notebook(base: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(base), max_seq_length=128, dtype=None, load_in_4bit=False
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=True,
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
    assert tokenizer.model_max_length == 128 and recomputes(model)
    FastLanguageModel.for_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    FastLanguageModel.for_inference(model)
    assert not model.training and not recomputes(model) and model.config.use_cache
    assert model.generate(IDS, max_new_tokens=4).shape == (1, 10)
    model.save_pretrained(tmp_path / "lora")
    tokenizer.save_pretrained(tmp_path / "lora")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))
    assert sum(p.requires_grad for p in again.parameters()) == 28


def test_merged_folder_is_the_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(base)
    model = FastLanguageModel.get_peft_model(model)
    shake(model)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    said = capsys.readouterr().out
    assert f"written to {tmp_path / 'merged'}: 14 tensors merged" in said and "verified (" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    truth = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = logits(truth)
    exact = logits(FastLanguageModel.from_pretrained(_saved(model, tmp_path), dtype="fp32")[0])
    assert (logits(merged) - exact).abs().max() < 0.05 * (exact - plain).abs().max()
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    with pytest.raises(ExportError, match="exists and is not empty"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, save_method="merged_16bit", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


def test_a_quantised_folder_from_a_notebook(base: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(base)
    model = FastLanguageModel.get_peft_model(model, r=4)
    shake(model)
    report = model.save_pretrained_merged(tmp_path / "four", tokenizer, save_method="w4a16")
    assert (report.format, report.verified) == ("w4a16", True)
    assert json.loads((tmp_path / "four" / "config.json").read_text())["quantization_config"]


def test_save_lora_writes_the_portable_form(base: Path, tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(base)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_alpha=6, use_rslora=True)
    shake(model)
    report = model.save_lora(tmp_path / "portable", tokenizer)
    assert (report.format, report.verified) == ("adapter", True)
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    again = FastLanguageModel.from_pretrained(tmp_path / "portable", dtype="fp32")[0]
    exact = FastLanguageModel.from_pretrained(_saved(model, tmp_path), dtype="fp32")[0]
    assert (logits(again) - logits(exact)).abs().max() < 1e-4


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained_merged(folder / "adapter", save_method="lora")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    return folder / "adapter"


def test_names_of_others_are_taken_where_they_mean_the_same(base: Path, tmp_path: Path) -> None:
    same = {"fp8_dynamic": "fp8", "w8a8_int8": "w8a8", "int4": "w4a16", "nvfp4a16": "nvfp4", "w4a16": "w4a16"}
    assert {name: format_of_method(name) for name in same} == same
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    with pytest.raises(ConfigError, match="activations to 4 bit as well") as caught:
        model.save_pretrained_merged(tmp_path / "other", save_method="nvfp4")
    assert "nvfp4a16" in caught.value.fix
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", ["merged_8bit", "16bit", "", "Lora"])
def test_unknown_save_methods_list_the_valid_ones(base: Path, method: str, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    with pytest.raises(ConfigError, match="save_method is") as caught:
        model.save_pretrained_merged(tmp_path / "merged", save_method=method)
    listed = "merged_16bit, merged_4bit, merged_4bit_forced, w4a16, w8a8, fp8, nvfp4a16, adapter, lora"
    assert listed in caught.value.fix
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"push_to_hub": True}, NotSupportedError, "nothing is uploaded"),
        ({"max_shard_size": "1GB"}, NotSupportedError, "shard layout is kept"),
        ({"overwrte": True}, ConfigError, "did you mean overwrite"),
    ],
)
def test_save_merged_keywords(
    base: Path, arguments: dict[str, Any], kind: Any, said: str, tmp_path: Path
) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    with pytest.raises(kind, match=said):
        model.save_pretrained_merged(tmp_path / "merged", **arguments)


@pytest.mark.parametrize("name", ["push_to_hub_gguf", "save_pretrained_torchao", "fast_generate_batches"])
def test_methods_that_do_not_exist_yet(base: Path, name: str) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    with pytest.raises(NotSupportedError, match=f"{name} is not available"):
        getattr(model, name)("somewhere", object())


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"create_pr": True}, NotSupportedError, "one commit to the main branch"),
        ({"privat": True}, ConfigError, "no keyword 'privat'"),
        ({"save_method": "16bit"}, ConfigError, "save_method is '16bit'"),
    ],
)
def test_push_keywords(base: Path, arguments: dict[str, Any], kind: Any, said: str) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    with pytest.raises(kind, match=said):
        model.push_to_hub_merged("owner/model", **arguments)


def test_merging_without_an_adapter_or_files(base: Path, tmp_path: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(base)
    with pytest.raises(AdapterError, match="no adapter"):
        model.save_pretrained_merged(tmp_path / "merged")
    loose = FastLanguageModel.get_peft_model(tiny.model("llama"))
    with pytest.raises(AdapterError, match="not loaded by pronghorn"):
        loose.save_pretrained_merged(tmp_path / "merged")


def test_a_base_changed_in_memory_is_not_silently_dropped(base: Path, tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    model.get_base_model().model.norm.weight.data.mul_(1.5)
    with pytest.raises(AdapterError, match=r"1 weights of the base .*first: model\.norm\.weight"):
        model.save_pretrained_merged(tmp_path / "merged")
    shake(model)
    other = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    shake(other)
    other.merge_adapter()
    with pytest.raises(AdapterError, match="14 weights of the base"):
        other.save_pretrained_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (
            {"load_in_8bit": True, "load_in_4bit": True},
            ConfigError,
            "load_in_4bit=True contradicts load_in_8bit=True",
        ),
        ({"load_in_4bit": True, "load_in_16bit": True}, ConfigError, "load_in_4bit=True contradicts"),
        ({"load_in_fp8": True}, NotSupportedError, "FP8"),
        ({"full_finetuning": True}, NotSupportedError, "only adapters are trained"),
        ({"rope_scaling": {"type": "linear"}}, NotSupportedError, "rope_scaling"),
        ({"text_only": False}, NotSupportedError, "text_only=False"),
        ({"load_in_16bit": True, "dtype": torch.float32}, ConfigError, "contradicts"),
        ({"disable_log_stats": False}, NotSupportedError, "vLLM's statistics have no place"),
        ({"fix_tokenizer": True}, NotSupportedError, "never repaired"),
        ({"use_exact_model_name": False}, NotSupportedError, "never exchanged"),
        ({"resize_model_vocab": 600}, NotSupportedError, "not resized"),
        ({"offload_embedding": True}, NotSupportedError, "offload_embedding=True"),
        ({"num_labels": 2}, NotSupportedError, "classification"),
        ({"use_gradient_checkpointing": "always"}, ConfigError, "use_gradient_checkpointing is 'always'"),
        ({"max_seq_len": 128}, ConfigError, "did you mean max_seq_length"),
        ({"modell": 1}, ConfigError, "no keyword 'modell'"),
        ({"dtype": "int4"}, ConfigError, "dtype is 'int4'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_load_keywords_that_cannot_be_honoured(
    base: Path, arguments: dict[str, Any], kind: Any, said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        FastLanguageModel.from_pretrained(base, **arguments)
    assert caught.value.fix


def test_values_that_ask_for_nothing_are_fine(base: Path) -> None:
    neutral: dict[str, Any] = {
        "load_in_4bit": False,
        "load_in_8bit": False,
        "load_in_16bit": True,
        "full_finetuning": False,
        "token": None,
        "device_map": "sequential",
        "rope_scaling": None,
        "trust_remote_code": False,
        "fast_inference": False,
        "use_exact_model_name": True,
        "qat_scheme": None,
        "text_only": True,
    }
    model, _ = FastLanguageModel.from_pretrained(base, **neutral)
    assert model.dtype is torch.bfloat16 and str(model.device) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"loftq_config": {"loftq_bits": 4}}, NotSupportedError, "LoftQ"),
        ({"init_lora_weights": "pissa"}, NotSupportedError, "would no longer belong"),
        ({"qat_scheme": "int4"}, NotSupportedError, "quantisation-aware"),
        ({"task_type": "SEQ_CLS"}, NotSupportedError, "causal"),
        ({"lora_aplha": 3}, ConfigError, "did you mean lora_alpha"),
        ({"max_seq_length": 64}, ConfigError, "was 256 in from_pretrained"),
        ({"target_modules": ["q_prj"]}, AdapterError, "did you mean q_proj"),
        ({"target_modules": "q_proj"}, AdapterError, "matches no full module name"),
        ({"r": 0}, AdapterError, "rank"),
    ],
    ids=str,
)
def test_adapter_keywords_that_cannot_be_honoured(
    base: Path, arguments: dict[str, Any], kind: Any, said: str
) -> None:
    model, _ = FastLanguageModel.from_pretrained(base)
    with pytest.raises(kind, match=said):
        FastLanguageModel.get_peft_model(model, **arguments)


def test_adapter_keywords_reach_peft(base: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(base)
    model = FastLanguageModel.get_peft_model(
        model,
        r=6,
        target_modules="all-linear",
        lora_alpha=3,
        lora_dropout=0.25,
        bias="lora_only",
        finetune_last_n_layers=1,
        use_rslora=True,
        use_dora=True,
        modules_to_save=["lm_head"],
        init_lora_weights="gaussian",
        max_seq_length=256,
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (6, 3, 0.25, "lora_only")
    assert (config.use_rslora, config.use_dora, config.init_lora_weights) == (True, True, "gaussian")
    assert list(config.modules_to_save) == ["lm_head"]
    assert len(config.target_modules) == 7 and all("layers.1." in name for name in config.target_modules)


def test_ensure_weight_tying_is_the_choice(tmp_path: Path) -> None:
    tied = tiny.write_base(tmp_path / "tied", "qwen2")
    with pytest.raises(AdapterError, match="one matrix"):
        FastLanguageModel.get_peft_model(
            FastLanguageModel.from_pretrained(tied)[0], modules_to_save=["lm_head"]
        )
    for asked, recorded in ((True, "keep"), (False, "untie")):
        model = FastLanguageModel.get_peft_model(
            FastLanguageModel.from_pretrained(tied)[0], modules_to_save=["lm_head"], ensure_weight_tying=asked
        )
        model.save_pretrained(tmp_path / recorded)
        assert json.loads((tmp_path / recorded / "pronghorn.json").read_text())["tied"] == recorded


@pytest.mark.parametrize("choice", ["keep", "untie"])
def test_the_choice_survives_the_merge(choice: str, tmp_path: Path) -> None:
    tied = tiny.write_base(tmp_path / "tied", "qwen2")
    model = FastLanguageModel.get_peft_model(
        FastLanguageModel.from_pretrained(tied)[0],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=choice == "keep",
    )
    shake(model)
    want = logits(model)
    model.save_pretrained_merged(tmp_path / "merged")
    merged, _ = load(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is (choice == "keep")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is (choice == "keep")
    assert (logits(merged) - want).abs().max() < 0.1 * (want - logits(load(tied)[0])).abs().max()


def test_random_state_is_the_seed_of_the_adapter(base: Path) -> None:
    def first(load_seed: int, seed: int | None) -> torch.Tensor:
        model, _ = FastLanguageModel.from_pretrained(base, random_state=load_seed)
        model = FastLanguageModel.get_peft_model(model, random_state=seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1, None), first(2, 1))
    assert not torch.equal(first(1, None), first(2, None))


def test_recompute_is_planned_with_the_acceleration(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = FastLanguageModel.from_pretrained(base, use_gradient_checkpointing="unsloth")
    assert recomputes(model)
    wrapped = FastLanguageModel.get_peft_model(model)
    shown = capsys.readouterr().out
    assert recomputes(wrapped) and re.search(r"recompute +2 +2", shown) and re.search(r"mlp +2 +2", shown)
    plain, _ = FastLanguageModel.from_pretrained(base, use_gradient_checkpointing=False)
    assert not recomputes(plain)
    assert not recomputes(FastLanguageModel.get_peft_model(plain))
    assert "recompute" not in capsys.readouterr().out


def test_acceleration_can_be_left_out(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = FastLanguageModel.from_pretrained(base)
    wrapped = FastLanguageModel.get_peft_model(model, accelerate=False)
    assert recomputes(wrapped) and "whole model" not in capsys.readouterr().out
    again, _ = FastLanguageModel.from_pretrained(base)
    with pytest.raises(ConfigError, match="needs accelerate=True"):
        FastLanguageModel.get_peft_model(again, accelerate=False, use_gradient_checkpointing="auto")


def test_tiled_mlps(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = FastLanguageModel.from_pretrained(base, unsloth_tiled_mlp=True)
    wrapped = FastLanguageModel.get_peft_model(model)
    said = "replaced MLPs and experts: at most 64 tokens at a time"
    assert said in capsys.readouterr().out
    FastLanguageModel.for_training(wrapped, "unsloth")
    assert said in capsys.readouterr().out
    again, _ = FastLanguageModel.from_pretrained(base, unsloth_tiled_mlp=True)
    with pytest.raises(ConfigError, match="unsloth_tiled_mlp=True needs accelerate=True"):
        FastLanguageModel.get_peft_model(again, accelerate=False)


def test_modes_switch_back_and_forth(base: Path) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    assert model.for_training() is model
    assert model.training and not model.config.use_cache and recomputes(model)
    assert model.for_training(use_gradient_checkpointing=False) is model
    assert not recomputes(model)
    assert model.for_inference() is model
    assert not model.training and model.config.use_cache


def test_a_second_wrap_is_refused(base: Path) -> None:
    model = FastLanguageModel.get_peft_model(FastLanguageModel.from_pretrained(base)[0])
    with pytest.raises(AdapterError, match="already has an adapter"):
        FastLanguageModel.get_peft_model(model)


def test_only_the_instance_is_changed(base: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(base)
    kind = type(stock)
    before = dict(vars(kind))
    model, _ = FastLanguageModel.from_pretrained(base)
    assert type(model) is kind and vars(kind) == before
    assert not hasattr(stock, "save_pretrained_merged") and hasattr(model, "save_pretrained_merged")
    wrapped = attach_lora(stock, say=None)
    assert not hasattr(wrapped, "for_training")


def test_every_keyword_is_documented() -> None:
    for function in (FastLanguageModel.from_pretrained, FastLanguageModel.get_peft_model):
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            assert name in text, f"{function.__name__} does not explain {name}"


def test_loading_needs_none_of_the_optional_libraries(base: Path) -> None:
    script = f"""
import sys
for name in ("trl", "datasets", "typer", "bitsandbytes", "rich"):
    sys.modules[name] = None
from pronghorn import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained({str(base)!r})
FastLanguageModel.get_peft_model(model)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_default_targets_where_names_differ() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=256)
    model = FastLanguageModel.get_peft_model(AutoModelForCausalLM.from_config(config))
    assert len(model.peft_config["default"].target_modules) == 8
    llama = FastLanguageModel.get_peft_model(tiny.model("llama"))
    assert len(llama.peft_config["default"].target_modules) == 14
