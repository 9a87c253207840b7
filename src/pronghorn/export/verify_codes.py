"""Quantised folders in the layouts of compressed-tensors: are all parts there, and what do the codes mean?

Headers and config only, without torch; ``verify_decode`` reads the codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pronghorn.export.verify_folder import (
    FLOATS,
    Fault,
    Finding,
    Folder,
    Tensor,
    promise,
    quantization,
    verdict,
)

_LAYOUTS = {
    "pack-quantized": (4, "int"), "nvfp4-pack-quantized": (4, "float"),
    "int-quantized": (8, "int"), "float-quantized": (8, "float"),
}  # fmt: skip
_CODES = {(4, "int"): "I32", (4, "float"): "U8", (8, "int"): "I8", (8, "float"): "F8_E4M3"}
_GROUPED = ("group", "tensor_group")
_PER_CODE = {"I32": 8, "U8": 2}  # weights in one element
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale", "weight")
_WITHOUT = {
    "weight_shape": "transformers fails",
    "weight_global_scale": "engines read scales that are too large",
}
# what lies beside the language model in a multimodal folder, from the tower's own name on
TOWER = re.compile(r"(?:^|\.)((?:vision|visual|audio|image|multi_modal_projector).*)")
# where engines' names for towers differ from each other's, as the real ones have shown
_RENAMED = ("vision_tower.", "visual.", "multi_modal_projector.")


@dataclass(frozen=True)
class Coded:
    """A quantised weight: ``shape`` [out, in] of the weight, its codes and scales, bits and kind.

    ``divisor``: what NVFP4's scales are divided by.
    """

    shape: tuple[int, ...]
    codes: Tensor
    scale: Tensor
    bits: int
    kind: str
    divisor: Tensor | None = None


def settings(folder: Folder) -> dict[str, Any]:
    """The quantization_config of a compressed-tensors folder; ``{}`` for any other folder."""
    found = quantization(folder.config)
    return found if found.get("quant_method") == "compressed-tensors" else {}


def foreign(folder: Folder) -> str:
    """What of a compressed-tensors folder no code here reads, in words; "" where there is nothing.

    Read are symmetric codes with a scale per group or row, and inputs quantised while computing.
    """
    config = settings(folder)
    layout = str(config.get("format"))
    if not config:
        return ""
    if layout not in _LAYOUTS:
        return f"the layout {layout!r}"
    bits, kind = _LAYOUTS[layout]
    groups = _groups(config)
    read: dict[str, tuple[Any, ...]] = {
        "num_bits": (bits,),
        "type": (kind,),
        "strategy": ("tensor_group",) if (bits, kind) == (4, "float") else ("channel", "group"),
        "symmetric": (True, None),
        "actorder": (None, False, "static", "weight"),
        "group_size": tuple(_part(one, "weights").get("group_size") for one in groups[:1]),
    }
    for group in groups:
        for key, known in read.items():
            if (value := _part(group, "weights").get(key)) not in known:
                return f"{key} {value!r} in the layout {layout!r}"
        if (inputs := _part(group, "input_activations")) and inputs.get("dynamic") is not True:
            return f"a stored scale of inputs in the layout {layout!r}"
    return ""


def _part(group: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = group.get(name)
    return found if isinstance(found, dict) else {}


def _groups(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = config.get("config_groups")
    return [one for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []


def is_calibrated(folder: Folder) -> bool:
    """Whether GPTQ chose the codes: it states in which order of columns, and nothing else does."""
    return any(_part(group, "weights").get("actorder") for group in _groups(settings(folder)))


def coded(folder: Folder) -> dict[str, Coded]:
    """Weight name -> its parts, for every weight of the folder that is stored as codes with scales.

    Empty for what is ``foreign``.
    """
    found: dict[str, Coded] = {}
    if not settings(folder) or foreign(folder):
        return found
    bits, kind = _LAYOUTS[str(settings(folder)["format"])]
    for name, scale in folder.tensors.items():
        if not name.endswith(".weight_scale"):
            continue
        module = name.removesuffix("weight_scale")
        codes = folder.tensors.get(module + ("weight_packed" if bits == 4 else "weight"))
        if codes is not None and len(codes.shape) == 2:
            shape = (codes.shape[0], codes.shape[1] * _PER_CODE.get(codes.dtype, 1))
            divisor = folder.tensors.get(module + "weight_global_scale")
            found[f"{module}weight"] = Coded(shape, codes, scale, bits, kind, divisor)
    return found


def plain_tensors(folder: Folder) -> Mapping[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every weight by its name before quantisation.

    A coded one has its scales' dtype, or that of the weights beside it where scales are FP8.
    """
    weights = coded(folder)
    parts = {name.removesuffix("weight") + part for name in weights for part in _PARTS}
    plain = {n: (tensor.shape, tensor.dtype) for n, tensor in folder.tensors.items() if n not in parts}
    beside = next((dtype for shape, dtype in plain.values() if len(shape) > 1), "BF16")
    for name, one in weights.items():
        plain[name] = one.shape, one.scale.dtype if one.scale.dtype in FLOATS else beside
    return plain


