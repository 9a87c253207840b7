"""A repaired copy of a folder: its config, names and files put right where the files themselves say how.

Nothing is made up: what is missing from the weights is refused by name. The copy is checked first.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronghorn.errors import ExportError, NotSupportedError, VerificationError
from pronghorn.export.files import check_apart, check_space, copy_into, small_files
from pronghorn.export.verify import VerifyReport, check_files
from pronghorn.export.verify_engines import NO_CHAT, RIGHT, faults_of
from pronghorn.export.verify_folder import FLOATS, INDEX, SINGLE, Folder, Tensor, without_quantization
from pronghorn.export.verify_names import expected, original_name
from pronghorn.export.verify_readings import FLAT_TOWER, version_4_rope, version_4_tokenizer
from pronghorn.export.verify_tokens import token_table, turn_end
from pronghorn.weights.writer import StagedFolder, copy_bytes, write_all

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}

# faults by what puts them right
_NAMES = frozenset(
    {
        "PEFT names", "wrapped names", "multimodal prefix", "newer multimodal prefix", "no model prefix",
        "tower one level up",
    }
)  # fmt: skip
_DROPPED = frozenset({"unknown tensor", "unknown bias", "stray head", "copied head"})
_REWRITTEN = frozenset({"no index", "index forgets", "index misplaces", "index names ghosts"})
_LEFT_OUT = frozenset({
    "stale single file", "stale file", "adapter beside shards", "adapter beside one file",
    "adapter config beside", "adapter weights beside shards", "adapter weights beside one file",
})  # fmt: skip
_QUANTIZATION = frozenset({
    "bitsandbytes config left", "gptq config left", "awq config left", "compressed-tensors config left",
    "fp8 config left", "quantization config left",
})  # fmt: skip
_OWN = frozenset({
    "declared dtype", "rope of version 5", "tokenizer of version 5", "end unknown to transformers",
    "end unknown to all", "end known to llama.cpp", "end unknown to vLLM", "no chat template",
    "rope differs, version 4",
})  # fmt: skip
_CONFIG = frozenset({
    "no architectures", "no model_type", "class of another type", "rope differs",
    "no config", "config differs", "other activation", "head not to be tied", "head lost", "shape",
    "vocabulary",
    "layers left out",
    "more layers",
})  # fmt: skip
_TOKENIZER = frozenset(
    {
        "no tokenizer",
        "no tokenizer config",
        "tokenizer differs",
        "special ids differ",
        "broken template",
        "endless template",
    }
)
_ALONE = _NAMES | _DROPPED | _REWRITTEN | _LEFT_OUT | _QUANTIZATION | _OWN
_WITH_BASE = _CONFIG | _TOKENIZER | {"no index", "no image processor"}


@dataclass
class _Copy:
    """What the copy will hold: its JSON files, what each tensor is called (None: left out), and the story."""

    names: dict[str, str | None]
    json: dict[str, dict[str, Any]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Repair:
    """What was changed, and the check of the copy."""

    changes: tuple[str, ...]
    report: VerifyReport


def repair(folder: Path, target: Path, *, base: Path | None = None, overwrite: bool = False) -> Repair:
    """Write a repaired copy of a model folder to ``target``.

    Args:
        folder: A model folder, made by any tool.
        target: The folder to write; it appears only when the copy keeps every promise.
        base: The base it was trained from: the source of config, tokenizer and missing files.
        overwrite: Replace ``target`` where it has content.

    Raises:
        NotSupportedError: a fault that a copy cannot put right (missing weights above all); all are named.
        VerificationError: the copy would still break a promise; nothing appears.
        ExportError: the disk refuses.
    """
    view = Folder(folder, base=Folder(base) if base else None)
    if view.is_adapter:
        raise NotSupportedError(f"{folder} is an adapter", fix="pronghorn export DIR OUT --format adapter")
    before = check_files(folder, base)
    codes = {fault.code: fault.text for fault in faults_of(view, before.rows)}
    _refuse(folder, codes, base)
    copy = _plan(view, set(codes))
    check_apart(target, {"folder": folder, **({"base": base} if base else {})})
    check_space(target, sum(t.end - t.start for t in view.tensors.values()))
    with StagedFolder(target, overwrite) as staging:
        _write_weights(view, copy, staging)
        _write_files(view, copy, staging, set(codes))
        report = check_files(staging, base)
        failure = report.first_failure
        if failure is not None:
            raise VerificationError(
                f"{target} was not written, the copy would still break a promise: {failure.name}: "
                f"{failure.detail}",
                fix="give the base with --base, or write the folder again with the tool that made it",
            )
        bad = [one for one in report.engines if one.outcome not in (RIGHT, NO_CHAT)]
        copy.told += [f"{one.engine} still: {one}" for one in bad]
    return Repair(tuple(copy.told), report)


def _refuse(folder: Path, codes: Mapping[str, str], base: Path | None) -> None:
    possible = _ALONE | (_WITH_BASE if base else frozenset())
    hopeless = [text for code, text in codes.items() if code not in possible]
    if hopeless:
        needs = base is None and all(code in _WITH_BASE for code in codes if code not in possible)
        raise NotSupportedError(
            f"{folder} cannot be repaired: {'; '.join(hopeless[:3])}",
            fix="give the base it was trained from: --base DIR" if needs else "write the folder again",
        )


def _plan(view: Folder, codes: set[str]) -> _Copy:
    copy = _Copy({name: name for name in view.tensors})
    if codes & _NAMES:
        copy.names = {
            name: FLAT_TOWER.sub("vision_model.", original_name(name, view.config)) for name in view.tensors
        }
        changed = [name for name, new in copy.names.items() if name != new]
        copy.told.append(f"{len(changed)} tensors renamed, first {changed[0]} to {copy.names[changed[0]]}")
    heads = bool(codes & {"stray head", "copied head"})
    others = bool(codes & {"unknown tensor", "unknown bias"})
    wanted = expected(view.config) or (view.base.tensors if view.base else view.tensors)
    for name, new in copy.names.items():
        if heads if str(new).endswith("lm_head.weight") else others and new not in wanted:
            copy.names[name] = None
            copy.told.append(f"{name} left out")
    copy.json["config.json"] = _config(view, codes, copy.told)
    _tokens(view, codes, copy)
    return copy


def _config(view: Folder, codes: set[str], told: list[str]) -> dict[str, Any]:
    config = dict(view.config)
    if codes & _CONFIG and view.base is not None:
        config = dict(view.base.config)
        rows = [t.shape[0] for n, t in view.tensors.items() if n.endswith("embed_tokens.weight")]
        if rows and "text_config" not in config:
            config["vocab_size"] = rows[0]
        told.append("config.json: the base's")
    if codes & _QUANTIZATION:
        config = without_quantization(config)
        told.append("config.json: quantization_config left out")
    stored: Counter[str] = Counter()
    for tensor in view.tensors.values():
        if tensor.dtype in FLOATS:
            stored[tensor.dtype] += tensor.end - tensor.start
    main = _DTYPES[stored.most_common(1)[0][0]] if stored else None
    for key in {"dtype", "torch_dtype"} & config.keys():
        if main and str(config[key]).removeprefix("torch.") != main:
            config[key] = main
            told.append(f"config.json: {key} {main}, as stored")
    if codes & {"rope of version 5", "rope differs, version 4"}:
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = {**text, **version_4_rope(text)}
        else:
            config.update(version_4_rope(config))
        told.append("config.json: rope settings also in the keys of transformers 4")
    return config


def _tokens(view: Folder, codes: set[str], copy: _Copy) -> None:
    """tokenizer_config.json and generation_config.json; with faults of the tokenizer, both are the base's."""
    home = view.base if codes & _TOKENIZER and view.base is not None else view
    settings = home.json("tokenizer_config.json")
    if "tokenizer of version 5" in codes:
        settings = version_4_tokenizer(settings)
        copy.told.append("tokenizer_config.json: in words that both generations of transformers read")
    if settings:
        copy.json["tokenizer_config.json"] = settings
    if home is not view:
        copy.told.append("tokenizer: the base's")
    if not any(code.startswith("end ") or code in _TOKENIZER for code in codes):
        return
    generation = home.json("generation_config.json")
    table = token_table(home)
    end = turn_end(home, table)
    end = table.id_of("eos_token") if end is None else end
    stated = generation.get("eos_token_id")
    ends = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if end is not None and end not in ends:
        ends = [end, *ends] if ends else [end]
    if ends:
        copy.json["generation_config.json"] = {
            **generation,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
        }
        copy.told.append(f"generation_config.json: eos_token_id {ends}")


