"""What a linear (16-bit or 4-bit) or a PEFT LoRA layer would compute right now, as one ``LoraPart``.

The one place that knows PEFT's layer attributes. They are read per call, because adapters are switched,
merged, disabled and dropped out between calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pronghorn.ops.buffer import PackedWeight
from pronghorn.ops.shapes import LoraPart
from pronghorn.patching.forwards import Declined, hooked
from pronghorn.patching.places import packed_weight
from pronghorn.quant.library import is_linear_4bit


def is_adapted(module: nn.Module) -> bool:
    """Whether ``module`` is a PEFT LoRA layer around a linear."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def is_adapted_parameter(module: nn.Module) -> bool:
    """Whether ``module`` is a PEFT LoRA layer around one parameter of a module (``target_parameters``)."""
    return is_adapted(module) and hasattr(module, "parameter_name")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of an ``nn.Linear``, seen through an adapter, or None for anything else."""
    base: Any = module
    while hasattr(base, "base_layer"):
        base = base.base_layer
    return (base.in_features, base.out_features) if isinstance(base, nn.Linear) else None


def lora_part(module: nn.Module, *, training: bool = False) -> LoraPart | Declined:
    """The product ``module`` stands for in its present state, or why a ``LoraPart`` cannot express it.

    ``training`` judges it as if in train mode, whatever mode it is in.
    """
    if hooked(module):
        return Declined("a hook is registered on a linear inside")
    if not is_adapted(module):
        return _plain(module)
    layer: Any = module
    if layer.merged:
        return Declined("the adapter is merged")
    base = _plain(layer.base_layer)
    if isinstance(base, Declined) or layer.disable_adapters:
        return base
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return base
    if len(active) > 1:
        return Declined(f"{len(active)} adapters are active")
    return _with_adapter(layer, active[0], base, training or layer.training)


def _plain(module: Any) -> LoraPart | Declined:
    packed = is_linear_4bit(module)
    if type(module) is not nn.Linear and not packed:
        return Declined(f"the base layer is a {type(module).__name__}")
    if module.weight.requires_grad:
        return Declined("the base weight trains")
    if hooked(module):
        return Declined("a hook is registered on a linear inside")
    weight = packed_weight(module) if packed else module.weight
    return weight if isinstance(weight, Declined) else LoraPart(weight, module.bias, None, None, 1.0)


def _with_adapter(layer: Any, name: str, base: LoraPart, training: bool) -> LoraPart | Declined:
    if getattr(layer, "lora_variant", {}).get(name) is not None or getattr(layer, "use_dora", {}).get(name):
        return Declined("a LoRA variant (DoRA or another) is active")
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, nn.Identity) and training and getattr(dropout, "p", 1.0) > 0:
        return Declined("adapter dropout is in effect")
    a, b = layer.lora_A[name], layer.lora_B[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or hooked(a) or hooked(b):
        return Declined("the adapter is not a plain pair of linears")
    if any(getattr(factor, "bias", None) is not None for factor in (a, b)):
        return Declined("the adapter has a bias")
    return LoraPart(base.weight, base.bias, a.weight, b.weight, float(layer.scaling[name]))


def lora_parts(modules: list[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, list[LoraPart]] | Declined:
    """(``x`` in the dtype of the computation, the parts), or why the fused forms cannot take this call."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    parts = []
    for module in modules:
        part = lora_part(module)
        if isinstance(part, Declined):
            return part
        if part.weight.dtype not in (None, dtype):
            return Declined(f"the weights are {part.weight.dtype}, the computation is in {dtype}")
        if part.weight.device != x.device:
            return Declined("the weights are on another device than the input")
        if isinstance(part.weight, PackedWeight) and part.bias is not None:
            part = part._replace(bias=part.bias.to(dtype))
        parts.append(part)
    return x.to(dtype), parts


Factors = tuple[torch.Tensor, torch.Tensor, float]


def stacked_adapters(module: nn.Module) -> tuple[Any, dict[str, Factors]] | Declined:
    """The experts inside the adapters of their parameters, and the factors of each that has one in effect:
    a ``[E, r, in]``, b ``[E, out, r]``, scale.
    """
    found: dict[str, Factors] = {}
    layer: Any = module
    while is_adapted_parameter(layer):
        if layer is not module and hooked(layer):
            return Declined("a hook is registered on an adapter inside")
        if layer.merged:
            return Declined("the adapter is merged")
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) > 1:
            return Declined(f"{len(active)} adapters are active")
        if active and not layer.disable_adapters:
            if not getattr(layer, "_did_swap_in_out_features", False) and not _stored_in_out(layer):
                return Declined("this PEFT has the adapter's factors the other way round")
            a, b = (factor[active[0]].weight for factor in (layer.lora_A, layer.lora_B))
            count = int(layer.num_experts)
            factors = a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 0, 1)
            found[layer.parameter_name] = (*factors, float(layer.scaling[active[0]]))
        layer = layer.base_layer
    return (layer, found) if layer is module or not hooked(layer) else Declined("a hook is registered inside")


def _stored_in_out(layer: Any) -> bool:
    return bool(getattr(layer.get_base_layer(), "is_transposed", False))
