"""Quantised formats from the merge: which layers are coded, where their parts lie, what config.json says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pronghorn.errors import NotSupportedError
from pronghorn.export.class_modules import class_modules
from pronghorn.export.codes import Coded, Scheme, choose_scheme
from pronghorn.export.layout import OutputShard, OutputTensor, write_header
from pronghorn.export.plan import MERGEABLE, Change
from pronghorn.quant.choose import tower_of
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.shards import TensorEntry

_USE_16 = "use the 16-bit model (merged_16bit); vLLM can quantise that as it loads it"
# transformers 5 stacks the experts of a mixture as it reads them, and only decodes these two on the way
_MIXTURE_FORMATS = ("w4a16", "fp8")
_MIXTURES = ("mixtral", "qwen3_moe")
_ROUTERS = ("gate", "router", "shared_expert_gate")
# model type of a multimodal model -> that of its language model, proven in vLLM and transformers
_MULTIMODAL: Mapping[str, str] = MappingProxyType(
    {
        "gemma3": "gemma3_text", "mistral3": "mistral",
        "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text",
    }
)  # fmt: skip
_LANGUAGE = "model.language_model."
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Quantisation:
    """``coded`` are file tensors of linear layers; ``kept`` the linear layers that stay as they are.

    ``towers``: what lies beside a multimodal model's language model, and stays as a whole.
    """

    scheme: Scheme
    coded: frozenset[str]
    kept: tuple[str, ...]
    towers: tuple[str, ...] = ()

    @property
    def ignore(self) -> tuple[str, ...]:
        """What config.json lists: towers and routers as patterns, for engines differ in their names."""
        towers = [rf"re:.*{tower}\..*" for tower in self.towers]
        routers = [rf"re:.*\.{name}$" for name in dict.fromkeys(map(_leaf, self.kept)) if name in _ROUTERS]
        return (*towers, *routers, *(name for name in self.kept if _leaf(name) not in _ROUTERS))

    @property
    def told(self) -> str:
        """One line for the report."""
        per = f"group of {self.scheme.group}" if self.scheme.group else "row"
        twins = Counter(_NUMBER.sub(".*.", name) for name in self.kept)
        kept = [f"{name} ({n})" if n > 1 else name for name, n in twins.items()]
        left = ", ".join([*(f"all of {tower}" for tower in self.towers), *kept]) or "none"
        number = f"{self.scheme.bits}-bit {self.scheme.kind}"
        return f"{len(self.coded)} linear layers as {number}, one scale per {per}; left in 16 bit: {left}"

    def edit(self, config: Mapping[str, Any]) -> bytes:
        """config.json with the quantization_config."""
        edited = {**config, "quantization_config": self.scheme.config(self.ignore)}
        return (json.dumps(edited, indent=2) + "\n").encode()


def plan_quantisation(
    name: str, weights: WeightFolder, config: Mapping[str, Any], base: Path, *, text_only: bool = False
) -> Quantisation:
    """Choose the layers: every linear layer of the decoder; the output head and image towers stay.

    Args:
        name: the format.
        weights: what is quantised.
        config: the config.json of ``base``.
        base: the folder whose class says which tensors are linear layers.
        text_only: ``weights`` are the language model of ``base`` alone.

    Raises:
        NotSupportedError: a model of a kind that is not proven, or a shape no kernel takes.
        ExportError: as ``class_model``.
    """
    multimodal = not text_only and _is_multimodal(name, config)
    layers = f"{_LANGUAGE}layers." if multimodal else ".layers."
    experts = [file for file in weights.tensors if ".experts." in file]
    if experts:
        _check_mixture(name, str(config.get("model_type")), [weights.tensors[one][1] for one in experts])
    coded = {file for file in experts if file.endswith(".weight")}
    kept: list[str] = []
    towers: dict[str, None] = {}
    for module, found in class_modules(base, text_only=text_only).items():
        file = keymap.find(f"{module}.weight", weights.tensors)
        if _leaf(module) in _ROUTERS:
            kept.append(module)
        elif found.kind == "Linear" and multimodal and (tower := tower_of(module)):
            towers[tower.removeprefix("model.")] = None
        elif found.kind == "Linear" and (layers not in module or file is None):
            kept.append(module)
        elif found.kind == "Linear" and file is not None:
            coded.add(file)
    if not coded:
        raise NotSupportedError(f"{config.get('model_type')} has no linear layers to quantise", fix=_USE_16)
    entries = [weights.tensors[file][1] for file in sorted(coded)]
    for entry in entries:
        if entry.dtype not in MERGEABLE:
            raise NotSupportedError(f"{entry.name} of the base is {entry.dtype}", fix="use the 16-bit base")
    scheme = choose_scheme(name, (entry.shape[1] for entry in entries))
    return Quantisation(scheme, frozenset(coded), tuple(kept), tuple(towers))


def _is_multimodal(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the model has towers beside its language model; one of an unproven kind is refused."""
    text = config.get("text_config")
    if text is None and "vision_config" not in config:
        return False
    kind, inner = config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None
    if kind not in _MULTIMODAL or inner not in (None, _MULTIMODAL[str(kind)]):
        raise NotSupportedError(
            f"{name} of a multimodal model is proven for {', '.join(_MULTIMODAL)} only, this is {kind}"
            + (f" with {inner}" if inner else ""),
            fix=_USE_16,
        )
    return True


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _check_mixture(name: str, kind: str, experts: list[TensorEntry]) -> None:
    if name not in _MIXTURE_FORMATS:
        raise NotSupportedError(
            f"{name} of a mixture of experts: transformers does not read such experts, nor 16-bit ones "
            "beside other layers that are quantised so",
            fix=f"use {' or '.join(_MIXTURE_FORMATS)}, or merged_16bit",
        )
    stacked = next((entry.name for entry in experts if len(entry.shape) == 3), None)
    if stacked is not None:
        raise NotSupportedError(
            f"{stacked} holds all experts of a layer, and {name} has codes for each of its own", fix=_USE_16
        )
    if kind not in _MIXTURES:
        known = " and ".join(_MIXTURES)
        raise NotSupportedError(
            f"{name} of a mixture of experts is proven for {known} only, this is {kind}", fix=_USE_16
        )


