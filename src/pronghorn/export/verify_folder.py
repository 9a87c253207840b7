"""What lies in a model or adapter folder: JSON files and safetensors headers, read without loading a weight.

Shares no code with the exporter, on purpose: a fault there must not hide itself here.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin")

# Bits per element of every safetensors dtype (safetensors 0.8, README "Format").
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

# the language model's tensors in a multimodal folder, in the layouts of transformers before and since 4.52
_LANGUAGE = re.compile(r"language_model\.(?=model\.|lm_head\.)|(model\.)language_model\.|(?=lm_head\.)")
_HEADER_CAP_BYTES = 100_000_000  # the limit of the safetensors library itself


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a folder; ``code`` is its key in the table of what engines make of it."""

    code: str
    text: str


@dataclass(frozen=True)
class Row:
    """One promise: ``ok`` is True (kept), False (broken) or None (could not be checked: "not verified").

    ``figures``: what was measured: its name, the value before, the folder's value.
    """

    name: str
    ok: bool | None
    detail: str
    faults: tuple[Fault, ...] = ()
    figures: tuple[tuple[str, str, str], ...] = ()

    @staticmethod
    def of(fields: dict[str, Any]) -> Row:
        """A row from its JSON form."""
        faults = tuple(Fault(**fault) for fault in fields.get("faults", ()))
        figures = tuple((one[0], one[1], one[2]) for one in fields.get("figures", ()))
        return Row(fields["name"], fields["ok"], fields["detail"], faults, figures)


Finding = tuple[bool | None, str] | tuple[bool | None, str, tuple[Fault, ...]]  # a row without its name


def verdict(problems: Sequence[str | Fault], kept: str) -> Finding:
    """Broken when there are problems (the first few are told), kept otherwise."""
    if not problems:
        return True, kept
    faults = tuple(one if isinstance(one, Fault) else Fault("", one) for one in problems)
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return False, "; ".join(fault.text for fault in faults[:3]) + more, faults


class UnreadableError(ValueError):
    """A file that cannot be what its name says; the message names the file."""


@dataclass(frozen=True)
class Tensor:
    """One header entry; ``start`` and ``end`` are absolute byte offsets in ``file``."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UnreadableError: not a file, not UTF-8 JSON, or not an object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableError(f"{path.name}: {error}") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, from its header; the data must be covered without hole or overlap.

    Raises:
        UnreadableError: anything that the format does not allow, a truncated file above all.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise UnreadableError(f"{path.name} has {size} bytes, too few for a safetensors header")
        (length,) = struct.unpack("<Q", head)
        if length > min(_HEADER_CAP_BYTES, size - 8):
            raise UnreadableError(
                f"{path.name} is truncated or no safetensors file: header of {length} bytes in {size}"
            )
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{path.name}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise UnreadableError(f"{path.name}: the header is not an object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise UnreadableError(f"{path.name}: {name} starts at byte {tensor.start}, expected {position}")
        position = tensor.end
    if position != size:
        what = "truncated" if position > size else "longer than its header says"
        raise UnreadableError(f"{path.name} is {what}: {size} bytes, the header describes {position}")
    return tensors


def _entry(path: Path, name: str, value: Any, data: int) -> Tensor:
    try:
        dtype, shape = value["dtype"], tuple(value["shape"])
        start, end = value["data_offsets"]
        right = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        right = right and (end - start) * 8 == prod(shape) * DTYPE_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableError(f"{path.name}: bad header entry for {name} ({error!r})") from error
    if not right:
        raise UnreadableError(
            f"{path.name}: {name} of shape {shape} and dtype {dtype} cannot be {end - start} bytes"
        )
    return Tensor(path, dtype, shape, data + start, data + end)


def is_plain_name(name: object) -> bool:
    """Whether an index may name this file: a basename, so that nothing outside the folder is ever opened."""
    return (
        isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..") and "\\" not in name
    )


@dataclass(frozen=True)
class Folder:
    """A folder as its files describe it. Every part is read once, on first use.

    ``config`` and the other JSON properties are ``{}`` when the file is missing; a damaged file raises
    ``UnreadableError`` on use.
    """

    path: Path
    base: Folder | None = field(default=None, compare=False)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the files directly inside."""
        return frozenset(entry.name for entry in self.path.iterdir() if entry.is_file())

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder, ``{}`` when it is not there."""
        return read_json(self.path / name) if name in self.names else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return self.json("config.json")

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json that describes the language model (nested in multimodal configs)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def weight_files(self) -> tuple[str, ...]:
        """Names of all safetensors files but the adapter's."""
        return tuple(sorted(n for n in self.names if n.endswith(".safetensors") and n != ADAPTER_WEIGHTS))

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name, as the index says; ``{}`` without an index."""
        entries = self.json(INDEX).get("weight_map", {})
        if not isinstance(entries, dict) or not all(is_plain_name(name) for name in entries.values()):
            raise UnreadableError(
                f"{INDEX}: weight_map must map tensor names to file names inside the folder"
            )
        return entries

    @cached_property
    def headers(self) -> Mapping[str, Mapping[str, Tensor]]:
        """File name -> its tensors, for every file a loader would open (without an index: all)."""
        used = set(self.weight_map.values()) or set(self.weight_files)
        return {name: read_header(self.path / name) for name in sorted(used & set(self.weight_files))}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a loader would find, by name."""
        return {name: tensor for header in self.headers.values() for name, tensor in header.items()}

    @property
    def is_adapter(self) -> bool:
        """An adapter and no model: adapter files, and no weights beside them."""
        return bool(self.names & set(ADAPTER_FILES)) and not self.weight_files and INDEX not in self.names


class LanguageModel(Folder):
    """The language model of a multimodal folder: its part of config.json, its tensors by its own names."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The part of config.json that describes it."""
        return dict(self.json("config.json")["text_config"])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, as a folder of the text class calls them."""
        found = {}
        for header in self.headers.values():
            for name, tensor in header.items():
                if match := _LANGUAGE.match(name):
                    found[(match[1] or "") + name[match.end() :]] = tensor
        return found


def base_of(folder: Folder, base: Path) -> Folder:
    """The base to compare with: of a multimodal one the language model, where the folder holds only that."""
    whole = Folder(base)
    try:
        text, kind = whole.config.get("text_config"), folder.config.get("model_type")
    except UnreadableError:
        return whole  # a broken promise, which says so
    alone = isinstance(text, dict) and "text_config" not in folder.config and text.get("model_type") == kind
    return LanguageModel(base) if alone else whole


@dataclass(frozen=True)
class Promise:
    """A name and the check behind it; calling it gives the row."""

    name: str
    check: Callable[[Folder], Finding]

    def __call__(self, folder: Folder) -> Row:
        """Check a folder; one too damaged to look at breaks the promise."""
        try:
            return Row(self.name, *self.check(folder))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            said = f"cannot be checked: {error}"
            return Row(self.name, False, said, (Fault("unreadable", said),))


def promise(name: str) -> Callable[[Callable[[Folder], Finding]], Promise]:
    """Make a check of a folder a promise of that name."""
    return lambda check: Promise(name, check)


def quantization(config: dict[str, Any]) -> dict[str, Any]:
    """The quantization_config of a config.json, at its top or nested; ``{}`` where there is none."""
    found = config.get("quantization_config")
    if isinstance(found, dict) and found:
        return found
    return next(
        filter(None, (quantization(inner) for inner in config.values() if isinstance(inner, dict))), {}
    )


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without any quantization_config, nested ones included."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "quantization_config"
    }
