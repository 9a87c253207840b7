"""The names of the export formats, and what to do instead of the ones that are asked for and not there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

QUANTISED = ("w4a16", "w8a8", "fp8")
FORMATS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", *QUANTISED, "adapter", "lora")

_BITSANDBYTES = (
    "a bitsandbytes checkpoint, which is called merged_4bit here: vLLM reads it only with vllm-bnb-plugin",
    "use w4a16: 4 bit, read by vLLM itself and by transformers",
)
_CALIBRATED = ("made with calibration data, which is not there", "use w4a16, which needs none")
_GGUF = ("GGUF, which is not there", "export merged_16bit, then llama.cpp's convert_hf_to_gguf.py DIR")
_GPU_ONLY = ("read on GPUs only and not proven here", "use fp8 or w4a16")
# what is asked for -> (what it is, what to use)
_ANSWERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "bnb-4bit": _BITSANDBYTES,
        "bitsandbytes": _BITSANDBYTES, "nf4": _BITSANDBYTES, "gptq": _CALIBRATED, "awq": _CALIBRATED,
        "gguf": _GGUF, "q8_0": _GGUF, "q4_k_m": _GGUF, "nvfp4": _GPU_ONLY, "mxfp4": _GPU_ONLY,
    }
)  # fmt: skip


def unknown_format(asked: str) -> tuple[str, str]:
    """What a name that is no format means, and the way out: for an error's message and its fix."""
    listed = f"choose one of {', '.join(FORMATS)}"
    answer = _ANSWERS.get(asked.lower().replace("_", "-"), _ANSWERS.get(asked.lower()))
    if answer is None:
        return f"the format {asked!r} is not known", listed
    return f"the format {asked!r} is {answer[0]}", f"{answer[1]}; or {listed}"
