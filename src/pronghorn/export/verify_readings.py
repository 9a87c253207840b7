"""How engines read what is well-formed: rope settings, tokenizer class, ends of answers, chat, quantisation.

A folder may keep every promise and still be read differently: transformers 4 knows other keys than 5, vLLM
takes the ends of answers from more places than transformers does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from pronghorn.export.verify_codes import coded, foreign, settings
from pronghorn.export.verify_folder import (
    Fault,
    Finding,
    Folder,
    UnreadableError,
    promise,
    quantization,
    verdict,
)
from pronghorn.export.verify_names import LAYERS
from pronghorn.export.verify_tokens import chat_templates, token_table, turn_end

# model type -> rope_theta of its class where config.json states none (transformers 4.56 and 5.23 alike)
_THETA: Mapping[str, float] = {
    **dict.fromkeys(LAYERS, 10_000.0), "mixtral": 1_000_000.0, "gemma3_text": 1_000_000.0,
}  # fmt: skip
# texts that llama.cpp takes for the end of an answer, whatever the file says (llama-vocab.cpp)
LLAMA_ENDS = frozenset(
    {
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<｜end▁of▁sentence｜>", "[e~[", "<|fim_pad|>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>",
    }
)  # fmt: skip
_LOCAL_THETA = 10_000.0  # of Gemma 3's layers with a window
# model type -> the class that engines build
CLASSES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "mixtral": "MixtralForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}  # fmt: skip
PREPROCESSOR = "preprocessor_config.json"
# a SigLIP tower as transformers 5 names it in memory, and writes it for models that came from no file
FLAT_TOWER = re.compile(r"(?<=vision_tower\.)(?=(embeddings|encoder|post_layernorm|head)\.)")
_VERSION_5_TOKENIZERS = frozenset({"TokenizersBackend"})
# keys that do not change what is computed, or that other promises look after
_NOT_COMPARED = frozenset({
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "max_length",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "quantization_config",
    "rope_local_base_freq", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "vocab_size",
    "attention_dropout", "hidden_dropout", "initializer_range", "router_aux_loss_coef",
    "output_router_logits", "max_position_embeddings", "_sliding_window_pattern", "pretraining_tp",
})  # fmt: skip

Rope = dict[str, tuple[float | None, str]]


def rope_of_version_5(config: Mapping[str, Any]) -> Rope:
    """Kind of layer -> (theta, everything else), as transformers 5 reads it."""
    stated = config.get("rope_parameters")
    if not isinstance(stated, dict) or not stated:
        return rope_of_version_4(config)
    kinds = {kind: one for kind, one in stated.items() if isinstance(one, dict)}
    if not kinds:
        return {"full": _rope(stated, stated.get("rope_theta", _default(config)))}
    short = {kind.removesuffix("_attention"): one for kind, one in kinds.items()}
    return {kind: _rope(one, one.get("rope_theta")) for kind, one in short.items()}


def rope_of_version_4(config: Mapping[str, Any]) -> Rope:
    """The same as transformers 4 reads it: other keys, and the class's default where they are missing."""
    found = {"full": _rope(config.get("rope_scaling") or {}, config.get("rope_theta", _default(config)))}
    if config.get("model_type") == "gemma3_text":
        found["sliding"] = (float(config.get("rope_local_base_freq", _LOCAL_THETA)), "{}")
    return found


def version_4_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 for what rope_parameters state."""
    stated = config.get("rope_parameters")
    if not isinstance(stated, dict):
        return {}
    by_kind = any(isinstance(one, dict) for one in stated.values())
    if by_kind and config.get("model_type") != "gemma3_text":
        return {}  # transformers 4 had no common keys for several kinds of layer
    full = stated.get("full_attention", stated)
    keys: dict[str, Any] = {"rope_theta": full.get("rope_theta")}
    if by_kind:
        keys["rope_local_base_freq"] = stated["sliding_attention"].get("rope_theta")
    rest = {key: value for key, value in full.items() if key != "rope_theta"}
    keys["partial_rotary_factor"] = rest.pop("partial_rotary_factor", None)
    if rest.keys() - {"rope_type"} or rest.get("rope_type", "default") != "default":
        keys["rope_scaling"] = rest
    return {key: value for key, value in keys.items() if value is not None}


def version_4_tokenizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json in words that both generations read."""
    found = dict(settings)
    if found.get("tokenizer_class") in _VERSION_5_TOKENIZERS:
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
        found.pop("backend", None)
    if isinstance(found.get("extra_special_tokens"), list):  # transformers 4 wants names for them
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def _default(config: Mapping[str, Any]) -> float | None:
    return _THETA.get(str(config.get("model_type")))


