"""The boundary to bitsandbytes: the one module that imports it.

Loading a 4-bit model needs the library; reading, writing and merging 4-bit files does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from pronghorn.errors import MissingDependencyError
from pronghorn.ops.graph import is_fake
from pronghorn.ops.packed import BLOCK, NESTED_BLOCK, Packed, Scales

# bitsandbytes tells here, at import, that an optional kernel of its own is not installed
_NOISY_LOGGER = "bitsandbytes.backends.cpu.ops"


def bitsandbytes() -> ModuleType:
    """The library, imported without its note about an optional kernel.

    Raises:
        MissingDependencyError: it is not installed, or cannot be imported here.
    """
    noisy = logging.getLogger(_NOISY_LOGGER)
    before = noisy.disabled
    noisy.disabled = True
    try:
        import bitsandbytes as library
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingDependencyError(
            f"a model in 4-bit needs bitsandbytes, which cannot be imported: {error}",
            fix="pip install 'pronghorn[qlora]', or load in 16-bit",
        ) from error
    finally:
        noisy.disabled = before
    module: ModuleType = library
    return module


def is_linear_4bit(module: Any) -> bool:
    """Whether a module is bitsandbytes' own 4-bit linear layer (not PEFT's wrapper of the same name)."""
    return any(
        one.__name__ == "Linear4bit" and one.__module__.startswith("bitsandbytes.")
        for one in type(module).__mro__
    )


def linears_4bit(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Every 4-bit linear layer of a model, by name."""
    for name, module in model.named_modules():
        if is_linear_4bit(module):
            yield name, module


def guard_gradients(model: torch.nn.Module) -> int:
    """Keep every 4-bit layer on the path that has gradients; returns how many layers there are.

    On a CPU with AVX512-bf16 the first forward in evaluation mode repacks the weights for a kernel without
    autograd; later LoRA gradients are then 0 or wrong, with a loss that looks normal.
    """
    count = 0
    for _, module in linears_4bit(model):
        module.support_avx512bf16_for_cpu = False
        count += 1
    return count


def packed_of(module: Any) -> Packed | str:
    """The weight of a 4-bit layer as what it is made of, or why it cannot be told."""
    weight, state = module.weight, module.weight.quant_state
    if state is None:
        return "its weight is not packed yet"
    if state.quant_type != "nf4":
        return f"its weight is {state.quant_type}"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight is repacked for inference on this processor"
    if weight.dtype != torch.uint8:
        return f"its weight is stored as {weight.dtype}"
    if tuple(state.shape) != (module.out_features, module.in_features):
        return f"its weight is held as {list(state.shape)}"
    nested = state.state2 if state.nested else None
    scales = Scales(
        state.absmax,
        None if nested is None else nested.absmax,
        0.0 if nested is None or is_fake(state.offset) else float(state.offset),
        state.blocksize,
        NESTED_BLOCK if nested is None else nested.blocksize,
        None if nested is None else nested.code,
    )
    # shares memory and version counter with the parameter
    codes = weight.detach()
    codes = codes if is_fake(codes) else codes.as_subclass(torch.Tensor)
    return Packed(codes, scales, tuple(state.shape), state.dtype)


def compute_in(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make every 4-bit layer decode to ``dtype`` and compute in it (float64 is beyond the library)."""
    for _, module in linears_4bit(model):
        module.compute_dtype, module.compute_type_is_set = dtype, True
        module.weight.quant_state.dtype = dtype


@contextmanager
def as_plain(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block every 4-bit layer below ``model`` is an ``nn.Linear`` of what it decodes to."""
    found = list(linears_4bit(model))
    for name, module in found:
        rows, width = module.weight.quant_state.shape
        plain = torch.nn.Linear(width, rows, bias=False, device="meta")
        decoded = decode_weight(module.weight).to(dtype)
        plain.weight = torch.nn.Parameter(decoded, requires_grad=False)
        plain.bias = module.bias
        _put(model, name, plain.train(module.training))
    try:
        yield
    finally:
        for name, module in found:
            _put(model, name, module)


def _put(model: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent)._modules[child] = module


def decode_weight(weight: Any, out: torch.Tensor | None = None) -> torch.Tensor:
    """Decode the weight of a 4-bit layer with the library's kernel, into ``out`` if one is given."""
    found: torch.Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    return found if out is None else out.copy_(found)


def state_tensors(module: Any) -> Iterator[torch.Tensor]:
    """The tensors of a 4-bit layer that are no parameters: magnitudes, their magnitudes, tables."""
    state = module.weight.quant_state
    for one in (state, getattr(state, "state2", None)):
        if one is not None:
            yield from (tensor for tensor in (one.absmax, one.code) if isinstance(tensor, torch.Tensor))
    if isinstance(state.offset, torch.Tensor):
        yield state.offset


def blank_linear_4bit(linear: torch.nn.Linear, dtype: torch.dtype) -> Any:
    """The 4-bit layer that ``linear`` (on the meta device) becomes when its weight is quantised to NF4."""
    layer = bitsandbytes().nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False
    return layer


def blank_packed(blank: Any) -> torch.nn.Parameter:
    """The packed weight of a ``blank_linear_4bit`` with its quantisation state, all of it empty."""
    blocks = -(-blank.numel() // BLOCK)
    state = bitsandbytes().functional.QuantState
    nested = state(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
        blocksize=NESTED_BLOCK,
        code=torch.empty(256),
        dtype=torch.float32,
    )
    data = torch.empty(((blank.numel() + 1) // 2, 1), dtype=torch.uint8)
    packed: Any = torch.nn.Parameter(data, requires_grad=False)
    packed.quant_state = state(
        absmax=torch.empty(blocks, dtype=torch.uint8),
        shape=torch.Size(blank.shape),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=blank.dtype,
        offset=torch.empty(()),
        state2=nested,
    )
    for name in ("compress_statistics", "quant_type", "quant_storage", "blocksize"):
        setattr(packed, name, getattr(blank, name, None))
    found: torch.nn.Parameter = packed
    return found
