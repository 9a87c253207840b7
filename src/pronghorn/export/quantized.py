"""Quantised formats from the merge: which layers are coded, where their parts lie, what config.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pronghorn.errors import NotSupportedError
from pronghorn.export.class_modules import class_modules
from pronghorn.export.codes import Coded, Scheme, choose_scheme
from pronghorn.export.layout import OutputShard, OutputTensor, write_header
from pronghorn.export.plan import MERGEABLE, Change
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder
from pronghorn.weights.shards import TensorEntry

_USE_16 = "use merged_16bit; vLLM can quantise that as it loads it"


@dataclass(frozen=True)
class Quantisation:
    """``coded`` are file tensors of linear layers; ``ignore`` the linear layers that stay as they are."""

    scheme: Scheme
    coded: frozenset[str]
    ignore: tuple[str, ...]

    @property
    def told(self) -> str:
        """One line for the report."""
        per = f"group of {self.scheme.group}" if self.scheme.group else "row"
        kept = ", ".join(self.ignore[:3]) or "none"
        number = f"{self.scheme.bits}-bit {self.scheme.kind}"
        return f"{len(self.coded)} linear layers as {number}, one scale per {per}; left in 16 bit: {kept}"

    def edit(self, config: Mapping[str, Any]) -> bytes:
        """config.json with the quantization_config."""
        edited = {**config, "quantization_config": self.scheme.config(self.ignore)}
        return (json.dumps(edited, indent=2) + "\n").encode()


def plan_quantisation(
    name: str, weights: WeightFolder, config: Mapping[str, Any], base: Path
) -> Quantisation:
    """Choose the layers: every linear layer of the decoder; the output head stays.

    Raises:
        NotSupportedError: a model of a kind that is not proven, or a shape no kernel takes.
    """
    if any(".experts." in one for one in weights.tensors):
        raise NotSupportedError(f"{name} of a mixture of experts is not proven in an engine", fix=_USE_16)
    if isinstance(config.get("text_config"), Mapping):
        raise NotSupportedError(f"{name} of a multimodal model is not proven in an engine", fix=_USE_16)
    coded, ignore, widths = set(), [], set()
    for module, found in class_modules(base).items():
        if found.kind != "Linear":
            continue
        file = keymap.find(f"{module}.weight", weights.tensors)
        if ".layers." not in module or file is None:
            ignore.append(module)
            continue
        dtype = weights.tensors[file][1].dtype
        if dtype not in MERGEABLE:
            raise NotSupportedError(f"{file} of the base is {dtype}", fix="use the 16-bit base")
        coded.add(file)
        widths.add(found.shape[1])
    if not coded:
        raise NotSupportedError(f"{config.get('model_type')} has no linear layers to quantise", fix=_USE_16)
    return Quantisation(choose_scheme(name, widths), frozenset(coded), tuple(ignore))


def lay_out_codes(shards: tuple[OutputShard, ...], plan: Quantisation) -> tuple[OutputShard, ...]:
    """The merged model's files again, under the same names, with codes and scales in place of weights."""
    return tuple(_shard(shard, plan) for shard in shards)


def _shard(shard: OutputShard, plan: Quantisation) -> OutputShard:
    entries: list[TensorEntry] = []
    owners: list[int] = []
    for number, tensor in enumerate(shard.tensors):
        parts = _parts(tensor.entry, plan.scheme) if tensor.entry.name in plan.coded else [tensor.entry]
        entries += parts
        owners += [number] * len(parts)
    prefix, placed = write_header({"format": "pt"}, entries)
    tensors = []
    for number, tensor in enumerate(shard.tensors):
        entry, *rest = [one for one, owner in zip(placed, owners, strict=True) if owner == number]
        if rest:
            coded = Coded(plan.scheme, rest[0], rest[1] if len(rest) > 1 else None)
            change = tensor.change or Change(tensor.entry.shape)
            tensors.append(OutputTensor(entry, tensor.base, change, coded))
        else:
            tensors.append(replace(tensor, entry=entry))
    return OutputShard(shard.name, prefix, tuple(tensors))


def _parts(entry: TensorEntry, scheme: Scheme) -> list[TensorEntry]:
    rows, columns = entry.shape
    module = entry.name.removesuffix("weight")
    width = columns // 8 if scheme.bits == 4 else columns
    codes = replace(entry, name=module + scheme.suffix, dtype=scheme.dtype, shape=(rows, width))
    groups = columns // scheme.group if scheme.group else 1
    parts = [codes, replace(entry, name=module + "weight_scale", shape=(rows, groups))]
    if scheme.bits == 4:
        parts.append(replace(entry, name=module + "weight_shape", dtype="I64", shape=(2,)))
    return parts