def lay_out_codes(shards: tuple[OutputShard, ...], plan: Quantisation) -> tuple[OutputShard, ...]:
    """The merged model's files again, under the same names, with codes and scales in place of weights."""
    return tuple(_shard(shard, plan) for shard in shards)


def _shard(shard: OutputShard, plan: Quantisation) -> OutputShard:
    parts = [
        parts_of(tensor.entry, plan.scheme) if tensor.entry.name in plan.coded else [tensor.entry]
        for tensor in shard.tensors
    ]
    prefix, placed = write_header({"format": "pt"}, [one for each in parts for one in each])
    entries = iter(placed)
    tensors = []
    for tensor, each in zip(shard.tensors, parts, strict=True):
        entry, *rest = islice(entries, len(each))
        if rest:
            coded = Coded(plan.scheme, rest[0], rest[1] if len(rest) > 1 else None)
            change = tensor.change or Change(tensor.entry.shape)
            tensors.append(OutputTensor(entry, tensor.base, change, coded))
        else:
            tensors.append(replace(tensor, entry=entry))
    return OutputShard(shard.name, prefix, tuple(tensors))


def parts_of(entry: TensorEntry, scheme: Scheme) -> list[TensorEntry]:
    """What is written for a weight of ``scheme``: codes, scales, and what the tensor has once."""
    rows, columns = entry.shape
    module = entry.name.removesuffix("weight")
    codes = replace(
        entry, name=module + scheme.suffix, dtype=scheme.dtype, shape=(rows, columns // scheme.width)
    )
    groups = columns // scheme.group if scheme.group else 1
    scale = replace(entry, name=module + "weight_scale", shape=(rows, groups))
    if scheme.two_scales:
        divisor = replace(entry, name=module + "weight_global_scale", dtype="F32", shape=(1,))
        return [codes, replace(scale, dtype="F8_E4M3"), divisor]
    if scheme.bits == 4:
        return [codes, scale, replace(entry, name=module + "weight_shape", dtype="I64", shape=(2,))]
    return [codes, scale]
