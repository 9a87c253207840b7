"""Tiny models with random weights, written as ordinary Hugging Face folders, one per family.

``write_base(folder, family)`` makes a complete base: config, sharded safetensors, tokenizer with a ChatML
template, generation config. Weights are large enough that a small adapter moves the logits well above
rounding.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 512
PAD, BOS, EOS = "<pad>", "<s>", "<|im_end|>"

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING}),
    "phi3": ("phi3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}


@lru_cache
def _backend(vocab_size: int) -> str:
    """A byte-level BPE tokenizer (as JSON) of exactly ``vocab_size`` tokens, trained on a fixed text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = Path(torch.__file__).read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    return str(tokenizer.to_str())


def tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """A ChatML tokenizer: pad 0, bos 1, <|im_start|> 2, eos <|im_end|> 3."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(vocab_size)), pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
    fast.chat_template = CHATML
    return fast


def config(family: str, **overrides: Any) -> Any:
    """The tiny transformers config of a family of ``FAMILIES``."""
    model_type, own = FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **own, **overrides})


def model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model in memory; matrices scaled by 1/sqrt(width), vectors made generic: nothing is a no-op."""
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config(family, **overrides))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_vector = parameter.dim() < 2
            parameter.copy_(parameter + 0.2 * noise if is_vector else noise / parameter.shape[-1] ** 0.5)
    return built.to(dtype).eval()


def write_base(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "100KB",
    **overrides: Any,
) -> Path:
    """Write a complete base folder; ``shard`` is small so that most bases have several files."""
    built = model(family, seed=seed, dtype=dtype, **overrides)
    built.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=3, max_new_tokens=32, do_sample=False
    )
    built.save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    readable_by_both(folder)
    return folder


def readable_by_both(folder: Path) -> None:
    """Write what transformers 5 alone reads in the words of transformers 4 as well: rope, tokenizer class."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    rope = text.get("rope_parameters", {})
    if "full_attention" in rope:
        text["rope_theta"] = rope["full_attention"]["rope_theta"]
        text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif rope:
        text["rope_theta"] = rope["rope_theta"]
        if "mrope_section" in rope:
            text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    path.write_text(json.dumps(config, indent=2))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    path.write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def write_adapter(
    folder: Path, base: Path, *, seed: int = 0, scale: float = 0.2, adapter_name: str = "default", **lora: Any
) -> Path:
    """Attach LoRA to the base with plain PEFT, fill A and B with noise, save the adapter to ``folder``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    wrapped = get_peft_model(loaded, LoraConfig(**options), adapter_name=adapter_name)
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise / (parameter.shape[-1] ** 0.5 if "lora_A" in name else 1.0))
    wrapped.save_pretrained(folder)
    return folder
