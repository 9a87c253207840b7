"""Attention for batches that are not packed, when tensors have shapes and no numbers.

transformers looks at numbers to see whether a batch needs a mask. Without numbers it makes one, which costs
more memory than the run will take, or (4.56, for padding) fails. Under the names registered here it is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pronghorn.attention import interface

_SWITCHED = ("sdpa", interface.NAME)


def _skipping(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The mask of sdpa, left out wherever the form of attention alone allows it."""
    del allow_is_causal_skip
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, allow_is_causal_skip=True, **kwargs)
    return made


def _making(*args: Any, allow_is_causal_skip: bool = True, **kwargs: Any) -> Tensor | None:
    """The mask of sdpa, never left out."""
    del allow_is_causal_skip
    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, allow_is_causal_skip=False, **kwargs)
    return made


@cache
def _plain_rows_get_none() -> bool:
    """Whether rows that are neither padded nor packed run without a mask; in transformers 4 they have one."""
    with unset_fake_temporarily():
        return masking_utils.find_packed_sequence_indices(torch.arange(4)[None]) is None


@contextmanager
def masks_known(model: Any, *, padded: bool) -> Iterator[None]:
    """Inside the block the batches of ``model`` are not packed, and all of them or none are padded."""
    if not padded and not _plain_rows_get_none():
        yield
        return
    names = {name: f"{name}_{'padded' if padded else 'unmasked'}" for name in _SWITCHED}
    for name, other in names.items():
        if other not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(other, ALL_ATTENTION_FUNCTIONS[name])
            AttentionMaskInterface.register(other, _making if padded else _skipping)
    configs = {
        id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None
    }
    before = [(config, config._attn_implementation) for config in configs.values() if _switched(config)]
    for config, name in before:
        config._attn_implementation = names[name]
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _switched(config: Any) -> bool:
    return getattr(config, "_attn_implementation", None) in _SWITCHED
