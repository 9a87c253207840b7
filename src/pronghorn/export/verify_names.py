"""Which tensors config.json asks for: names and shapes of the common text models, without torch.

Engines do not say what is missing: vLLM runs with uninitialised linears, transformers with random ones. For
model types that are not in the tables, layers are held against their twins, and the class itself decides.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from pronghorn.export.verify_codes import foreign, plain_tensors, settings
from pronghorn.export.verify_folder import Fault, Finding, Folder, promise, quantization, verdict

Shape = tuple[int, ...]

_ATTENTION = {"q": ("q", "h"), "k": ("k", "h"), "v": ("k", "h"), "o": ("h", "q")}
_MLP = {"gate": ("m", "h"), "up": ("m", "h"), "down": ("h", "m")}
_SPLIT = {
    **{f"self_attn.{name}_proj.weight": shape for name, shape in _ATTENTION.items()},
    **{f"mlp.{name}_proj.weight": shape for name, shape in _MLP.items()},
}
_NORMS = {"input_layernorm.weight": ("h",), "post_attention_layernorm.weight": ("h",)}
_HEAD_NORMS = {"self_attn.q_norm.weight": ("d",), "self_attn.k_norm.weight": ("d",)}
_MORE_NORMS = {f"{side}_feedforward_layernorm.weight": ("h",) for side in ("pre", "post")}
_FUSED = {
    "self_attn.qkv_proj.weight": ("qkv", "h"), "self_attn.o_proj.weight": ("h", "q"),
    "mlp.gate_up_proj.weight": ("2m", "h"), "mlp.down_proj.weight": ("h", "m"),
}  # fmt: skip
# model type -> the tensors of one dense layer; h hidden, q and k heads times their width d, m intermediate
LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **{kind: {**_SPLIT, **_NORMS} for kind in ("llama", "mistral", "qwen2", "gemma")},
    "qwen3": {**_SPLIT, **_NORMS, **_HEAD_NORMS},
    "qwen3_moe": {**_SPLIT, **_NORMS, **_HEAD_NORMS},
    "mixtral": {**_SPLIT, **_NORMS},
    "gemma2": {**_SPLIT, **_NORMS, **_MORE_NORMS},
    "gemma3_text": {**_SPLIT, **_NORMS, **_MORE_NORMS, **_HEAD_NORMS},
    "phi3": {**_FUSED, **_NORMS},
}
# model type -> biases it always has, or the setting that adds them
_BIASES: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "qwen2": (("", "self_attn", "qkv"),),
    "llama": (("attention_bias", "self_attn", "qkvo"), ("mlp_bias", "mlp", "gate up down")),
    **dict.fromkeys(
        ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"), (("attention_bias", "self_attn", "qkvo"),)
    ),
}
# model type -> (module of the experts, setting with their number, width, the three matrices)
_EXPERTS: Mapping[str, tuple[str, str, str, tuple[str, str, str]]] = {
    "mixtral": ("block_sparse_moe", "num_local_experts", "intermediate_size", ("w1", "w3", "w2")),
    "qwen3_moe": (
        "mlp", "num_experts", "moe_intermediate_size", ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip
# model types that share embedding and head where config.json does not say
TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "gemma3_text", "gemma3"})

_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$")
_LAYER = re.compile(r"^(.*?\.)?(layers|h|blocks|block)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.experts\.(\d+\.|gate_up_proj|down_proj)")
# layers times experts; the largest public models have some 60 times 400
_MOST = 100_000
# what stands before the names of a text model -> its code
PREFIXES: Mapping[str, str] = {
    "base_model.model.": "wrapped names",
    "_orig_mod.": "wrapped names",
    "module.": "wrapped names",
    "language_model.": "multimodal prefix",
    "model.language_model.": "newer multimodal prefix",
    "": "no model prefix",
}


def expected(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Name -> shape of every tensor that a text model needs; None where its type or class is not known here.

    The output head is not listed: whether it is stored is a matter of its own.
    """
    kind = str(config.get("model_type"))
    named = (config.get("architectures") or ["ForCausalLM"])[0]
    if kind not in LAYERS or not str(named).endswith("ForCausalLM"):
        return None
    try:
        if int(config["num_hidden_layers"]) * int(config.get(_EXPERTS.get(kind, ("", ""))[1]) or 1) > _MOST:
            return None  # the sizes are a problem of their own
        return dict(_tensors(kind, config))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # sizes that are no sizes are a problem of their own


