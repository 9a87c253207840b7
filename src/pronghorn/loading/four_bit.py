"""Load a base in NF4: 16-bit files are quantised while they are read, 4-bit files are taken as they are.

transformers' own loader puts the tensors into bitsandbytes' modules; it is handed the packed tensors as if
they had been read from a 4-bit folder, so both ways end in the same model. At no time is more than one
16-bit weight in memory beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pronghorn.errors import ConfigError, NotSupportedError, SourceError
from pronghorn.quant import nf4
from pronghorn.quant.choose import STORED, Choice, choose
from pronghorn.quant.library import bitsandbytes, guard_gradients, linears_4bit
from pronghorn.quant.stored import stored_4bit
from pronghorn.sources.bounds import CONFIG_KEY
from pronghorn.sources.source import Source
from pronghorn.weights import keymap
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.reader import read_tensor


@dataclass(frozen=True)
class Plan:
    """How a base is to be loaded: ``stored``: its 4-bit weights; ``encode``: what to quantise to."""

    weights: WeightFolder
    stored: Mapping[str, Any]
    encode: str | None

    @property
    def quantised(self) -> str | None:
        """What the model will be in: "nf4", "int8" or 16-bit (None)."""
        return "nf4" if self.stored else self.encode


def plan_load(source: Source, asked: str | None) -> Plan:
    """Hold a request ("nf4", "int8", "none" or None) against the content of a base folder; nothing is loaded.

    Raises:
        SourceError: the folder contradicts itself, or parts of its 4-bit weights are missing or do not fit.
        ConfigError: the request contradicts the folder.
        MissingDependencyError: bitsandbytes is needed and not installed.
    """
    weights = open_weights(source.path)
    stored = stored_4bit(source.config, weights)
    if stored and asked in ("none", "int8"):
        wanted = "16-bit" if asked == "none" else "8-bit"
        raise ConfigError(
            f"{wanted} weights were asked for, but {source.name} holds {len(stored)} weights in NF4",
            fix="give the 16-bit model, or leave quantization (load_in_16bit, load_in_8bit) out",
        )
    plan = Plan(weights, stored, asked if asked in ("nf4", "int8") and not stored else None)
    if plan.quantised:
        bitsandbytes()
    return plan


def load_encoded(
    source: Source, plan: Plan, config: Any, blank: Any, dtype: torch.dtype, device_map: Any
) -> tuple[Any, dict[str, Any], Choice]:
    """Load 16-bit files in NF4.

    Args:
        source: the base.
        plan: from ``plan_load``.
        config: its transformers config.
        blank: the same model on the meta device.
        dtype: what the weights decode to, and what everything else is held in.
        device_map: as for transformers' from_pretrained.

    Returns:
        The model, the loader's own account of the keys, and what was chosen.

    Raises:
        SourceError: no module of the model can be quantised.
    """
    choice = choose(blank, plan.weights.tensors)
    if not choice.files:
        reasons = ", ".join(sorted(set(choice.left.values()))) or "it has no linear modules"
        raise SourceError(
            f"{source.name} was asked for in 4-bit, but none of its modules can be quantised ({reasons})",
            fix="load it in 16-bit",
        )
    config = copy.deepcopy(config)
    setattr(config, CONFIG_KEY, _settings(choice, dtype))
    tensors = _encoded(plan.weights, frozenset(choice.files.values()), dtype, _place(device_map))
    model, info = type(blank).from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, device_map=device_map, output_loading_info=True
    )
    return model, info, choice


def settle(source: Source, model: Any, wanted: frozenset[str]) -> None:
    """Prove that exactly the wanted modules are in 4-bit, and keep them on the path that has gradients.

    Raises:
        SourceError: a module that should be in 4-bit is not, or the other way round.
        NotSupportedError: a weight that bitsandbytes decodes wrongly on a CPU.
    """
    found = dict(linears_4bit(model))
    odd = sorted(wanted.symmetric_difference(found))
    if odd:
        raise SourceError(
            f"{source.name}: {len(odd)} modules are not as their files say (4-bit or 16-bit), first {odd[0]}",
            fix="check quantization_config in config.json (llm_int8_skip_modules)",
        )
    for name, module in found.items():
        if module.weight.device.type == "cpu" and module.in_features % module.weight.quant_state.blocksize:
            raise NotSupportedError(
                f"{source.name}: {name} has a width of {module.in_features}, no multiple of its block size "
                f"{module.weight.quant_state.blocksize}: bitsandbytes decodes it wrongly on a CPU",
                fix="use the 16-bit model with load_in_4bit, which leaves this module in 16-bit, or a GPU",
            )
    guard_gradients(model)


def hold_the_rest(model: Any, dtype: torch.dtype) -> None:
    """Bring what a 4-bit folder stores in 16 bit to the dtype that was asked for.

    transformers 5.17 leaves the tensors that it renames or stacks (routers, experts) as the files have them,
    and their products with the rest then fail. What it keeps in float32 on purpose stays.
    """
    for parameter in model.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16) and parameter.dtype is not dtype:
            parameter.data = parameter.data.to(dtype)


def stored_modules(model: Any, plan: Plan) -> dict[str, str]:
    """Module name -> file tensor for every 4-bit weight of a 4-bit folder."""
    found = {}
    for name in plan.stored:
        inside = (one for one in keymap.model_names(name) if _has(model, one.removesuffix(".weight")))
        found[next(inside, name).removesuffix(".weight")] = name
    return found


def left_of_stored(model: Any, plan: Plan) -> dict[str, str]:
    """Linear modules of a loaded 4-bit folder that are not in 4-bit, with reasons."""
    names = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    return {**dict.fromkeys(names, STORED), **choose(model, plan.weights.tensors).left}


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _settings(choice: Choice, dtype: torch.dtype) -> dict[str, Any]:
    found: dict[str, Any] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=choice.skipped,
    ).to_dict()
    return found


def _encoded(
    weights: WeightFolder, chosen: frozenset[str], dtype: torch.dtype, device: str | None
) -> dict[str, torch.Tensor]:
    """All tensors of the folder, the chosen ones packed one after the other.

    Raises:
        SourceError: one to be packed holds NaN or infinity, in ``dtype``.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, (shard, entry) in weights.tensors.items():
        tensor = read_tensor(shard, entry)
        if name in chosen:
            try:
                packed = nf4.encode(tensor.to(device=device, dtype=dtype))
            except ValueError as error:
                raise SourceError(
                    f"{name} in {shard.path} holds NaN or infinity in {dtype}",
                    fix="copy or download the base again, or load it in bfloat16",
                ) from error
            tensors |= nf4.stored_tensors(packed, name)
        else:
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


def _place(device_map: Any) -> str | None:
    """The one device of a map, where packing is done; else the CPU."""
    found = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    only = found.pop() if len(found) == 1 else None
    return (
        None
        if only is None or only in ("auto", "balanced", "balanced_low_0", "sequential", "disk")
        else str(only)
    )