def _rope(stated: Mapping[str, Any], theta: Any) -> tuple[float | None, str]:
    """Theta, and the other settings in one writing ("type" is the older name of "rope_type")."""
    rest = {("rope_type" if key == "type" else key): value for key, value in stated.items()}
    rest = {key: value for key, value in rest.items() if key != "rope_theta" and value is not None}
    for key, usual in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        if rest.get(key) == usual:
            del rest[key]
    told = {key: float(v) if isinstance(v, int) else v for key, v in sorted(rest.items())}
    return (None if theta is None else float(theta)), str(told)


def _has_rope(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling"))


def rope_faults(folder: Folder) -> list[Fault]:
    """Rope settings that the generations of transformers read differently, or not as the base has them."""
    config = folder.text_config
    if config.get("model_type") not in _THETA:
        unread = config.get("rope_parameters") and not config.get("rope_theta")
        told = "config.json has rope_parameters and no rope_theta: transformers 4 takes its class's default"
        return [Fault("rope of version 5", told)] if unread else []
    newer, older = rope_of_version_5(config), rope_of_version_4(config)
    if folder.base is not None:
        right = rope_of_version_5(folder.base.text_config)
        if newer != right:
            return [Fault("rope differs", f"rope is {newer}, in the base {right}")]
        told = f"transformers 4 reads the rope settings as {older}, the base has {right}"
        return [Fault("rope differs, version 4", told)] if older != right else []
    if not _has_rope(config):
        told = "config.json states no rope settings: engines take their class's defaults"
        return [Fault("rope not stated", told)]
    if newer == older:
        return []
    if config.get("rope_theta") or config.get("rope_scaling"):
        told = f"rope_parameters say {newer}, the keys of transformers 4 {older}"
        return [Fault("rope contradicts itself", told)]
    told = f"transformers 4 does not know rope_parameters: it takes {older}, not {newer}"
    return [Fault("rope of version 5", told)]


def tokenizer_class_faults(folder: Folder) -> list[Fault]:
    """A tokenizer_config.json that only transformers 5 reads: its class, or a list of extra tokens."""
    settings = folder.json("tokenizer_config.json")
    named = settings.get("tokenizer_class")
    told = []
    if named in _VERSION_5_TOKENIZERS:
        told.append(f"tokenizer_config.json names the class {named}, which transformers 4 has not")
    if isinstance(settings.get("extra_special_tokens"), list):
        told.append("tokenizer_config.json lists extra_special_tokens, which transformers 4 wants by name")
    return [Fault("tokenizer of version 5", one) for one in told]


def class_faults(folder: Folder) -> list[Fault]:
    """A class of another model type: vLLM builds the class, transformers the type."""
    kind, named = folder.config.get("model_type"), folder.config.get("architectures") or [None]
    if named[0] in CLASSES.values() and kind in CLASSES and CLASSES[str(kind)] != named[0]:
        told = f"architectures says {named[0]}, and model_type {kind}: vLLM builds the former"
        return [Fault("class of another type", told)]
    return []


def chat_faults(folder: Folder) -> list[Fault]:
    """No chat template."""
    readable = "tokenizer_config.json" in folder.names or "tokenizer.json" in folder.names
    return [Fault("no chat template", "chats are refused")] if readable and not chat_templates(folder) else []


def end_faults(folder: Folder) -> list[Fault]:
    """The token that ends a turn of the chat template (else the tokenizer's end) must end answers."""
    table = token_table(folder)
    own = table.id_of("eos_token")
    wanted = turn_end(folder, table)
    wanted = own if wanted is None else wanted
    try:
        generation = folder.json("generation_config.json")
        stated = "generation_config.json" in folder.names
    except UnreadableError:
        generation, stated = {}, False
    source = generation if stated else {**folder.text_config, **folder.config}
    ends = _ids(source.get("eos_token_id"))
    vllm_ends = ends | _ids(own)
    if wanted is None:
        told = "no file names a token that ends an answer"
        return [] if vllm_ends else [Fault("end unknown to all", told)]
    lost = [name for name, ids in (("transformers", ends), ("vLLM", vllm_ends)) if wanted not in ids]
    if not lost:
        return []
    told = f"token {wanted} ends a turn, and {' and '.join(lost)} would not stop at it"
    if len(lost) == 1:
        return [Fault(f"end unknown to {lost[0]}", told)]
    known = any(table.ids.get(text) == wanted for text in LLAMA_ENDS)
    return [Fault("end known to llama.cpp" if known else "end unknown to all", told)]


def _ids(value: Any) -> set[int]:
    return {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}


def quantised_faults(folder: Folder) -> list[Fault]:
    """Quantised weights of a kind that an engine has no code for."""
    method = quantization(folder.config).get("quant_method")
    packed = any(tensor.dtype == "U8" for tensor in folder.tensors.values())
    if method == "bitsandbytes" and packed:
        return [Fault("bitsandbytes", "vLLM reads no bitsandbytes checkpoints since 0.28")]
    if unknown := foreign(folder):
        return [Fault("foreign codes", f"{unknown} is not known here")]
    if settings(folder).get("format") == "nvfp4-pack-quantized":
        return [Fault("nvfp4", "vLLM runs NVFP4 on NVIDIA GPUs only (compute capability 7.5 and up)")]
    if any(".experts." in name for name in coded(folder)):
        return [Fault("quantised experts", "vLLM runs quantised experts on GPUs, and on CPUs with AMX")]
    return []


def tower_faults(folder: Folder) -> list[Fault]:
    """An image tower whose names or processor engines do not find."""
    if not isinstance(folder.config.get("vision_config"), dict):
        return []
    faults = []
    flat = next((name for name in folder.tensors if FLAT_TOWER.search(name)), None)
    if flat is not None:
        told = (
            f"{flat} lies a level higher than transformers 4 and vLLM look for it (vision_tower.vision_model)"
        )
        faults.append(Fault("tower one level up", told))
    if PREPROCESSOR not in folder.names and "image_processor" not in folder.json("processor_config.json"):
        faults.append(Fault("no image processor", f"{PREPROCESSOR} is missing"))
    return faults


READINGS: tuple[Callable[[Folder], list[Fault]], ...] = (
    rope_faults,
    tokenizer_class_faults,
    class_faults,
    chat_faults,
    end_faults,
    quantised_faults,
    tower_faults,
)


@promise("config.json computes as the base's does")
def config_as_base(folder: Folder) -> Finding:
    """No setting that both configs state differs: layers, heads, activation, scales, windows, experts."""
    assert folder.base is not None
    ours, theirs = folder.text_config, folder.base.text_config
    keys = sorted((ours.keys() & theirs.keys()) - _NOT_COMPARED)
    problems = [
        Fault(_CODES.get(key, "config differs"), f"{key} is {ours[key]!r}, in the base {theirs[key]!r}")
        for key in keys
        if ours[key] != theirs[key]
    ]
    return verdict(problems, f"{len(keys)} settings equal")


_CODES: Mapping[str, str] = {"hidden_act": "other activation", "hidden_activation": "other activation"}


@promise("tokens have the base's ids")
def tokens_as_base(folder: Folder) -> Finding:
    """No token of the base has another id; tokens may be added."""
    assert folder.base is not None
    ours, theirs = token_table(folder).ids, token_table(folder.base).ids
    moved = [token for token, number in theirs.items() if ours.get(token, number) != number]
    problems = [
        Fault("tokenizer differs", f"{token!r} is {ours[token]}, in the base {theirs[token]}")
        for token in moved
    ]
    return verdict(problems, f"{len(theirs)} tokens")
