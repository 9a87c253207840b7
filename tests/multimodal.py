"""Tiny models with an image tower, written as folders of the hub, in each layout that files have had.

``write_base(folder, family, layout)`` makes a complete base: config, shards, tokenizer with the image tokens,
generation config, and the files of the processor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests import stack, tiny

_TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
_HEAD = {"head_dim": 32}
_NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})
_TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
_QWEN_TOWER = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "patch_size": 8,
    "out_hidden_size": 128,
}  # fmt: skip
_QWEN_TOKENS = {
    "vision_start_token_id": 508, "vision_end_token_id": 509, "image_token_id": 510, "video_token_id": 511,
}  # fmt: skip
_MROPE = {"mrope_section": [4, 6, 6], "rope_theta": 10_000.0}

# family -> (the language model, the rest of the configuration)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {**_HEAD, "query_pre_attn_scalar": 32, "sliding_window": 32,
         "layer_types": ["sliding_attention", "full_attention"]},
        {"vision_config": {**_TOWER, **_IMAGE}, "mm_tokens_per_image": 4, "image_token_index": 511,
         "boi_token_index": 509, "eoi_token_index": 510},
    ),
    "mistral3": (
        {**_HEAD, "model_type": "mistral", "sliding_window": None, "tie_word_embeddings": False},
        # 32: four tokens an image, for transformers fails on an image of one token
        {"vision_config": {**_TOWER, **_IMAGE, "image_size": 32, "model_type": "pixtral", "head_dim": 32},
         "image_token_index": 509, "tie_word_embeddings": False},
    ),
    "qwen2_5_vl": (
        {"rope_scaling": {**_MROPE, "rope_type": "default", "type": "default"}, "tie_word_embeddings": True},
        {"vision_config": {**_QWEN_TOWER, "fullatt_block_indexes": [0]}, "tie_word_embeddings": True,
         **_QWEN_TOKENS},
    ),
    "qwen3_vl": (
        {**_HEAD, "rope_scaling": {**_MROPE, "rope_type": "default", "mrope_interleaved": True}},
        {"vision_config": {**_QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 4},
         "tie_word_embeddings": False, **_QWEN_TOKENS},
    ),
}  # fmt: skip
_QWEN_NAMES = {
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
}  # fmt: skip
# family -> the tokens its processor looks up, the last ones of the vocabulary, by their names
_TOKENS: Mapping[str, dict[str, str]] = {
    "gemma3": {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    },
    "mistral3": {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
    "qwen2_5_vl": _QWEN_NAMES,
    "qwen3_vl": _QWEN_NAMES,
}  # fmt: skip
_PIXELS = {
    "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 1 / 255,
}  # fmt: skip
_QWEN_PIXELS = {
    **_PIXELS, "min_pixels": 256, "max_pixels": 1024, "patch_size": 8, "temporal_patch_size": 2,
    "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
_PROCESSORS: Mapping[str, dict[str, dict[str, Any]]] = {
    "gemma3": {
        "preprocessor_config.json": {
            **_PIXELS, "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 4,
            "processor_class": "Gemma3Processor", "size": {"height": 16, "width": 16},
        },
        "processor_config.json": {"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    },
    "mistral3": {
        "preprocessor_config.json": {
            **_PIXELS, "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 32},
            "patch_size": {"height": 8, "width": 8}, "processor_class": "PixtralProcessor",
        },
        "processor_config.json": {
            **_TOKENS["mistral3"], "patch_size": 8, "spatial_merge_size": 2,
            "processor_class": "PixtralProcessor",
        },
    },
    "qwen2_5_vl": {"preprocessor_config.json": {**_QWEN_PIXELS, "processor_class": "Qwen2_5_VLProcessor"}},
    "qwen3_vl": {"preprocessor_config.json": {**_QWEN_PIXELS, "processor_class": "Qwen3VLProcessor"}},
}  # fmt: skip

# layout -> what its files call a tensor of the model
_HUB = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)
_LEVEL = ((r"vision_tower\.", "vision_tower.vision_model."),)
_FLAT_QWEN = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
LAYOUTS: Mapping[str, Mapping[str, tuple[tuple[str, str], ...]]] = {
    "gemma3": {"hub": _HUB + _LEVEL, "since 4.52": _LEVEL, "one level less": ()},
    "mistral3": {"hub": _HUB, "since 4.52": ()},
    "qwen2_5_vl": {"hub": _FLAT_QWEN, "since 4.52": ()},
    "qwen3_vl": {"hub": ()},
}
BASES = tuple((family, layout) for family in LAYOUTS for layout in LAYOUTS[family])
LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def require(family: str, layout: str) -> None:
    """Skip the test where this transformers does not know the family, or does not find the layout's tower."""
    stack.require_family(family)
    if layout == "one level less" and any(".vision_model." in name for name in model(family).state_dict()):
        pytest.skip(f"transformers {transformers.__version__} looks for the tower a level deeper")


