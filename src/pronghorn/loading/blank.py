"""A base as shapes only: what loading would give, from config.json and the headers of the weight files.

On the meta device first, so that PEFT can attach an adapter; ``as_fake`` then turns its tensors into fake
ones, which claim to be on a CPU: operations on them compute shapes, dtypes and storages, and nothing else.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.loading.four_bit import plan_load
from pronghorn.loading.options import LoadOptions
from pronghorn.loading.strict import common_arguments, keep_soft_cap, load_blank, load_errors, read_config
from pronghorn.memory.shapes_only import ShapesOnly
from pronghorn.quant.choose import choose
from pronghorn.quant.library import blank_linear_4bit, blank_packed, is_linear_4bit
from pronghorn.sources.bounds import CONFIG_KEY
from pronghorn.sources.source import Source
from pronghorn.weights import keymap


@dataclass(frozen=True)
class Blank:
    """A transformers model on the meta device, and what of it would be held in 4-bit."""

    model: Any
    quantised: tuple[str, ...]
    file_bytes: int


def blank_base(source: Source, options: LoadOptions) -> Blank:
    """Build the base of a source on the meta device.

    Raises:
        SourceError: config.json and the headers of the weight files do not describe one model.
        ConfigError: a quantization that contradicts the folder.
        NotSupportedError: the model is no causal language model.
    """
    plan = plan_load(source, options.quantization)
    if plan.encode == "int8":
        raise NotSupportedError(
            "what a run on a base in 8-bit takes is not predicted", fix="plan it in NF4 or in 16-bit"
        )
    common = common_arguments(options.trust_remote_code)
    config = read_config(source, common, quantised=plan.quantised is not None)
    if plan.stored:
        model = _from_config(source, config, options)
        names = [model_name for name in plan.stored if (model_name := _module_of(model, name))]
    else:
        model = load_blank(source, config, options.torch_dtype(), common)
        names = list(choose(model, plan.weights.tensors).files) if plan.encode else []
    if plan.encode and not names:
        raise SourceError(
            f"{source.name} was asked for in 4-bit, but none of its modules can be quantised",
            fix="load it in 16-bit",
        )
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], blank_linear_4bit(model.get_submodule(name), model.dtype))
    if names:
        model.is_loaded_in_4bit = True
    keep_soft_cap(model)
    return Blank(model, tuple(names), plan.weights.nbytes)


def _from_config(source: Source, config: Any, options: LoadOptions) -> Any:
    config = copy.deepcopy(config)
    with suppress(AttributeError):
        delattr(config, CONFIG_KEY)
    dtype = options.torch_dtype()
    held = getattr(config, "dtype", None) or torch.bfloat16 if isinstance(dtype, str) else dtype
    with load_errors(source), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=held, trust_remote_code=options.trust_remote_code
        )


def _module_of(model: Any, name: str) -> str | None:
    """The module of a model whose weight a file calls ``name``."""
    for one in keymap.model_names(name):
        with suppress(AttributeError):
            model.get_submodule(one.removesuffix(".weight"))
            return one.removesuffix(".weight")
    return None


def as_fake(model: nn.Module, mode: ShapesOnly) -> None:
    """Replace every parameter and buffer by a fake one on the CPU; what is shared stays shared."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    packed = name == "weight" and is_linear_4bit(module)
                    made.setdefault(id(parameter), (_fake(parameter, packed), parameter))
                    module._parameters[name] = made[id(parameter)][0]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            # models also keep plain tensors: rotary frequencies as they were before scaling, for example
            for name, value in list(vars(module).items()):
                if isinstance(value, torch.Tensor):
                    setattr(module, name, torch.empty(value.shape, dtype=value.dtype))


def _fake(parameter: nn.Parameter, packed: bool) -> nn.Parameter:
    if packed:
        return blank_packed(parameter)
    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)
