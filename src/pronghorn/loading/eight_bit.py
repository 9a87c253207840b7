"""Load a 16-bit base in 8-bit (LLM.int8): bitsandbytes quantises, row by row, while transformers reads."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from pronghorn.errors import SourceError
from pronghorn.quant.choose import Choice, choose
from pronghorn.quant.library import linears_8bit
from pronghorn.sources.source import Source
from pronghorn.weights.folder import WeightFolder


def load_int8(
    source: Source, weights: WeightFolder, blank: Any, dtype: torch.dtype, device_map: Any
) -> tuple[Any, dict[str, Any], Choice]:
    """The model, the loader's own account of the keys, and what was chosen; ``blank`` is it on meta.

    Raises:
        SourceError: no module of the model can be quantised, or others than those chosen were.
    """
    choice = choose(blank, weights.tensors, block=1)
    if not choice.files:
        raise SourceError(
            f"{source.name} was asked for in 8-bit, but none of its modules can be quantised",
            fix="load it in 16-bit",
        )
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=choice.skipped)
    model, info = type(blank).from_pretrained(
        source.path,
        dtype=dtype,
        device_map=device_map,
        quantization_config=settings,
        local_files_only=True,
        output_loading_info=True,
    )
    odd = sorted(choice.files.keys() ^ dict(linears_8bit(model)).keys())
    if odd:
        raise SourceError(
            f"{source.name}: {len(odd)} modules are not in 8-bit as they should be, or the other way round, "
            f"first {odd[0]}",
            fix="load it in 16-bit or in NF4",
        )
    return model, info, choice