def _tensors(kind: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    pairs = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or hidden // heads)
    inner = int(config["intermediate_size"])
    sizes = {"h": hidden, "d": width, "q": heads * width, "k": pairs * width, "m": inner, "2m": 2 * inner,
             "qkv": (heads + 2 * pairs) * width}  # fmt: skip
    yield "model.embed_tokens.weight", (int(config["vocab_size"]), hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(int(config["num_hidden_layers"])):
        tensors = {name: tuple(sizes[one] for one in shape) for name, shape in LAYERS[kind].items()}
        for switch, module, letters in _BIASES.get(kind, ()):
            if not switch or config.get(switch):
                for letter in letters.split() if " " in letters else letters:
                    name = f"{module}.{letter}_proj."
                    tensors[f"{name}bias"] = tensors[f"{name}weight"][:1]
        if kind in _EXPERTS and _is_sparse(config, layer):
            tensors = {name: shape for name, shape in tensors.items() if not name.startswith("mlp.")}
            tensors.update(_experts(kind, config, hidden))
        for name, shape in tensors.items():
            yield f"model.layers.{layer}.{name}", shape


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    step = int(config.get("decoder_sparse_step") or 1)
    return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def _experts(kind: str, config: Mapping[str, Any], hidden: int) -> Iterator[tuple[str, Shape]]:
    module, number, size, (gate, up, down) = _EXPERTS[kind]
    width = int(config[size])
    yield f"{module}.gate.weight", (int(config[number]), hidden)
    for expert in range(int(config[number])):
        yield f"{module}.experts.{expert}.{gate}.weight", (width, hidden)
        yield f"{module}.experts.{expert}.{up}.weight", (width, hidden)
        yield f"{module}.experts.{expert}.{down}.weight", (hidden, width)


def prefix_of(names: Mapping[str, object], wanted: Mapping[str, object]) -> str | None:
    """What stands before the wanted names in a folder where they are not themselves; None where they are.

    ``""`` means that ``model.`` is missing.
    """
    core = [name for name in wanted if name.startswith("model.")]
    if any(name in names for name in core):
        return None
    for prefix in PREFIXES:
        if any(under(prefix, name) in names for name in core):
            return prefix
    return None


def under(prefix: str, name: str) -> str:
    """A text model's tensor ``name`` in the layout of ``prefix``."""
    if prefix in ("", "model.language_model."):
        return prefix + name.removeprefix("model.")
    return prefix + name


def original_name(name: str, config: Mapping[str, Any]) -> str:
    """What a text model's tensor is called without wrappers, PEFT's layers and other layouts' prefixes."""
    plain = name.replace(".base_layer.", ".")
    known = expected(config)
    if known is None:
        return plain
    wanted = {**known, "lm_head.weight": ()}
    for prefix in PREFIXES:
        stripped = plain.removeprefix(prefix)
        for candidate in (stripped, f"model.{stripped}"):
            if plain.startswith(prefix) and candidate in wanted:
                return candidate
    return plain


@promise("tensors are those config.json asks for")
def tensors_agree(folder: Folder) -> Finding:
    """Every tensor that config.json's class needs is there in its shape, and no other."""
    wanted = expected(folder.config)
    quantised = bool(quantization(folder.config)) and not settings(folder)
    packed = any(tensor.dtype in ("U8", "I32") for tensor in folder.tensors.values())
    if wanted is None or foreign(folder) or (quantised and packed):
        return _twins(folder)
    found = {name: shape for name, (shape, _) in plain_tensors(folder).items()}
    prefix = prefix_of(found, wanted)
    if prefix is not None:
        first = next(name for name in found if name != "lm_head.weight")
        return verdict([Fault(PREFIXES[prefix], f"{first} is not a name of {_class(folder)}")], "")
    return verdict(list(_differences(found, wanted, folder)), f"{len(wanted)} names and shapes")


def _class(folder: Folder) -> str:
    return str((folder.config.get("architectures") or [folder.config.get("model_type")])[0])


def _differences(found: Mapping[str, Shape], wanted: Mapping[str, Shape], folder: Folder) -> Iterator[Fault]:
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted and not _HARMLESS.search(name)]
    layouts = [code for code, missed, held in _LAYOUTS if _any(missed, missing) and _any(held, unknown)]
    if layouts:
        yield Fault(layouts[0], f"{missing[0]} is missing; {unknown[0]} and others hold it in another layout")
        return
    layers = folder.config.get("num_hidden_layers")
    cut = [name for name in unknown if (match := _LAYER.match(name)) and int(match[3]) >= (layers or 0)]
    if cut:
        told = f"num_hidden_layers is {layers}, and {cut[0]} is stored"
        yield Fault("layers left out", told)
    held = [int(match[3]) for name in found if (match := _LAYER.match(name))]
    for name in missing:
        match = _LAYER.match(name)
        beyond = match is not None and bool(held) and int(match[3]) > max(held)
        yield Fault("more layers" if beyond else _lost(name), f"{name} is missing")
    for name in unknown:
        if name not in cut:
            code = "unknown bias" if name.endswith("_proj.bias") else "unknown tensor"
            yield Fault(code, f"{_class(folder)} has no {name} (unexpected)")
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            told = f"{name} has shape {list(found[name])}, config.json asks for {list(shape)}"
            rows = name.endswith(("embed_tokens.weight", "lm_head.weight")) and found[name][1:] == shape[1:]
            yield Fault("vocabulary" if rows else "shape", told)


# code, a name that is missing, one that is there instead
_LAYOUTS = (
    ("stacked experts", r"\.experts\.0\.", r"\.experts\.(gate_up|down)_proj$"),
    ("fused", r"\.(q|gate)_proj\.", r"\.(qkv|gate_up)_proj\."),
    ("split", r"\.(qkv|gate_up)_proj\.", r"\.(q|gate)_proj\."),
    ("PEFT names", r"\.weight$", r"\.base_layer\.weight$"),
)


def _any(pattern: str, names: list[str]) -> bool:
    return any(re.search(pattern, name) for name in names)


def _lost(name: str) -> str:
    """The code of a missing tensor: engines differ in what they notice."""
    if _EXPERT.search(name):
        return "expert lost"
    if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
        return "norm lost"
    return "linear lost"


def _twins(folder: Folder) -> Finding:
    """No layer lacks a tensor that its twins have.

    A block (attention, MLP, ...) whose tensors are a part of what the same block holds in another layer of
    the same type is incomplete.
    """
    blocks: dict[tuple[str, str, object], dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    kinds = folder.text_config.get("layer_types")
    for tensor in folder.tensors:
        if match := _LAYER.match(tensor):
            prefix, group, layer, rest = match[1] or "", match[2], int(match[3]), match[4]
            kind = kinds[layer] if isinstance(kinds, list) and layer < len(kinds) else None
            block = rest.split(".")[0] if rest.count(".") > 1 else ""
            blocks[f"{prefix}{group}", block, kind][layer].add(rest)
            blocks[f"{prefix}{group}", "*", kind][layer].add(f"{block}.*" if block else rest)
    problems = []
    for (prefix, _, _), layers in blocks.items():
        whole: set[str] = max(layers.values(), key=len)
        for layer, held in layers.items():
            if held < whole:
                lost = [f"{prefix}.{layer}.{rest}" for rest in sorted(whole - held)]
                problems += [Fault(_lost(name), f"{name} is missing") for name in lost]
    return verdict(problems, f"{len(blocks)} kinds of block")
