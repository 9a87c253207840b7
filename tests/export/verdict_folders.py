"""Good and broken model folders, each one damage away from a good one; ``verdicts.json`` has what engines do.

The good folders are written so that transformers 4 and 5 both read them right. With trained weights
(``tests.external.memorised``) every wrong logit changes an answer; untrained, they are the same files to a
reader of headers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from tests import tiny
from tests.export.damage import (
    DROP,
    INDEX,
    Damage,
    both,
    config,
    drop,
    edit_index,
    edit_json,
    edit_weights,
    generation,
    put,
    remove,
    rename,
    tokenizer_config,
    write,
)
from tests.external import memorised

FAMILIES = ("llama", "qwen2", "gemma3", "phi3", "mixtral", "qwen3", "mistral", "gemma2")
# not the defaults of their classes: a reader that loses them computes other logits
ROPE: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "default", "rope_theta": 500_000.0},
    "gemma3": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
    },
}

Q1 = "model.layers.1.self_attn.q_proj.weight"
SHARDS = tuple(f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4))


@dataclass(frozen=True)
class Case:
    """``damage`` of the good folder of ``family``; with ``base``, the verdict may look at the good folder."""

    name: str
    family: str
    damage: Damage
    base: bool = False


def write_good(folder: Path, family: str, *, train: bool) -> Path:
    """A complete good folder that both generations of transformers read right."""
    overrides = dict(memorised.OVERRIDES[family])
    if family in ROPE:
        overrides["rope_parameters"] = ROPE[family]
    model = tiny.model(family, **overrides)
    if train:
        memorised.memorise(model, memorised.BASE, steps=60, rate=3e-3)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=3)
    model.save_pretrained(folder, max_shard_size="200KB")
    tiny.tokenizer().save_pretrained(folder)
    tiny.readable_by_both(folder)
    return folder


def write_folders(root: Path, cases: Iterable[Case], *, train: bool) -> dict[str, Path]:
    """Write the good folders (``root/good``) and each case's; the answer has the path of each by its name."""
    listed = list(cases)
    for family in {case.family for case in listed}:
        write_good(root / "good" / family, family, train=train)
    made = {}
    for case in listed:
        made[case.name] = shutil.copytree(root / "good" / case.family, root / case.name.replace(" ", "_"))
        case.damage(made[case.name])
    return made


def as_it_is(folder: Path) -> None:
    """No damage."""


def only_version_5(folder: Path) -> None:
    """What transformers 5 writes."""
    edit_json(folder / "config.json", rope_theta=DROP, rope_local_base_freq=DROP)
    edit_json(folder / "tokenizer_config.json", tokenizer_class="TokenizersBackend", backend="tokenizers")


def only_version_4(folder: Path) -> None:
    """What transformers 4 wrote."""
    edit_json(folder / "config.json", rope_parameters=DROP, dtype=DROP, torch_dtype="bfloat16")


def cast(dtype: torch.dtype, name: str) -> Damage:
    return both(
        lambda folder: edit_weights(folder, lambda t: t.update({n: x.to(dtype) for n, x in t.items()})),
        config(dtype=name),
    )


def cast_one(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({Q1: tensors[Q1].float()}))


def fp8_without_scales(folder: Path) -> None:
    """Linear weights in FP8, divided by scales that were not kept."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, value in list(tensors.items()):
            if "_proj" in name:
                scale = value.float().abs().max() / 448
                tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)

    edit_weights(folder, edit)


def copy_head(scale: float) -> Damage:
    """Store an lm_head: the embeddings times ``scale``."""
    return lambda folder: edit_weights(
        folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone() * scale})
    )


def zero_head(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.zeros_like(t["lm_head.weight"])}))


def fuse_qkv(folder: Path) -> None:
    """vLLM's own names in the file."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.self_attn."
            parts = [tensors.pop(f"{prefix}{letter}_proj.weight") for letter in "qkv"]
            tensors[f"{prefix}qkv_proj.weight"] = torch.cat(parts)

    edit_weights(folder, edit)


def split_qkv(folder: Path) -> None:
    """Phi-3 with the three matrices of other families."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.self_attn."
            parts = tensors.pop(f"{prefix}qkv_proj.weight").split([128, 64, 64])
            tensors.update({f"{prefix}{name}_proj.weight": x for name, x in zip("qkv", parts, strict=True)})

    edit_weights(folder, edit)


def stack_experts(folder: Path) -> None:
    """The names and shapes of transformers 5 in memory."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts."
            parts = ([tensors.pop(f"{prefix}{e}.w{part}.weight") for e in range(4)] for part in (1, 2, 3))
            w1, w2, w3 = parts
            home = f"model.layers.{layer}.mlp.experts."
            both_halves = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
            tensors[f"{home}gate_up_proj"] = torch.stack(both_halves)
            tensors[f"{home}down_proj"] = torch.stack(w2)
            gate = tensors.pop(f"model.layers.{layer}.block_sparse_moe.gate.weight")
            tensors[f"model.layers.{layer}.mlp.gate.weight"] = gate

    edit_weights(folder, edit)