@promise("every quantised weight has all its parts")
def codes_complete(folder: Folder) -> Finding:
    """Codes, scales and shapes are there and fit; config.json says what both engines need to read them.

    A missing scale loads as NaN in vLLM without a word, and transformers reads a folder without
    quantization_status, or with the key compression_config, as garbage.
    """
    config = settings(folder)
    if "compression_config" in folder.config:
        return False, "config.json says compression_config, which transformers ignores in silence"
    if not config:
        return True, "not in a layout of compressed-tensors"
    if unknown := foreign(folder):
        return None, f"{unknown} is not known here"
    layout = _LAYOUTS[str(config["format"])]
    problems: list[str | Fault] = []
    if config.get("quantization_status") != "compressed":
        problems.append(
            "quantization_config has no quantization_status 'compressed': transformers reads garbage"
        )
    problems += _part_problems(folder, layout)
    problems += _shape_problems(folder, config)
    heads = [name for name in folder.tensors if name.endswith("lm_head.weight")]
    if heads and not any("lm_head" in str(name) for name in config.get("ignore") or ()):
        problems.append("lm_head is in 16 bit and not in quantization_config's ignore: transformers fails")
    problems += _tower_faults(folder, config, layout[0])
    return verdict(problems, f"{len(coded(folder))} weights of {layout[0]} bits, {config.get('format')}")


def _tower_faults(folder: Folder, config: Mapping[str, Any], bits: int) -> Iterable[Fault]:
    """Linear layers in 16 bit that an engine takes for quantised: ``ignore`` lacks its name for them.

    vLLM calls a tower as files on the hub do, and exchanges the prefix of plain names, not of patterns.
    transformers 5 has one level less in SigLIP towers. A tower that neither is known to rename may also be
    called as in the files.
    """
    if not any("Linear" in (group.get("targets") or ()) for group in _groups(config)):
        return
    ignore = [str(entry) for entry in config.get("ignore") or ()]
    missed: dict[str, str] = {}
    for name, tensor in folder.tensors.items():
        match = TOWER.search(name.removesuffix(".weight"))
        linear = name.endswith(".weight") and "embed" not in name and len(tensor.shape) == 2
        if match is None or not linear or tensor.dtype not in FLOATS:
            continue
        module = match[1]
        if not module.startswith(_RENAMED) and _matched(name.removesuffix(".weight"), ignore):
            continue
        plain = [entry.removeprefix("model.") for entry in ignore]
        if not _matched(module, plain):
            missed.setdefault("vLLM", module)
        inside = "model." + module.replace("vision_tower.vision_model.", "vision_tower.")
        if not _matched(inside, ignore):
            missed.setdefault("transformers", inside)
    for engine, module in missed.items():
        told = f"{module} is in 16 bit and not in quantization_config's ignore by this name, {engine}'s"
        yield Fault(f"tower in {bits} bit, {engine}", told)


def _matched(module: str, ignore: Iterable[str]) -> bool:
    for entry in ignore:
        try:
            if re.match(entry[3:], module) if entry.startswith("re:") else entry == module:
                return True
        except re.error:
            continue  # matches nothing
    return False


def _part_problems(folder: Folder, layout: tuple[int, str]) -> list[str]:
    """Parts without their partners."""
    problems = []
    names = folder.tensors
    for name, tensor in names.items():
        module, _, part = name.rpartition(".")
        packed = part == "weight_packed" or (part == "weight" and tensor.dtype == _CODES[layout])
        if packed and f"{module}.weight_scale" not in names:
            problems.append(f"{module}.weight_scale is missing: vLLM would answer NaN")
        once = "weight_global_scale" if layout == (4, "float") else "weight_shape"
        if part == "weight_packed" and f"{module}.{once}" not in names:
            problems.append(f"{module}.{once} is missing: {_WITHOUT[once]}")
        if part == "weight_scale":
            codes = names.get(f"{module}.weight_packed" if layout[0] == 4 else f"{module}.weight")
            if codes is None or codes.dtype != _CODES[layout]:
                problems.append(f"{module} has scales and no codes of dtype {_CODES[layout]}")
    return problems


def _shape_problems(folder: Folder, config: Mapping[str, Any]) -> list[str]:
    groups = [_part(group, "weights") for group in _groups(config)]
    size = next(
        (weights.get("group_size") for weights in groups if weights.get("strategy") in _GROUPED), None
    )
    problems = []
    for name, one in coded(folder).items():
        columns = one.shape[1] // size if isinstance(size, int) and size > 0 else 1
        if one.scale.shape != (one.shape[0], columns):
            wanted = [one.shape[0], columns]
            problems.append(f"the scales of {name} are {list(one.scale.shape)}, expected {wanted}")
    return problems
