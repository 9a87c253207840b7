"""A base's config.json checked against its weight headers, before anything is built from it.

A config that asks for 10^9 layers hangs the model constructor; one that names a kernel repository makes the
loader fetch code. Both are found here, in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.weights.folder import WeightFolder

CONFIG_KEY = "quantization_config"
# values of quant_method
BITSANDBYTES, COMPRESSED_TENSORS = "bitsandbytes", "compressed-tensors"
_LAYER_KEYS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})
# each of these is a dimension of some tensor, so none can exceed the largest dimension in the files
_SIZE_KEYS = frozenset(
    {
        "vocab_size", "hidden_size", "n_embd", "d_model", "intermediate_size", "moe_intermediate_size",
        "n_inner",
        "num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "kv_lora_rank", "q_lora_rank",
        "shared_expert_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts",
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    }
)  # fmt: skip
# positions size no tensor in most models; Llama 4 has 10.5 million
_POSITION_KEYS = frozenset({"max_position_embeddings", "n_positions"})
MAX_POSITIONS = 10**9
# this only guards against absurd values (the strict load compares shapes exactly), so it may be generous
_SLACK = 8
_CODE_KEYS = frozenset(
    {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
     "_experts_implementation", "_experts_implementation_internal"}
)  # fmt: skip
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


def check_base_config(
    path: Path, config: Mapping[str, Any], weights: WeightFolder, *, code: bool, to_serve: bool = False
) -> None:
    """Refuse a config that is absurd for these weights, needs code, or cannot be loaded.

    ``to_serve``: the base is opened by an engine, not trained here.

    Raises:
        SourceError: a missing model_type, an impossible size or layer count, or code named by the config.
        NotSupportedError: weights quantised in a format other than NF4 (``to_serve``: than
            compressed-tensors' and bitsandbytes').
    """
    if not isinstance(config.get("model_type"), str):
        raise SourceError(
            f"{path} names no model_type, so nothing says what kind of model this is",
            fix="restore the config.json that belongs to these weights",
        )
    if config.get("auto_map") and not code:
        raise SourceError(
            f"{path} asks for Python code that comes with the model (auto_map)",
            fix="read that code; if you trust it, pass trust_remote_code=True",
        )
    layers = _layers(weights)
    largest = max((max(entry.shape, default=1) for _, entry in weights.tensors.values()), default=1)
    for key, value in _walk(config):
        if key == CONFIG_KEY and value:
            _check_quantization(path, value, to_serve)
        if key in _CODE_KEYS and isinstance(value, str) and "/" in value:
            raise SourceError(
                f"{path} sets {key} to {value!r}, a kernel to be fetched from a repository",
                fix=f"remove {key} from config.json if you trust the rest of the model",
            )
        _check_number(path, key, value, layers, largest)


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, at its top or nested; None where there is none."""
    found = config.get(CONFIG_KEY)
    if isinstance(found, Mapping) and found:
        return found
    nested = (quantization_of(value) for value in config.values() if isinstance(value, Mapping))
    return next((one for one in nested if one is not None), None)


def quantised_kind(value: Any) -> str:
    """What a quantization_config describes: "compressed-tensors", "bitsandbytes, nf4" and so on."""
    found = value if isinstance(value, Mapping) else {"quant_method": value}
    method = found.get("quant_method", "bitsandbytes" if found.get("load_in_4bit") else "unknown")
    if method != BITSANDBYTES:
        return str(method)
    kind = ", 8-bit" if not found.get("load_in_4bit") else f", {found.get('bnb_4bit_quant_type', 'fp4')}"
    if found.get("bnb_4bit_quant_storage", "uint8") not in ("uint8", None):
        kind += f" stored as {found['bnb_4bit_quant_storage']}"
    return BITSANDBYTES + kind


def _check_quantization(path: Path, value: Any, to_serve: bool) -> None:
    """One format of quantised weights can be trained on: bitsandbytes' NF4."""
    kind = quantised_kind(value)
    if to_serve and kind.startswith((COMPRESSED_TENSORS, BITSANDBYTES)):
        return  # what an engine makes of these is said where it is served
    if to_serve:
        raise NotSupportedError(
            f"{path} describes quantised weights ({kind}), under which an adapter cannot be checked here",
            fix="give the 16-bit base, or one in compressed-tensors' w4a16, w8a8, fp8 or nvfp4",
        )
    if kind != "bitsandbytes, nf4":
        raise NotSupportedError(
            f"{path} describes quantised weights ({kind}), which cannot be fine-tuned here; "
            "bitsandbytes NF4 and 16-bit weights can",
            fix="use the 16-bit weights of the same model, quantised on loading (quantization: nf4)",
        )


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _walk(value)


def _layers(weights: WeightFolder) -> int:
    """How many layers the files can hold at most: one more than the highest index in a tensor name."""
    found = [int(match) for name in weights.tensors for match in _LAYER_INDEX.findall(name) if len(match) < 7]
    return max(found, default=-1) + 1


def _check_number(path: Path, key: str, value: Any, layers: int, largest: int) -> None:
    if key in _LAYER_KEYS:
        limit, found = layers, f"the weight files hold {layers} layers"
    elif key in _SIZE_KEYS:
        limit, found = largest * _SLACK, f"the largest dimension in the weight files is {largest}"
    elif key in _POSITION_KEYS:
        limit, found = MAX_POSITIONS, f"the limit is {MAX_POSITIONS}"
    else:
        return
    values = value if isinstance(value, list) else [value]
    for one in values:
        if one is None:
            continue
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one <= limit:
            raise SourceError(
                f"{path} says {key} = {one!r}, but {found}",
                fix="restore the config.json that belongs to these weights",
            )