def transpose_mlp(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({n: x.T for n, x in t.items() if "down_proj" in n}))


def stale_single(folder: Path) -> None:
    """The weights of an earlier run beside newer shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model-*.safetensors"):
        tensors.update(load_file(file))
    older = {name: torch.randn_like(x.float()).to(x.dtype) * x.float().std() for name, x in tensors.items()}
    save_file(older, folder / "model.safetensors", {"format": "pt"})


def index_forgets(folder: Path) -> None:
    edit_index(folder, lambda names: [names.pop(n) for n in list(names) if "mlp" in n or "q_proj" in n])


def index_misplaces(folder: Path) -> None:
    """Two matrices' files exchanged in the index."""

    def edit(names: dict[str, str]) -> None:
        files = sorted(set(names.values()))
        for name in list(names):
            names[name] = files[(files.index(names[name]) + 1) % len(files)]

    edit_index(folder, edit)


def missing_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


def truncated(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def adapter(folder: Path, *, with_config: bool = True, with_weights: bool = True) -> None:
    """An adapter's files left beside the merged weights."""
    if with_config:
        content = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 400, "lora_dropout": 0.0,
            "target_modules": ["q_proj"], "bias": "none",
            "base_model_name_or_path": str(folder.parent / "good" / "llama"),
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(content))
    if with_weights:
        generator = torch.Generator().manual_seed(5)
        tensors = {}
        for layer in (0, 1):
            home = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora"
            tensors[f"{home}_A.weight"] = torch.randn(4, 128, generator=generator)
            tensors[f"{home}_B.weight"] = torch.randn(128, 4, generator=generator)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    """One of the same size whose ordinary tokens have other ids."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    plain = [token for token in vocabulary if token not in (tiny.PAD, tiny.BOS, "<|im_start|>", tiny.EOS)]
    ids = [vocabulary[token] for token in plain]
    vocabulary.update(dict(zip(plain, reversed(ids), strict=True)))
    (folder / "tokenizer.json").write_text(json.dumps(content))


def inside(prefix: str) -> Damage:
    """Another prefix before every name."""
    return rename(lambda name: prefix + name)


def quantization(**content: Any) -> Damage:
    return config(quantization_config=content)


_BNB = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": False, "load_in_8bit": False,
}  # fmt: skip
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
_W8A8 = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
        },
    }},
}  # fmt: skip

_DROP_ROPE = config(rope_theta=DROP, rope_parameters=DROP)

CASES: tuple[Case, ...] = (
    *(Case(f"good {family}", family, as_it_is) for family in FAMILIES),
    *(Case(f"{family} as transformers 5 writes it", family, only_version_5) for family in FAMILIES[:3]),
    *(Case(f"{family} as transformers 4 wrote it", family, only_version_4) for family in FAMILIES[:3]),
    Case("rope of version 5 only", "llama", config(rope_theta=DROP)),
    Case("rope of version 5 only, by kind of layer", "gemma3",
         config(rope_theta=DROP, rope_local_base_freq=DROP)),
    Case("rope settings contradict each other", "llama", config(rope_theta=10_000.0), base=True),
    Case("rope settings lost", "llama", _DROP_ROPE, base=True),
    Case("rope settings lost, nothing to compare with", "llama", _DROP_ROPE),
    Case("tokenizer class of version 5", "llama", tokenizer_config(tokenizer_class="TokenizersBackend")),
    Case("one file", "llama", lambda folder: edit_weights(folder, lambda tensors: None)),
    Case("rotary buffers stored", "llama", lambda folder: edit_weights(folder, lambda t: t.update(
        {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in (0, 1)}))),
    Case("float16", "llama", cast(torch.float16, "float16")),
    Case("float32", "llama", cast(torch.float32, "float32")),
    Case("declared float16, stored bfloat16", "llama", config(dtype="float16")),
    Case("one tensor in float32", "llama", cast_one),
    Case("fp8 without scales", "llama", fp8_without_scales),
    Case("copy of the tied head", "qwen2", copy_head(1.0)),
    Case("stray head although tied", "qwen2", copy_head(-1.0), base=True),
    Case("stray head although tied, nothing to compare with", "qwen2", copy_head(-1.0)),
    Case("untied without a head", "qwen2", config(tie_word_embeddings=False)),
    Case("untied, a copy as head", "qwen2", both(copy_head(1.0), config(tie_word_embeddings=False))),
    Case("tying not stated", "qwen2", config(tie_word_embeddings=DROP)),
    Case("tied although the head is its own", "llama", config(tie_word_embeddings=True), base=True),
    Case("tied although untied in the base, head lost", "llama",
         both(drop("lm_head.weight"), config(tie_word_embeddings=True)), base=True),
    Case("head lost", "llama", drop("lm_head.weight")),
    Case("head of zeros", "llama", zero_head),
    Case("one linear lost", "llama", drop(Q1)),
    Case("one linear lost in every layer", "llama", drop(Q1, Q1.replace(".1.", ".0."))),
    Case("biases lost in every layer", "qwen2",
         drop(*(f"model.layers.{i}.self_attn.q_proj.bias" for i in (0, 1)))),
    Case("one expert lost", "mixtral",
         drop(*(f"model.layers.1.block_sparse_moe.experts.3.w{i}.weight" for i in (1, 2, 3)))),
    Case("norm lost", "llama", drop("model.layers.0.input_layernorm.weight")),
    Case("last norm lost", "llama", drop("model.norm.weight")),
    Case("embeddings lost", "llama", drop("model.embed_tokens.weight")),
    Case("unknown tensor", "llama", put(model__extra__weight=torch.ones(3, dtype=torch.bfloat16))),
    Case("biases the class has not", "llama", lambda folder: edit_weights(folder, lambda t: t.update(
        {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(128, dtype=torch.bfloat16) for i in (0, 1)}))),
    Case("transposed", "llama", transpose_mlp),
    Case("fewer layers in the config", "llama", config(num_hidden_layers=1)),
    Case("more layers in the config", "llama", config(num_hidden_layers=3)),
    Case("larger vocabulary in the config", "llama", config(vocab_size=640)),
    Case("other heads in the config", "llama",
         config(num_attention_heads=2, num_key_value_heads=1, head_dim=64), base=True),
    Case("other activation in the config", "llama", config(hidden_act="gelu"), base=True),
    Case("other attention scale in the config", "gemma3", config(query_pre_attn_scalar=256), base=True),
    Case("fewer experts per token", "mixtral", config(num_experts_per_tok=1), base=True),
    Case("PEFT names", "llama", rename(
        lambda n: f"base_model.model.{n}".replace("q_proj.weight", "q_proj.base_layer.weight"))),
    Case("base_layer in some names", "llama", rename(
        lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"))),
    Case("names of torch.compile", "llama", inside("_orig_mod.")),
    Case("names of a wrapper", "llama", inside("module.")),
    Case("names without model.", "llama", rename(lambda n: n.removeprefix("model."))),
    Case("names of a multimodal folder", "gemma3", inside("language_model.")),
    Case("names of a multimodal model", "gemma3", rename(
        lambda n: n.replace("model.", "model.language_model.", 1))),
    Case("fused as vLLM has it", "llama", fuse_qkv),
    Case("split although fused", "phi3", split_qkv),
    Case("stacked experts", "mixtral", stack_experts),
    Case("stale single file", "llama", stale_single),
    Case("no index", "llama", remove(INDEX)),
    Case("index forgets tensors", "llama", index_forgets),
    Case("index names the wrong files", "llama", index_misplaces),
    Case("shard missing", "llama", missing_shard),
    Case("shard truncated", "llama", truncated),
    Case("bitsandbytes config left", "llama", quantization(**_BNB)),
    Case("GPTQ config left", "llama", quantization(**_GPTQ)),
    Case("compressed-tensors config left", "llama", quantization(**_W8A8)),
    Case("FP8 config left", "llama", quantization(quant_method="fp8", activation_scheme="dynamic")),
    Case("adapter left beside", "llama", adapter),
    Case("adapter config left beside", "llama", lambda folder: adapter(folder, with_weights=False)),
    Case("adapter weights left beside", "llama", lambda folder: adapter(folder, with_config=False)),
    Case("adapter left beside one file", "llama", both(
        lambda folder: edit_weights(folder, lambda tensors: None), adapter)),
    Case("stale pickle beside", "llama", write("pytorch_model.bin", b"older")),
    Case("no chat template", "llama", remove("chat_template.jinja")),
    Case("tokenizer of another model", "llama", other_tokenizer, base=True),
    Case("no tokenizer", "llama", remove("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    Case("no tokenizer config", "llama", remove("tokenizer_config.json")),
    Case("other end in generation_config", "llama", generation(eos_token_id=2)),
    Case("no end anywhere", "llama", both(
        generation(eos_token_id=DROP), config(eos_token_id=DROP), tokenizer_config(eos_token=DROP))),
    Case("no end in generation_config", "llama", generation(eos_token_id=DROP)),
    Case("no end but the tokenizer's", "llama", both(
        generation(eos_token_id=DROP), config(eos_token_id=DROP))),
    Case("end of the text, not of the turn", "llama", both(
        generation(eos_token_id=1), config(eos_token_id=1), tokenizer_config(eos_token="<s>"))),
    Case("no generation_config", "llama", remove("generation_config.json")),
    Case("damaged generation_config", "llama", write("generation_config.json", "{")),
    Case("damaged config", "llama", write("config.json", "{")),
    Case("no config", "llama", remove("config.json")),
    Case("no architectures", "llama", config(architectures=DROP)),
    Case("architecture without a head", "llama", config(architectures=["LlamaModel"])),
    Case("architecture of another family", "qwen2", config(architectures=["LlamaForCausalLM"])),
    Case("no model_type", "llama", config(model_type=DROP)),
)  # fmt: skip
