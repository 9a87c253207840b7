"""Which models llama.cpp computes as transformers does, and how their tensors are called there.

One line per architecture. What llama.cpp would compute differently is refused by name, or, where only long
texts differ, the context is limited and that is told. Read in llama.cpp's sources as llama-cpp-python 0.3.36
carries them, and proven there by tests/external/test_llama_cpp.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoConfig

from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.export.gguf_rope import Rope, rope_of
from pronghorn.sources.resolve import BASE_CONFIG
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.shards import Shard, TensorEntry

Value = bool | int | float | str | list[Any]

_SPLIT = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_FUSED = {
    "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_USE_16 = "serve the merged folder with vLLM or transformers (--format merged_16bit)"


@dataclass(frozen=True)
class Architecture:
    """``layer``: module of a decoder layer -> llama.cpp's name; ``biased``: modules that may have a bias.

    ``interleaved``: rows of q and k are stored in pairs (2i, 2i + 1) instead of halves (i, i + width/2).
    ``norm_offset``: transformers adds 1 to the weights of norms as it computes, llama.cpp wants the sum.
    ``square``: attention must be as wide as the model. ``head``: has an output matrix of its own, if untied.
    ``factors``: has a place for the frequency factors of llama3's rope.
    """

    name: str
    layer: Mapping[str, str]
    biased: frozenset[str] = frozenset()
    activation: str = "silu"
    interleaved: bool = False
    norm_offset: bool = False
    square: bool = False
    head: bool = True
    factors: bool = False


_LLAMA = Architecture(
    "llama", {**_SPLIT, **_TWO_NORMS}, frozenset(_SPLIT), interleaved=True, factors=True
)  # fmt: skip
_GELU = "gelu_pytorch_tanh"
# config.json's model_type -> architecture
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": Architecture("qwen2", {**_SPLIT, **_TWO_NORMS}, _QKV, square=True),
        "qwen3": Architecture("qwen3", {**_SPLIT, **_TWO_NORMS, **_QK_NORMS}, _QKV),
        "gemma2": Architecture(
            "gemma2", {**_SPLIT, **_FOUR_NORMS}, _QKV, _GELU, norm_offset=True, head=False
        ),
        "gemma3_text": Architecture(
            "gemma3", {**_SPLIT, **_FOUR_NORMS, **_QK_NORMS}, _QKV, _GELU, norm_offset=True
        ),
        "phi3": Architecture("phi3", {**_FUSED, **_TWO_NORMS}, square=True),
    }
)
# layers of the 27B models, which scale attention by hidden size / heads; all others by the head's width
_SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PERIOD = 6


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file: where its values are, its name there, and the change on the way.

    ``heads`` is the number of heads whose rows are interleaved (0: none); ``offset`` is added to all values.
    """

    name: str
    base: tuple[Shard, TensorEntry]
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class ModelPlan:
    """What goes into the file besides tokens: ``computed`` are small float32 tensors that no file holds."""

    architecture: Architecture
    settings: Mapping[str, Any]
    metadata: Mapping[str, Value]
    tensors: tuple[PlannedTensor, ...]
    computed: Mapping[str, list[float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return next(one.base[1].shape[0] for one in self.tensors if one.name == "token_embd.weight")


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json.

    Raises:
        NotSupportedError: one that is not proven here, by its name.
    """
    kind = config.get("model_type")
    found = ARCHITECTURES.get(str(kind))
    if found is None:
        text = config.get("text_config")
        multimodal = f" (multimodal, its text model is {text.get('model_type')})" if text else ""
        raise NotSupportedError(
            f"GGUF of {kind!r}{multimodal} is not proven here; it is for {', '.join(ARCHITECTURES)}",
            fix=f"{_USE_16}, or convert that with llama.cpp's convert_hf_to_gguf.py",
        )
    named = config.get("architectures") or ["ForCausalLM"]
    if not str(named[0]).endswith("ForCausalLM"):
        raise NotSupportedError(f"GGUF of {named[0]}: only causal language models are written", fix=_USE_16)
    if config.get("quantization_config"):
        raise NotSupportedError(
            f"GGUF is written from 16-bit weights, these are quantised ({kind})", fix="give the 16-bit model"
        )
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    """config.json with the defaults of its class.

    Raises:
        SourceError: transformers does not know it.
    """
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return dict(found.to_dict())
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SourceError(f"transformers cannot read {folder / BASE_CONFIG}: {error}") from error


def plan_model(weights: WeightFolder, config: Mapping[str, Any], settings: Mapping[str, Any]) -> ModelPlan:
    """Find a place for every tensor, and say what llama.cpp has to know.

    Args:
        weights: the complete 16-bit or 32-bit model.
        config: its config.json as it is stored.
        settings: the same with the defaults of its class.

    Raises:
        NotSupportedError: llama.cpp would compute something else; the setting or tensor is named.
    """
    architecture, rope = check_model(config, settings)
    metadata, warnings = _metadata(architecture, settings, rope)
    tensors = tuple(_tensors(architecture, weights, settings))
    return ModelPlan(architecture, settings, metadata, tensors, rope.factors, (*warnings, *rope.warnings))


def check_model(config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Architecture, Rope]:
    """The part of ``plan_model`` that needs no weights: before any work.

    Raises:
        NotSupportedError: as ``plan_model``.
    """
    architecture = architecture_of(config)
    rope = rope_of(architecture.name, config, settings)
    if "rope_freqs.weight" in rope.factors and not architecture.factors:
        raise NotSupportedError(f"llama.cpp's {architecture.name} has no llama3 rope scaling", fix=_USE_16)
    _check_settings(architecture, settings)
    return architecture, rope


def _head_dim(settings: Mapping[str, Any]) -> int:
    return int(settings.get("head_dim") or settings["hidden_size"] // settings["num_attention_heads"])


def _check_settings(architecture: Architecture, settings: Mapping[str, Any]) -> None:
    name, head_dim = architecture.name, _head_dim(settings)
    given = settings.get("hidden_activation") or settings.get("hidden_act")
    if given != architecture.activation:
        raise NotSupportedError(
            f"hidden_act is {given!r}; llama.cpp's {name} computes {architecture.activation}", fix=_USE_16
        )
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    if architecture.square and head_dim * heads != hidden:
        raise NotSupportedError(
            f"{heads} heads of {head_dim} are not hidden_size {hidden}, as llama.cpp's {name} wants",
            fix=_USE_16,
        )
    if architecture.norm_offset:
        by_hidden = settings["num_hidden_layers"] == _SCALED_BY_HIDDEN[name]
        wanted = hidden // heads if by_hidden else head_dim
        if settings.get("query_pre_attn_scalar") != wanted:
            raise NotSupportedError(
                f"query_pre_attn_scalar is {settings.get('query_pre_attn_scalar')}; llama.cpp's {name} "
                f"scales by {wanted} in a model of {settings['num_hidden_layers']} layers",
                fix=_USE_16,
            )
    capped = bool(settings.get("attn_logit_softcapping")), bool(settings.get("final_logit_softcapping"))
    if (name == "gemma2" and capped != (True, True)) or (name == "gemma3" and capped[0]):
        raise NotSupportedError(
            f"attn_logit_softcapping and final_logit_softcapping are {capped}, unlike llama.cpp's {name}",
            fix=_USE_16,
        )
    if settings.get("use_bidirectional_attention"):
        raise NotSupportedError("use_bidirectional_attention is not llama.cpp's attention", fix=_USE_16)


def _metadata(
    architecture: Architecture, settings: Mapping[str, Any], rope: Rope
) -> tuple[dict[str, Value], list[str]]:
    name, head_dim = architecture.name, _head_dim(settings)
    context = int(settings["max_position_embeddings"])
    warnings: list[str] = []
    window = _window(settings)
    values: dict[str, Value] = {}
    if name.startswith("gemma") and window:
        values["attention.sliding_window"] = window
        _add_pattern(name, settings, values, warnings)
    elif window and window < context:
        warnings.append(
            f"llama.cpp's {name} has no sliding window: the context is limited to {window} tokens (model: "
            f"{context}), up to which both compute the same"
        )
        context = window
    values |= {
        "context_length": context,
        "embedding_length": int(settings["hidden_size"]),
        "block_count": int(settings["num_hidden_layers"]),
        "feed_forward_length": int(settings["intermediate_size"]),
        "attention.head_count": int(settings["num_attention_heads"]),
        "attention.head_count_kv": int(settings["num_key_value_heads"]),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(settings["rms_norm_eps"]),
        "rope.dimension_count": int(head_dim * rope.partial),
        "vocab_size": int(settings["vocab_size"]),
        **rope.metadata,
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings.get(key):
            values[key] = float(settings[key])
    return {f"{name}.{key}": value for key, value in values.items()}, warnings


def _window(settings: Mapping[str, Any]) -> int:
    """The sliding window that some layer uses; 0 for none."""
    window, layers = settings.get("sliding_window"), settings.get("layer_types")
    if not window or settings.get("use_sliding_window") is False:
        return 0
    return int(window) if layers is None or "sliding_attention" in layers else 0


def _add_pattern(
    name: str, settings: Mapping[str, Any], values: dict[str, Value], warnings: list[str]
) -> None:
    """Which layers slide, where that is not the rule that every llama.cpp follows."""
    layers = settings.get("layer_types")
    if layers is None:
        return
    found = [kind == "sliding_attention" for kind in layers]
    period = 2 if name == "gemma2" else _GEMMA3_PERIOD
    if found == [(number + 1) % period != 0 for number in range(len(found))]:
        return
    values["attention.sliding_window_pattern"] = found
    warnings.append(
        f"layer_types are not those of {name}: they are written as a list, which needs a llama.cpp of 2026"
    )


def _tensors(
    architecture: Architecture, weights: WeightFolder, settings: Mapping[str, Any]
) -> Iterator[PlannedTensor]:
    used: set[str] = set()
    tied = bool(settings.get("tie_word_embeddings"))
    for module, name in _GLOBAL.items():
        stored = keymap.find(f"{module}.weight", weights.tensors)
        if module == "lm_head" and (tied or stored is None):
            if not tied:
                raise NotSupportedError(
                    f"{weights.path} has no lm_head and is not tied", fix="give a complete model"
                )
            used |= {stored} if stored else set()
            continue
        if module == "lm_head" and not architecture.head:
            raise NotSupportedError(
                f"embedding and head differ, which llama.cpp's {architecture.name} cannot hold", fix=_USE_16
            )
        yield _planned(architecture, weights, f"{module}.weight", f"{name}.weight", settings)
        used.add(str(stored))
    for layer in range(int(settings["num_hidden_layers"])):
        for module, name in architecture.layer.items():
            for kind in ("weight", "bias"):
                full = f"model.layers.{layer}.{module}.{kind}"
                stored = keymap.find(full, weights.tensors)
                if kind == "bias" and not _has_bias(architecture, module, settings):
                    continue  # a stored one is told below, as a tensor without a place
                yield _planned(architecture, weights, full, f"blk.{layer}.{name}.{kind}", settings)
                used.add(str(stored))
    left = sorted(name for name in weights.tensors if name not in used and "rotary_emb" not in name)
    if left:
        raise NotSupportedError(
            f"{len(left)} tensors have no place in llama.cpp's {architecture.name}, first {left[0]}",
            fix=_USE_16,
        )


def _has_bias(architecture: Architecture, module: str, settings: Mapping[str, Any]) -> bool:
    """Whether transformers adds a bias there; one that is stored besides is never read."""
    if module not in architecture.biased:
        return False
    switch = "mlp_bias" if module.startswith("mlp.") else "attention_bias"
    return architecture.name == "qwen2" or bool(settings.get(switch))


def _planned(
    architecture: Architecture, weights: WeightFolder, full: str, name: str, settings: Mapping[str, Any]
) -> PlannedTensor:
    stored = keymap.find(full, weights.tensors)
    if stored is None:
        raise NotSupportedError(f"{weights.path} lacks {full}", fix="give a complete model")
    shard, entry = weights.tensors[stored]
    if entry.dtype not in ("F16", "BF16", "F32"):
        raise NotSupportedError(f"{stored} is {entry.dtype}; GGUF is written from 16 or 32 bit", fix=_USE_16)
    offset = 1.0 if architecture.norm_offset and "norm." in full else 0.0
    return PlannedTensor(name, (shard, entry), rotary_heads(architecture, full, settings), offset)


def rotary_heads(architecture: Architecture, parameter: str, settings: Mapping[str, Any]) -> int:
    """The heads whose output rows are interleaved in llama.cpp's form of a parameter; 0 for none."""
    if not architecture.interleaved:
        return 0
    if ".q_proj." in parameter:
        return int(settings["num_attention_heads"])
    return int(settings["num_key_value_heads"]) if ".k_proj." in parameter else 0


def llama_cpp_name(architecture: Architecture, parameter: str) -> str | None:
    """The name in GGUF of a parameter of the model; None where it has none."""
    module, _, kind = parameter.rpartition(".")
    if module in _GLOBAL:
        return f"{_GLOBAL[module]}.{kind}"
    parts = module.split(".", 3)  # model, layers, number, the rest
    if parts[:2] != ["model", "layers"] or len(parts) < 4 or parts[3] not in architecture.layer:
        return None
    return f"blk.{parts[2]}.{architecture.layer[parts[3]]}.{kind}"