def model(
    family: str,
    *,
    seed: int = 0,
    text: Mapping[str, Any] = _NO_SETTINGS,
    both: Mapping[str, Any] = _NO_SETTINGS,
) -> Any:
    """A float32 model in memory; nothing is a no-op.

    ``text`` are further settings of the language model, ``both`` of it and of the whole.
    """
    torch.manual_seed(seed)
    language, rest = FAMILIES[family]
    language = {**_TEXT, **language, **text, **both}
    config = AutoConfig.for_model(family, text_config=language, **{**rest, **both})
    built = AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_vector = parameter.dim() < 2
            parameter.copy_(parameter + 0.2 * noise if is_vector else noise / parameter.shape[-1] ** 0.5)
    return built.eval()


def write_base(
    folder: Path,
    family: str = "gemma3",
    layout: str = "hub",
    *,
    built: Any = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a complete base folder whose tensors have the names of ``layout``."""
    built = (built or model(family)).to(dtype)
    built.config.architectures = [type(built).__name__]
    built.config.save_pretrained(folder)
    path = folder / "config.json"
    stated = {"torch_dtype" if layout == "hub" else "dtype": str(dtype).removeprefix("torch.")}
    path.write_text(json.dumps({**json.loads(path.read_text()), **stated}, indent=2))
    _write_weights(folder, built, LAYOUTS[family][layout])
    _write_tokenizer(folder, family)
    generation = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, "do_sample": False}
    for name, content in {"generation_config.json": generation, **_PROCESSORS[family]}.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    tiny.readable_by_both(folder)
    return folder


def _write_weights(folder: Path, built: Any, layout: tuple[tuple[str, str], ...]) -> None:
    """Shards of at most 200 KB or one tensor, in the order of the names."""
    stored = {}
    for name, value in built.state_dict().items():
        if name == "lm_head.weight" and value.data_ptr() == built.get_input_embeddings().weight.data_ptr():
            continue
        name = name.replace("vision_tower.vision_model.", "vision_tower.")  # transformers 4 has the level
        for pattern, replacement in layout:
            name = re.sub(pattern, replacement, name)
        stored[name] = value.contiguous()
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, value in sorted(stored.items()):
        if shards[-1] and sum(x.nbytes for x in shards[-1].values()) + value.nbytes > 200_000:
            shards.append({})
        shards[-1][name] = value
    files = {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}
    for file, shard in files.items():
        save_file(shard, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in stored.values())},
        "weight_map": {name: file for file, shard in files.items() for name in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(folder: Path, family: str) -> None:
    """The tiny tokenizer with the image tokens as its last ones."""
    named = _TOKENS[family]
    lines = ["\n" * count for count in range(1, 5)]  # Gemma 3's processor looks these up
    fast = tiny.tokenizer(tiny.VOCAB_SIZE - len(lines) - len(named))
    fast.add_tokens([*lines, *named.values()])
    assert len(fast) == tiny.VOCAB_SIZE
    fast.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "extra_special_tokens": named, **named}
    settings["processor_class"] = _PROCESSORS[family]["preprocessor_config.json"]["processor_class"]
    path.write_text(json.dumps(settings, indent=2))


def load(folder: Path, adapter: Path | None = None) -> Any:
    """A float32 model from files, everything found, with the adapter applied by PEFT."""
    from peft import PeftModel

    found, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return (found if adapter is None else PeftModel.from_pretrained(found, adapter)).eval()


def write_adapter(
    folder: Path, base: Path, *, train: Callable[[Any], None] | None = None, **lora: Any
) -> Path:
    """Attach LoRA to the language model with plain PEFT, fill A and B with noise (or train), save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, **lora}
    wrapped = get_peft_model(load(base), LoraConfig(**options))
    generator = torch.Generator().manual_seed(7)
    if train is not None:
        train(wrapped)
    else:
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.2 * noise / (parameter.shape[-1] ** 0.5 if "lora_A" in name else 1.0))
    wrapped.save_pretrained(folder)
    return folder
