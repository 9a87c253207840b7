"""Promises about adapter folders: files, pairs of matrices, fit to the base; headers only."""

from __future__ import annotations

import re
from typing import Any

from pronghorn.export.verify_codes import TOWER, foreign, plain_tensors
from pronghorn.export.verify_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Finding,
    Folder,
    Tensor,
    UnreadableError,
    promise,
    read_header,
    verdict,
)

_PAIR = re.compile(r"^base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


def adapter_config(folder: Folder) -> dict[str, Any]:
    """adapter_config.json."""
    return folder.json(ADAPTER_CONFIG)


@promise("adapter_config.json is usable")
def adapter_config_sane(folder: Folder) -> Finding:
    """adapter_config.json describes a LoRA adapter with a rank and a scale."""
    if ADAPTER_CONFIG not in folder.names:
        return False, f"{ADAPTER_CONFIG} is missing"
    config = adapter_config(folder)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    if type(config.get("r")) is not int or not 0 < config["r"] < 2**16:
        problems.append(f"r is {config.get('r')!r}, expected a positive number")
    if not isinstance(config.get("lora_alpha"), (int, float)) or isinstance(config.get("lora_alpha"), bool):
        problems.append(f"lora_alpha is {config.get('lora_alpha')!r}, expected a number")
    return verdict(problems, f"LORA, r {config.get('r')}, lora_alpha {config.get('lora_alpha')}")


@promise("adapter weights are complete")
def adapter_complete(folder: Folder) -> Finding:
    """The adapter's weights are there, as safetensors, and exactly as long as their header says."""
    if ADAPTER_WEIGHTS not in folder.names:
        pickled = (
            " (adapter_model.bin is a pickle, which is never opened)"
            if "adapter_model.bin" in folder.names
            else ""
        )
        return False, f"{ADAPTER_WEIGHTS} is missing{pickled}"
    try:
        header = read_header(folder.path / ADAPTER_WEIGHTS)
    except UnreadableError as error:
        return False, str(error)
    return verdict([] if header else [f"{ADAPTER_WEIGHTS} holds no tensor"], f"{len(header)} tensors")


def pairs(folder: Folder) -> dict[str, dict[str, Tensor]]:
    """Module name -> its "A" and "B"; modules under PEFT's prefix only."""
    found: dict[str, dict[str, Tensor]] = {}
    for tensor, entry in read_header(folder.path / ADAPTER_WEIGHTS).items():
        if match := _PAIR.match(tensor):
            found.setdefault(match[1], {})[match[2]] = entry
    return found


def pattern_value(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    """The entry of rank_pattern or alpha_pattern for a module: the key is a regex for its last name parts."""
    for pattern, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


@promise("every module has A and B of the stated rank")
def pairs_fit(folder: Folder) -> Finding:
    """Every module has A and B, and both have the rank that adapter_config.json states."""
    config, found = adapter_config(folder), pairs(folder)
    experts = bool(config.get("target_parameters"))
    problems = [] if found else ["no LoRA pair under base_model.model"]
    for module, pair in found.items():
        if set(pair) != {"A", "B"}:
            problems.append(f"{module} has lora_{next(iter(pair))} only")
            continue
        rank = pattern_value(config, "rank_pattern", module, config.get("r"))
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            problems.append(f"{module}: A {list(a)} and B {list(b)} do not multiply")
        elif a[0] != rank and not (experts and isinstance(rank, int) and a[0] % rank == 0):
            problems.append(f"{module} has rank {a[0]}, {ADAPTER_CONFIG} says {rank}")
    return verdict(problems, f"{len(found)} modules")


@promise("every module is in the base")
def pairs_fit_base(folder: Folder) -> Finding:
    """Every adapted module is in the base, with the widths of A and B; quantised weights count decoded."""
    assert folder.base is not None
    if unknown := foreign(folder.base):
        return None, f"{unknown}, the base's, is not known here"
    shapes = {name: shape for name, (shape, _) in plain_tensors(folder.base).items()}
    base = {tail(name.removesuffix(".weight")): shape for name, shape in shapes.items()}
    known = {_kind(module) for module in base}
    problems, elsewhere, found = [], 0, pairs(folder)
    for module, pair in found.items():
        shape = base.get(tail(module))
        if shape is None and _kind(tail(module)) in known:
            problems.append(f"{module} is not in the base")
        elif shape is None or len(shape) != 2 or set(pair) != {"A", "B"}:
            elsewhere += 1
        else:
            wanted = (pair["B"].shape[0], pair["A"].shape[1])
            if wanted != shape and not _transposed(wanted, shape, module, adapter_config(folder)):
                problems.append(f"{module}: the adapter is for {list(wanted)}, the base has {list(shape)}")
    if found and elsewhere == len(found) and not any(".experts" in module for module in found):
        problems.append(f"none of its {elsewhere} modules is in the base (first: {next(iter(found))})")
    rest = f"; {elsewhere} are no plain matrix of the base files, only --deep can tell" if elsewhere else ""
    return verdict(problems, f"{len(found) - elsewhere} modules by name and widths{rest}")


def _kind(module: str) -> str:
    """A module's name without its numbers."""
    return re.sub(r"\d+", "*", module)


def tail(module: str) -> str:
    """A module's name from its layer number on: prefixes differ between file layouts of one model.

    The layers of an image or sound tower keep a prefix of their own.
    """
    match = re.search(r"(?:layers|h|blocks)\.\d+\..+$|(?:embed_tokens|wte|norm|lm_head)(?:\.\w+)?$", module)
    tower = "tower." if TOWER.search(module) else ""
    return tower + match[0] if match else module


def _transposed(wanted: tuple[int, int], shape: tuple[int, ...], module: str, config: dict[str, Any]) -> bool:
    """Embeddings are stored the other way round, and may have grown; so are GPT-2's Conv1D matrices."""
    if module.endswith(("embed_tokens", "wte")):
        return wanted[0] == shape[1] and wanted[1] >= shape[0]
    return bool(config.get("fan_in_fan_out")) and wanted[::-1] == shape
