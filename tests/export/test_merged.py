"""Merged folders are bit for bit what PEFT's float32 merge gives, and otherwise the base's own bytes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from pronghorn.errors import ExportError
from pronghorn.export.run import export
from pronghorn.sources.record import RECORD_NAME
from pronghorn.weights.folder import open_weights
from pronghorn.weights.reader import read_tensor
from tests import tiny
from tests.stack import experts_are_stacked, only_newer_peft


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(*place) for name, place in open_weights(folder).tensors.items()}


def load(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def with_peft(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 69)[None]).logits


def check_logits(base: Path, adapter: Path, merged: Path, tolerance: float = 2e-5) -> None:
    """Equal to base + adapter computed unmerged by PEFT, and far from the base. All in float32."""
    wanted, found, before = logits(with_peft(base, adapter)), logits(load(merged)), logits(load(base))
    assert (wanted - found).abs().max() < tolerance
    shared = min(before.shape[-1], wanted.shape[-1])
    assert (
        wanted - before[..., :shared] if shared == wanted.shape[-1] else wanted
    ).abs().max() > 100 * tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_the_bits_of_peft_s_float32_merge(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny.write_base(tmp_path / "base", family, dtype=dtype)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, r=6, lora_alpha=7, use_rslora=True)
    report = export(adapter, tmp_path / "merged", verify=False)
    peft = with_peft(base, adapter).merge_and_unload()
    peft.to(dtype).save_pretrained(tmp_path / "peft")
    wanted, found, before = (tensors(tmp_path / name) for name in ("peft", "merged", "base"))
    assert set(found) == set(wanted) == set(before)
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    touched = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(touched) == report.tensors_merged > 0
    assert report.tensors_copied == len(found) - len(touched)
    assert report.changed_share is not None and report.changed_share > 0.99 and report.warnings == ()
    if dtype == torch.float32:
        rounding = float((logits(peft) - logits(with_peft(base, adapter))).abs().max())  # of PEFT's own merge
        check_logits(base, adapter, tmp_path / "merged", max(2e-5, 1.5 * rounding))


def test_everything_untouched_is_the_base_s_own_bytes(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama")
    (base / "assets").mkdir()
    (base / "assets" / "notes.txt").write_text("kept")
    (base / "preprocessor_config.json").write_text('{"a":   1}')
    for name in ("consolidated.safetensors", "pytorch_model.bin", ".gitattributes"):
        (base / name).write_text("left out")
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merged = tmp_path / "merged"
    report = export(adapter, merged, verify=False)
    assert report.left_out == ("consolidated.safetensors", "pytorch_model.bin") and report.changes == ()
    files = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
    files -= {"consolidated.safetensors", "pytorch_model.bin", ".gitattributes"}
    assert {str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file()} == files
    assert [
        name
        for name in files
        if not name.endswith(".safetensors") and (base / name).read_bytes() != (merged / name).read_bytes()
    ] == []
    for shard in open_weights(base).shards:
        ours, theirs = (merged / shard.path.name).read_bytes(), shard.path.read_bytes()
        assert len(ours) == len(theirs) == shard.size
        assert ours.startswith(shard.prefix)
        for entry in shard.tensors.values():
            same = ours[entry.start : entry.end] == theirs[entry.start : entry.end]
            assert same == ("q_proj" not in entry.name)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"k_proj": 11, "layers.0.mlp.up_proj": 3}},
    ),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "saved modules": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "token rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 5]}),
    "token rows of both": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 5], "lm_head": [9]}},
    ),
    "tied token rows": ("qwen2", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 5]}),
    "dora": ("llama", {"use_dora": True}),
    "bias all": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "bias": "all"}),
    "lora bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "parameter by name": ("llama", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "one expert parameter": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}),
    "one layer": ("qwen3", {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_peft(case: str, tmp_path: Path) -> None:
    family, options = OPTIONS[case]
    base = tiny.write_base(tmp_path / "base", family, dtype=torch.float32)
    newer = case == "token rows of both"
    with only_newer_peft(AttributeError) if newer else contextlib.nullcontext():
        adapter = tiny.write_adapter(tmp_path / "adapter", base, **options)
    report = export(adapter, tmp_path / "merged", verify=False)
    check_logits(base, adapter, tmp_path / "merged")
    wanted = with_peft(base, adapter).merge_and_unload().state_dict()
    found = load(tmp_path / "merged").state_dict()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert report.changes == ()


# what is trained on a model whose embedding and head are one matrix -> are they one matrix afterwards?
TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "lora on the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "lora on both": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "lora on both as one": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "embedding saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "both saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "both saved as one": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "head only": ({"target_modules": ["q_proj", "lm_head"]}, False),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.filterwarnings("ignore")
def test_tied_models_compute_what_was_trained(case: str, tmp_path: Path) -> None:
    options, stays_tied = TIED[case]
    base = tiny.write_base(tmp_path / "base", "qwen2", dtype=torch.float32)
    newer = "ensure_weight_tying" in options
    with only_newer_peft(TypeError) if newer else contextlib.nullcontext():
        adapter = tiny.write_adapter(tmp_path / "adapter", base, **options)
    report = export(adapter, tmp_path / "merged", verify=False)
    check_logits(base, adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays_tied
    assert ("lm_head.weight" in tensors(tmp_path / "merged")) is not stays_tied
    assert report.changes == (() if stays_tied else ("config.json: tie_word_embeddings true -> false",))
    before = json.loads((base / "config.json").read_text())
    assert {key for key in config if config[key] != before[key]} == (
        set() if stays_tied else {"tie_word_embeddings"}
    )


@pytest.mark.filterwarnings("ignore")
def test_the_recorded_choice_for_tied_embeddings_counts(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "qwen2", dtype=torch.float32)
    with only_newer_peft(TypeError):
        both = tiny.write_adapter(
            tmp_path / "both",
            base,
            target_modules=["q_proj", "embed_tokens", "lm_head"],
            ensure_weight_tying=True,
        )
    record = {"format": 1, "base_name": str(base), "base_path": str(base)}
    (both / RECORD_NAME).write_text(json.dumps({**record, "tied": "untie"}))
    export(both, tmp_path / "untied", verify=False)
    check_logits(base, both, tmp_path / "untied")
    assert "lm_head.weight" in tensors(tmp_path / "untied")
    differing = tiny.write_adapter(
        tmp_path / "differing", base, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    (differing / RECORD_NAME).write_text(json.dumps({**record, "tied": "keep"}))
    with pytest.raises(ExportError, match="trained with tied='keep', but updates"):
        export(differing, tmp_path / "kept", verify=False)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.filterwarnings("ignore")
def test_added_tokens(family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny.write_base(tmp_path / "base", family, dtype=torch.float32)
    model, tokenizer = load(base), tiny.tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "<tool>"])
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer))
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path / "adapter")
    report = export(tmp_path / "adapter", tmp_path / "merged", base=base, verify=False)
    merged = load(tmp_path / "merged")
    assert merged.config.vocab_size == len(tokenizer) == 515
    assert (logits(wrapped.eval()) - logits(merged)).abs().max() < 2e-5
    assert "config.json: vocab_size 512 -> 515" in report.changes
    assert "tokenizer.json: taken from the adapter (3 new tokens)" in report.changes
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again("a<think>b").input_ids == tokenizer("a<think>b").input_ids
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in tensors(tmp_path / "merged").values())


@pytest.mark.filterwarnings("ignore")
def test_conv1d_weights_are_stored_the_other_way_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    adapter = tiny.write_adapter(
        tmp_path / "adapter", tmp_path / "base", target_modules=["c_attn", "c_proj", "c_fc"]
    )
    export(adapter, tmp_path / "merged", verify=False)  # attn.c_proj is square: its shape tells nothing
    check_logits(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("hidden", [64, 48])
@pytest.mark.filterwarnings("ignore")
def test_experts_stored_as_one_tensor(hidden: int, tmp_path: Path) -> None:
    """gpt-oss stores [experts, in, out]; at width 48 the down projection is square: no shape to go by."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=512, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, layer_types=["sliding_attention", "full_attention"], sliding_window=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    assert tensors(tmp_path / "base")["model.layers.0.mlp.experts.down_proj"].shape == (4, 48, hidden)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = tiny.write_adapter(
        tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"], target_parameters=targets
    )
    export(adapter, tmp_path / "merged", verify=False)
    check_logits(tmp_path / "base", adapter, tmp_path / "merged", tolerance=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_square_experts(family: str, tmp_path: Path) -> None:
    sizes = (
        {"intermediate_size": 64, "moe_intermediate_size": 64}
        if family == "qwen3_moe"
        else {"intermediate_size": 64}
    )
    base = tiny.write_base(tmp_path / "base", family, dtype=torch.float32, **sizes)
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    export(adapter, tmp_path / "merged", verify=False)
    check_logits(base, adapter, tmp_path / "merged")


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama", dtype=torch.float16)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["v_proj"])
    export(adapter, tmp_path / "fine", verify=False)
    file = adapter / "adapter_model.safetensors"
    save_file({name: one * 1e3 for name, one in load_file(file).items()}, file)
    with pytest.raises(ExportError, match=r"v_proj\.weight would hold values beyond F16"):
        export(adapter, tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()


def test_one_file_without_index(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama", shard="1GB", dtype=torch.float32)
    assert [path.name for path in base.glob("*.safetensors*")] == ["model.safetensors"]
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    export(adapter, tmp_path / "merged", verify=False)
    check_logits(base, adapter, tmp_path / "merged")


def test_an_adapter_for_another_model_is_refused(tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", tiny.write_base(tmp_path / "llama", "llama"))
    phi = tiny.write_base(tmp_path / "phi3", "phi3")
    with pytest.raises(
        ExportError, match=r"belongs to model\.layers\.0\..*\.weight, which the base .*phi3 lacks"
    ):
        export(adapter, tmp_path / "merged", base=phi, verify=False)
    wide = tiny.write_base(tmp_path / "wide", "llama", intermediate_size=128)
    with pytest.raises(ExportError, match=r"does not fit model\.layers\.0\.mlp\.\w+\.weight"):
        export(adapter, tmp_path / "merged", base=wide, verify=False)
    experts = tiny.write_adapter(tmp_path / "moe_adapter", tiny.write_base(tmp_path / "moe", "mixtral"))
    more = tiny.write_base(tmp_path / "more", "mixtral", num_local_experts=6)
    listed = r"does not fit model\.layers\.0\.block_sparse_moe\.gate\.weight \[6, 64\]"
    stacked = r"but 6 experts of rank 4 .* need 24"
    with pytest.raises(ExportError, match=stacked if experts_are_stacked() else listed):
        export(experts, tmp_path / "merged", base=more, verify=False)
    with pytest.raises(ExportError, match=r"which the base .* lacks|holds no such experts"):
        export(experts, tmp_path / "merged", base=tmp_path / "llama", verify=False)
    assert not (tmp_path / "merged").exists()


def test_values_that_are_not_finite_are_refused_and_updates_that_do_nothing_are_named(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama")
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    file = adapter / "adapter_model.safetensors"
    original = load_file(file)
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    for value in (float("nan"), float("inf"), float("-inf")):
        save_file({**original, key: original[key].index_fill(0, torch.tensor([3]), value)}, file)
        with pytest.raises(ExportError, match=r"1 tensors of the adapter .*up_proj\.lora_B"):
            export(adapter, tmp_path / "merged", verify=False)
    save_file({**original, key: torch.zeros_like(original[key])}, file)
    report = export(adapter, tmp_path / "zero", verify=False)
    assert report.warnings == (
        "B*A is all zero, so nothing was learned, for model.layers.0.mlp.up_proj.weight",
    )
    save_file({**original, key: original[key] * 1e-5}, file)
    report = export(adapter, tmp_path / "lost", verify=False)
    assert len(report.warnings) == 1 and "in model.layers.0.mlp.up_proj.weight" in report.warnings[0]
    assert report.warnings[0].startswith("lost in rounding: under 50% of the elements changed (down to ")


MEMORY = """
import resource, sys
from pathlib import Path
from pronghorn.export.run import export
import torch
torch.ones(99, 99) @ torch.ones(99, 99)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(Path(sys.argv[1]), Path(sys.argv[2]), verify=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_extra_memory_is_bounded_whatever_the_size(tmp_path: Path) -> None:
    """A saved float32 embedding of 312 MiB replaces one in bf16 and gets a LoRA pair: below 256 MiB more."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    name, rows = "model.embed_tokens", 40_000
    save_file({f"{name}.weight": torch.ones(rows, 2048, dtype=torch.bfloat16)}, base / "model.safetensors")
    key = f"base_model.model.{name}."
    parts = {
        "base_layer.weight": (rows, 2048),
        "lora_embedding_A": (16, rows),
        "lora_embedding_B": (2048, 16),
    }
    save_file(
        {key + part: torch.ones(shape) for part, shape in parts.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": True, "hidden_size": 2048}
    (base / "config.json").write_text(json.dumps(config))
    lora = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    command = [sys.executable, "-c", MEMORY, str(adapter), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 256 * 2**20
    merged = tensors(tmp_path / "merged")
    assert (
        float(merged[f"{name}.weight"].float().min()) == 17
        and float(merged["lm_head.weight"].float().max()) == 1
    )
