"""Which values of a quantised base an adapter is merged onto, and the base as the merge then sees it.

An adapter trained on NF4 belongs to the decoded values: merged onto them it reproduces the model that was
trained. Merged onto the original 16-bit values it does not (KL about 1000 times larger), and may still score
higher on other text; so both are offered, and the one taken is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from pronghorn.errors import ConfigError, ExportError
from pronghorn.export.formats import FROM_WHOLE
from pronghorn.quant.stored import EncodedNF4, StoredNF4, stored_4bit
from pronghorn.sources.record import AdapterRecord
from pronghorn.sources.source import Source
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.reader import TORCH_DTYPES
from pronghorn.weights.shards import Shard

Onto = Literal["decoded", "original"]
# formats that write model folders
_TEXT_ONLY = ("merged_16bit", *FROM_WHOLE)
_DTYPES = MappingProxyType({str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()})


@dataclass(frozen=True)
class MergeFormat:
    """What to write, and for a base in 4-bit, onto which of its values.

    ``text_only``: of a multimodal base its language model alone, as a folder of its text class.

    ``onto`` "decoded": the values the adapter was trained on; "original": the 16-bit values they came from.
    ``llama_python``: the interpreter that has llama_cpp, for the GGUF formats that its quantiser makes.
    ``calibrate``: a file of rows, as for training, on which GPTQ chooses the codes of w4a16;
    ``calibrate_python``: the interpreter that has llmcompressor, where it is not this one.
    """

    name: str = "merged_16bit"
    onto: Onto = "decoded"
    llama_python: Path | None = None
    calibrate: Path | None = None
    calibrate_python: Path | None = None
    text_only: bool = False

    def __post_init__(self) -> None:
        if self.text_only and self.name not in _TEXT_ONLY:
            raise ConfigError(
                f"text_only is for {', '.join(_TEXT_ONLY)}, not for {self.name}",
                fix="write merged_16bit with text_only (--text-only) first, then this format of that folder",
            )
        if self.onto not in get_args(Onto):
            raise ConfigError(f"onto is {self.onto!r}", fix=f"use {' or '.join(get_args(Onto))}")
        if self.calibrate_python is not None and self.calibrate is None:
            raise ConfigError(
                "calibrate_python is given, and no rows to calibrate on",
                fix="give calibrate (--calibrate ROWS)",
            )


@dataclass(frozen=True)
class BaseWeights:
    """A base as it is merged onto: ``quantised`` give the rows of the tensors that are decoded.

    ``weights`` lists 4-bit tensors under the shape and dtype they decode to. ``note`` says in words onto what
    the merge goes, None where the base was never quantised.
    """

    weights: WeightFolder
    quantised: Mapping[str, StoredNF4 | EncodedNF4] = field(default_factory=dict)
    note: str | None = None


def base_weights(base: Source, record: AdapterRecord | None, onto: Onto) -> BaseWeights:
    """Open a base for a merge. Reads headers only.

    Raises:
        SourceError: the 4-bit weights are incomplete or contradict config.json.
        ExportError: the original values are asked for, but this base holds none; or a tensor that was
            quantised at training is missing.
    """
    weights = open_weights(base.path)
    stored = stored_4bit(base.config, weights)
    if stored:
        if onto == "original":
            raise ExportError(
                f"{base.path} holds its weights in NF4 only, so nothing can be merged onto the original ones",
                fix="name the 16-bit model with base=PATH (--base), or merge onto the decoded values",
            )
        return BaseWeights(_decoded_view(weights, stored), stored, _note(len(stored), "decoded"))
    if record is None or record.quantization is None:
        return BaseWeights(weights)
    if onto == "original":
        return BaseWeights(weights, {}, _note(len(record.quantised), "original", record.quantization))
    if record.quantization == "int8":
        raise ExportError(
            "the adapter was trained on a base in 8-bit, whose decoded values are not merged onto",
            fix='merge onto the original values (--onto original, onto="original") and read the drift',
        )
    encoded = {}
    for name in record.quantised:
        if name not in weights.tensors:
            raise ExportError(
                f"{name} was in NF4 at training, but the base {base.path} has no such tensor",
                fix="give the base the adapter was trained on (base=PATH)",
            )
        encoded[name] = EncodedNF4(*weights.tensors[name], _DTYPES[str(record.quantised_dtype)])
    return BaseWeights(weights, encoded, _note(len(encoded), "decoded"))


def adapter_note(record: AdapterRecord | None) -> str | None:
    """What an adapter trained on a quantised base computes on other values of it; None for any other adapter.

    vLLM and llama.cpp read no base in bitsandbytes' formats, so there it is always on other values.
    """
    if record is None or record.quantization is None:
        return None
    held, merge = "8-bit", ""
    if record.quantization == "nf4":
        held = "decoded NF4"
        merge = "; a merge does (--format merged_16bit, w4a16, gguf-q8_0 ...)"
    return (
        f"the adapter was trained on the {held} values of {len(record.quantised)} tensors; on other values "
        f"of that base, 16-bit or quantised otherwise, it does not compute what was trained{merge}"
    )


def _note(count: int, onto: Onto, held: str = "nf4") -> str:
    if onto == "decoded":
        return f"merged onto the decoded NF4 values of {count} tensors: the model that was trained"
    return (
        f"merged onto the original 16-bit values of {count} tensors that were in "
        f"{'NF4' if held == 'nf4' else '8-bit'} at training: "
        "not the model that was trained"
    )


def _decoded_view(weights: WeightFolder, stored: Mapping[str, StoredNF4]) -> WeightFolder:
    parts = {entry.name for one in stored.values() for _, entry in one.parts.values()}
    shards = tuple(_decoded_shard(shard, stored, parts) for shard in weights.shards)
    tensors = {name: (shard, entry) for shard in shards for name, entry in shard.tensors.items()}
    return WeightFolder(weights.path, shards, weights.index, MappingProxyType(tensors))


def _decoded_shard(shard: Shard, stored: Mapping[str, StoredNF4], parts: set[str]) -> Shard:
    entries = {}
    for name, entry in shard.tensors.items():
        if name in parts:
            continue
        one = stored.get(name)
        entries[name] = entry if one is None else replace(entry, dtype=one.dtype, shape=one.shape)
    if entries == shard.tensors:
        return shard
    return replace(shard, prefix=b"", tensors=MappingProxyType(entries))


def without_quantization(config: dict[str, Any]) -> bool:
    """Remove every quantization_config from a config.json, nested ones too; returns whether there was one."""
    found = config.pop("quantization_config", None) is not None
    return any([found, *(without_quantization(one) for one in config.values() if isinstance(one, dict))])