def _write_weights(view: Folder, copy: _Copy, staging: Path) -> None:
    """Shard by shard, bytes copied by the kernel; only headers are new."""
    weight_map: dict[str, str] = {}
    total = 0
    for file, header in view.headers.items():
        kept = {new: header[name] for name in header if (new := copy.names[name]) is not None}
        if not kept:
            continue
        _write_shard(staging / file, kept)
        weight_map.update(dict.fromkeys(kept, file))
        total += sum(tensor.end - tensor.start for tensor in kept.values())
    if not weight_map:
        raise ExportError(f"{view.path} holds no tensor", fix="give the folder of a model")
    if set(weight_map.values()) != {SINGLE}:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        copy.told += ["index written anew"] if view.weight_map != weight_map else []


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    ordered = sorted(tensors.items(), key=lambda item: item[1].start)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in ordered:
        size = tensor.end - tensor.start
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with ordered[0][1].file.open("rb") as reading, path.open("xb") as writing:
        at = write_all(writing.fileno(), struct.pack("<Q", len(text)) + text, 0)
        for _, tensor in ordered:
            copy_bytes(reading.fileno(), writing.fileno(), tensor.start, tensor.end - tensor.start, at)
            at += tensor.end - tensor.start


def _write_files(view: Folder, copy: _Copy, staging: Path, codes: set[str]) -> None:
    """The folder's small files, those it lacks from the base, and the JSON files that were put right."""
    from_base = bool(codes & _TOKENIZER) and view.base is not None
    replaced: Callable[[Path], bool] = lambda name: from_base and str(name) in _TOKENIZER_FILES  # noqa: E731
    copied, left = small_files(view.path)
    used = {*view.headers, INDEX}
    copy.told += [f"{name} left out" for name in left if str(name) not in used]
    own = [n for n in copied if str(n) not in copy.json and not replaced(n)]
    copy_into(view.path, own, staging)
    if view.base is not None:
        have = {*map(str, own), *copy.json}
        missing = [name for name in small_files(view.base.path)[0] if str(name) not in have]
        copy_into(view.base.path, missing, staging)
        copy.told += [f"{name}: the base's" for name in missing if not replaced(name)]
    for name, content in copy.json.items():
        (staging / name).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
