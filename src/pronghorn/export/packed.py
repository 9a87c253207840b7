"""Write a merged 16-bit folder again in NF4, as bitsandbytes stores it, some rows at a time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from pronghorn.adapters.tokenizer_files import CONFIG
from pronghorn.errors import ExportError
from pronghorn.export.class_modules import class_model
from pronghorn.export.files import copy_into, small_files
from pronghorn.export.merged import not_finite
from pronghorn.quant import nf4
from pronghorn.quant.choose import Choice, choose
from pronghorn.quant.stored import EncodedNF4
from pronghorn.sources.resolve import read_json
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.reader import TORCH_DTYPES
from pronghorn.weights.shards import LENGTH_BYTES, Shard
from pronghorn.weights.writer import copy_bytes

NOTE = (
    "written in NF4: rounding the merged weights to 4 bits costs more than the adapter may have gained; "
    "current vLLM reads this format only with vllm-bnb-plugin, export w4a16 for it"
)
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def write_packed(merged: Path, folder: Path, base: Path, only: Collection[str] | None = None) -> int:
    """Quantise the linear layers of ``merged`` into ``folder``; returns how many.

    Args:
        merged: a complete 16-bit model folder.
        folder: an empty folder.
        base: what was merged onto, for messages.
        only: names of the file tensors to take at most (those of a base in 4-bit); None: the rule of loading.

    Raises:
        ExportError: the model cannot be built from its config, nothing in it can be quantised, or a weight
            to be quantised holds NaN or infinity.
    """
    weights = open_weights(merged)
    choice = _choose(merged, weights, only)
    chosen = frozenset(choice.files.values())
    copied, _ = small_files(merged)
    copy_into(merged, [name for name in copied if str(name) != CONFIG], folder)
    config = {**read_json(merged / CONFIG), "quantization_config": _settings(choice, weights)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    listed = {
        name: shard.path.name for shard in weights.shards for name in _write(shard, chosen, folder, base)
    }
    if weights.index is not None:
        size = sum((folder / name).stat().st_size for name in set(listed.values()))
        index = {"metadata": {"total_size": size}, "weight_map": listed}
        (folder / weights.index.name).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(chosen)


def _choose(merged: Path, weights: WeightFolder, only: Collection[str] | None) -> Choice:
    choice = choose(class_model(merged), weights.tensors)
    if only is not None:
        kept = {name: file for name, file in choice.files.items() if file in only}
        left = dict.fromkeys(choice.files.keys() - kept.keys(), "in 16-bit in the base")
        choice = Choice(kept, {**choice.left, **left})
    if not choice.files:
        raise ExportError("nothing in this model can be quantised", fix="export merged_16bit instead")
    return choice


def _settings(choice: Choice, weights: WeightFolder) -> Mapping[str, Any]:
    """quantization_config as transformers writes it."""
    dtype = weights.tensors[next(iter(choice.files.values()))][1].dtype
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(TORCH_DTYPES[dtype]).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": choice.skipped,
        "llm_int8_threshold": 6.0,
    }


def _write(shard: Shard, chosen: Collection[str], folder: Path, base: Path) -> list[str]:
    """One file: its header is known before a weight is encoded. Returns the tensor names."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    blank: dict[str, Mapping[str, Any]]
    blank = {name: nf4.blank_tensors(name, entry.shape) if name in chosen else {name: entry}
             for name, entry in shard.tensors.items()}  # fmt: skip
    for tensors in blank.values():
        for name, one in tensors.items():
            dtype = one.dtype if isinstance(one.dtype, str) else _NAMES[one.dtype]
            header[name] = {"dtype": dtype, "shape": list(one.shape), "data_offsets": [at, at + one.nbytes]}
            at += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with (folder / shard.path.name).open("xb") as file, shard.path.open("rb") as merged:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in shard.tensors.items():
            if name not in chosen:
                file.flush()
                copy_bytes(merged.fileno(), file.fileno(), entry.start, entry.nbytes, file.tell())
                file.seek(entry.nbytes, os.SEEK_CUR)
                continue
            weight = EncodedNF4(shard, entry, TORCH_DTYPES[entry.dtype])
            if not weight.finite:
                raise not_finite(name, base)
            for piece in weight.pieces():
                file.write(piece.view(torch.uint8).numpy().data)
        assert file.tell() == LENGTH_BYTES + len(text) + at
    return [name for tensors in blank.values() for name in tensors]
