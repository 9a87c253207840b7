"""Promises about GGUF files, models and adapters: the header and the sizes only, no weight is read.

Reads the format itself (llama.cpp, ggml/docs/gguf.md), without the library that the exporter writes with.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from pronghorn.export.verify_folder import Finding, Row, UnreadableError, read_json, verdict
from pronghorn.export.verify_render import syntax_errors

SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
# ggml type -> (name, elements of a block, bytes of a block)
TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    }
)  # fmt: skip
_NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count", "feed_forward_length")
_SIZES = MappingProxyType(
    {
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "feed_forward_length": "intermediate_size",
    }
)
_MOST_ENTRIES = 2**24  # no vocabulary or model has as many; a broken length would ask for all memory
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Entry:
    """One tensor: ``shape`` as in PyTorch, the fastest dimension last; ``start`` to ``end`` in the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """A file as its header describes it."""

    path: Path
    size: int
    values: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    alignment: int
    data: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.values.get("general.architecture", ""))

    def setting(self, key: str) -> Any:
        """A setting of the architecture, None where it is missing."""
        return self.values.get(f"{self.architecture}.{key}")


@dataclass
class _Reader:
    file: BinaryIO
    size: int
    names: set[str] = field(default_factory=set)

    def bytes(self, count: int) -> bytes:
        if count > min(_MOST_BYTES, self.size - self.file.tell()):
            raise UnreadableError(f"the header ends too early: {count} bytes wanted at {self.file.tell()}")
        return self.file.read(count)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.bytes(struct.calcsize(form)))[0]

    def count(self) -> int:
        found = int(self.number("<Q"))
        if found > _MOST_ENTRIES:
            raise UnreadableError(f"the header claims {found} entries")
        return found

    def text(self) -> str:
        return self.bytes(int(self.number("<Q"))).decode("utf-8", errors="strict")

    def name(self) -> str:
        found = self.text()
        if found in self.names:
            raise UnreadableError(f"{found} stands in the header twice")
        self.names.add(found)
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.count()
            if inner in _SCALARS:
                form = _SCALARS[inner]
                return list(struct.unpack(f"<{count}{form[1]}", self.bytes(count * struct.calcsize(form))))
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise UnreadableError(f"a value has the unknown type {kind}")
        return self.number(_SCALARS[kind])


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file.

    Raises:
        UnreadableError: not a GGUF file, of a version that is not known, or truncated within its header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = _Reader(file, size)
        try:
            if reader.bytes(4) != _MAGIC:
                raise UnreadableError(f"{path.name} is not a GGUF file")
            version = reader.number("<I")
            if version not in _VERSIONS:
                raise UnreadableError(f"{path.name} is GGUF version {version}, known are {_VERSIONS}")
            tensors, values = reader.count(), reader.count()
            found = {reader.name(): reader.value(reader.number("<I")) for _ in range(values)}
            entries = [_tensor(reader) for _ in range(tensors)]
        except (struct.error, UnicodeDecodeError, MemoryError) as error:
            raise UnreadableError(f"{path.name} has a broken header: {error}") from error
        alignment = int(found.get("general.alignment", 32))
        if alignment <= 0 or alignment % 8:
            raise UnreadableError(f"{path.name} has the alignment {alignment}")
        data = -(-file.tell() // alignment) * alignment
    placed = {name: Entry(one.kind, one.shape, data + one.start, data + one.end) for name, one in entries}
    return GgufFile(path, size, found, placed, alignment, data)


def _tensor(reader: _Reader) -> tuple[str, Entry]:
    name, count = reader.name(), reader.number("<I")
    if count > 4:
        raise UnreadableError(f"{name} has {count} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(count))[::-1]
    kind, start = reader.number("<I"), reader.number("<Q")
    if kind not in TYPES:
        raise UnreadableError(f"{name} has the unknown type {kind}")
    word, elements, nbytes = TYPES[kind]
    if not shape or shape[-1] % elements:
        raise UnreadableError(f"{name} {list(shape)} cannot be {word}, whose blocks are {elements} wide")
    return name, Entry(word, shape, start, start + prod(shape) // elements * nbytes)


def whole(file: GgufFile) -> Finding:
    """Tensors lie one behind the other, aligned, and the file ends where they end."""
    at, problems = file.data, []
    for name, one in sorted(file.tensors.items(), key=lambda item: item[1].start):
        if one.start != at:
            problems.append(f"{name} starts at byte {one.start}, expected {at}")
        at = -(-one.end // file.alignment) * file.alignment
    last = max((one.end for one in file.tensors.values()), default=file.data)
    if not last <= file.size <= at:
        what = "truncated" if file.size < last else "longer than its header says"
        problems.append(f"it is {what}: {file.size} bytes, the header describes {at}")
    return verdict(problems, f"{len(file.tensors)} tensors, {file.size / 1e6:,.1f} MB")


def settings_there(file: GgufFile) -> Finding:
    """What every loader asks for is stated."""
    problems = [] if file.architecture else ["general.architecture is missing"]
    problems += [f"{file.architecture}.{key} is missing" for key in _NEEDED if file.setting(key) is None]
    return verdict(problems, f"{file.architecture}, {file.setting('block_count')} blocks")


def blocks_alike(file: GgufFile) -> Finding:
    """Every block is there with the same tensors in the same shapes; embedding and last norm fit."""
    width, blocks = file.setting("embedding_length"), int(file.setting("block_count") or 0)
    layout: dict[int, dict[str, tuple[int, ...]]] = {number: {} for number in range(blocks)}
    problems = []
    for name, one in file.tensors.items():
        if name.startswith("blk."):
            number, rest = name.removeprefix("blk.").split(".", 1)
            layout.setdefault(int(number), {})[rest] = one.shape
    if set(layout) != set(range(blocks)):
        problems.append(f"blocks are numbered up to {max(layout)}, block_count is {blocks}")
    first = layout.get(0, {})
    for block, found in layout.items():
        odd = sorted(rest for rest in {*first, *found} if first.get(rest) != found.get(rest))
        if odd or not found:
            problems.append(f"block {block} differs from block 0 in {', '.join(odd) or 'everything'}")
    for name, dimensions in (("token_embd.weight", 2), ("output_norm.weight", 1)):
        there = file.tensors.get(name)
        if there is None:
            problems.append(f"{name} is missing")
        elif len(there.shape) != dimensions or there.shape[-1] != width:
            problems.append(f"{name} is {list(there.shape)}, embedding_length is {width}")
    return verdict(problems, f"{blocks} blocks of {len(first)} tensors")


def tokens_fit(file: GgufFile) -> Finding:
    """One token for each row of the embedding, no text twice, and what the tokenizer's kind needs."""
    tokens = file.values.get("tokenizer.ggml.tokens") or []
    kind, embedding = file.values.get("tokenizer.ggml.model"), file.tensors.get("token_embd.weight")
    problems = [] if tokens else ["there is no tokenizer.ggml.tokens"]
    if embedding is not None and tokens and embedding.shape[0] != len(tokens):
        problems.append(f"{len(tokens)} tokens for {embedding.shape[0]} rows of the embedding")
    if len(set(tokens)) != len(tokens):
        problems.append(f"{len(tokens) - len(set(tokens))} texts stand for two tokens; llama.cpp aborts")
    types = file.values.get("tokenizer.ggml.token_type")
    if types is not None and len(types) < len(tokens):
        problems.append(f"{len(types)} token types for {len(tokens)} tokens")
    if kind == "gpt2" and not file.values.get("tokenizer.ggml.merges"):
        problems.append("there are no merges")
    if kind == "gpt2" and not file.values.get("tokenizer.ggml.pre"):
        problems.append("tokenizer.ggml.pre is missing; llama.cpp would split text by its default")
    if kind == "llama" and len(file.values.get("tokenizer.ggml.scores") or []) < len(tokens):
        problems.append("there are fewer scores than tokens")
    return verdict(problems, f"{kind} ({file.values.get('tokenizer.ggml.pre')}), {len(tokens)} tokens")


def special_tokens(file: GgufFile) -> Finding:
    """An end token is named, all named ids exist, and those that are not text are marked so."""
    tokens = file.values.get("tokenizer.ggml.tokens") or []
    types = file.values.get("tokenizer.ggml.token_type") or []
    named = {
        key.removeprefix("tokenizer.ggml.").removesuffix("_token_id"): value
        for key, value in file.values.items()
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
    }
    problems = (
        [] if "eos" in named else ["tokenizer.ggml.eos_token_id is missing: nothing would end an answer"]
    )
    problems += [
        f"{name} is token {i} of {len(tokens)}" for name, i in named.items() if not 0 <= i < len(tokens)
    ]
    if not problems and types and types[named["eos"]] not in (3, 4):
        problems.append(
            f"the end token {tokens[named['eos']]!r} is marked as text (type {types[named['eos']]})"
        )
    return verdict(problems, ", ".join(f"{name} {number}" for name, number in sorted(named.items())))


def template_parses(file: GgufFile) -> Finding:
    """The chat templates are valid Jinja."""
    found = {key: text for key, text in file.values.items() if key.startswith("tokenizer.chat_template")}
    texts = {key: text for key, text in found.items() if isinstance(text, str)}
    if not texts:
        return True, "no chat template"
    try:
        problems = list(syntax_errors(texts))
    except ImportError:
        return None, "jinja2 is not installed"
    return verdict(problems, ", ".join(texts))


def pairs_whole(file: GgufFile) -> Finding:
    """An adapter: A and B for every matrix, of one rank, and a scale that llama.cpp computes from alpha."""
    problems = [] if file.values.get("adapter.type") == "lora" else ["adapter.type is not lora"]
    if not file.values.get("adapter.lora.alpha"):
        problems.append("adapter.lora.alpha is missing or 0: llama.cpp would not scale")
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, one in file.tensors.items():
        module, _, half = name.rpartition(".")
        modules.setdefault(module, {})[half] = one.shape
    problems += [] if modules else ["it holds no tensor"]
    for module, halves in modules.items():
        if set(halves) != {"lora_a", "lora_b"}:
            problems.append(f"{module} has {', '.join(halves)} only")
        elif halves["lora_a"][0] != halves["lora_b"][-1]:
            problems.append(
                f"{module}: A {list(halves['lora_a'])} and B {list(halves['lora_b'])} do not multiply"
            )
    return verdict(problems, f"{len(modules)} modules for {file.architecture}")


_MODEL: tuple[tuple[str, Callable[[GgufFile], Finding]], ...] = (
    ("the file is whole", whole),
    ("settings are complete", settings_there),
    ("blocks are complete and alike", blocks_alike),
    ("tokens fit the embedding", tokens_fit),
    ("special tokens exist", special_tokens),
    ("chat template parses", template_parses),
)
_ADAPTER = (_MODEL[0], ("A and B are complete", pairs_whole))


def gguf_files(path: Path) -> tuple[Path, ...]:
    """The GGUF files that a path means: itself, or those of a folder that holds no other model."""
    if path.is_file():
        return (path,) if path.suffix == SUFFIX else ()
    others = ("config.json", "adapter_config.json", "*.safetensors")
    if not path.is_dir() or any(next(path.glob(other), None) for other in others):
        return ()
    return tuple(sorted(path.glob(f"*{SUFFIX}")))


def check_gguf(files: tuple[Path, ...], base: Path | None = None) -> tuple[Row, ...]:
    """Every promise for every file; names carry the file where there are several.

    Args:
        files: GGUF files.
        base: the folder of the base; sizes that its config.json states have to be the same.
    """
    rows = []
    for path in files:
        mark = f"{path.name}: " if len(files) > 1 else ""
        try:
            found = read_gguf(path)
        except (OSError, UnreadableError) as error:
            rows.append(Row(f"{mark}{_MODEL[0][0]}", False, str(error)))
            continue
        promises = _ADAPTER if found.values.get("general.type") == "adapter" else _MODEL
        rows += [Row(f"{mark}{name}", *_checked(check, found)) for name, check in promises]
        if base is not None and promises is _MODEL:
            rows.append(Row(f"{mark}sizes are the base's", *_checked(partial(same_sizes, base=base), found)))
    return tuple(rows)


def same_sizes(file: GgufFile, base: Path) -> Finding:
    """Width, layers and heads are those of the base's config.json."""
    config = read_json(base / "config.json")
    problems = [
        f"{file.architecture}.{key} is {file.setting(key)}, {name} of the base is {config[name]}"
        for key, name in _SIZES.items()
        if name in config and file.setting(key) != config[name]
    ]
    return verdict(
        problems, ", ".join(f"{name} {config[name]}" for name in _SIZES.values() if name in config)
    )


def _checked(check: Callable[[GgufFile], Finding], file: GgufFile) -> Finding:
    try:
        return check(file)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        return False, f"cannot be checked: {error}"
