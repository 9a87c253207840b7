"""Attention for batches without padding or packing, when tensors have shapes and no numbers.

transformers looks at numbers to see that a batch needs no mask. Without numbers it makes one, which costs
more memory than the run will take. Under the names registered here it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pronghorn.attention import interface

_NAMES = {name: f"{name}_unmasked" for name in ("sdpa", interface.NAME)}


def _mask(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The mask of sdpa, left out wherever the form of attention alone allows it."""
    del allow_is_causal_skip
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, allow_is_causal_skip=True, **kwargs)
    return made


@contextmanager
def unmasked(model: Any) -> Iterator[None]:
    """Inside the block the batches of ``model`` are neither padded nor packed."""
    for name, other in _NAMES.items():
        if other not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(other, ALL_ATTENTION_FUNCTIONS[name])
            AttentionMaskInterface.register(other, _mask)
    configs = {
        id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None
    }
    before = [(config, config._attn_implementation) for config in configs.values() if _switched(config)]
    for config, name in before:
        config._attn_implementation = _NAMES[name]
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _switched(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) in _NAMES
