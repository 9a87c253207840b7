"""The names of the export formats, and what to do instead of the ones that are asked for and not there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pronghorn.errors import NotSupportedError

QUANTISED = ("w4a16", "w8a8", "fp8")
GGUF_LORA = "lora"
GGUF_PREFIX = "gguf-"
# the first four and the adapter are written here, the rest by llama.cpp's own quantiser
GGUF_KINDS = (
    "f32", "f16", "bf16", "q8_0",
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m",
    "q5_0", "q5_1", "q5_k_s", "q5_k_m",
    "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
_GGUF_SHOWN = ("gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q4_k_m", "gguf-lora")
FORMATS = ("merged_16bit", "merged_4bit", "merged_4bit_forced", *QUANTISED, "adapter", "lora")

_BITSANDBYTES = (
    "a bitsandbytes checkpoint, which is called merged_4bit here: vLLM reads it only with vllm-bnb-plugin",
    "use w4a16: 4 bit, read by vLLM itself and by transformers",
)
_CALIBRATED = ("made with calibration data, which is not there", "use w4a16, which needs none")
_GGUF = ("a kind of GGUF", "write gguf-q8_0, gguf-q4_k_m and so on")
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
    listed = f"choose one of {', '.join((*FORMATS, *_GGUF_SHOWN))}"
    answer = _ANSWERS.get(asked.lower().replace("_", "-"), _ANSWERS.get(asked.lower()))
    if answer is None:
        return f"the format {asked!r} is not known", listed
    return f"the format {asked!r} is {answer[0]}", f"{answer[1]}; or {listed}"


def gguf_kinds(name: str) -> tuple[str, ...] | None:
    """The kinds that a format such as "gguf-q8_0" or "gguf-q8_0,q4_k_m" names; None for another format.

    Raises:
        NotSupportedError: a kind that is not known, or that cannot be made without calibration data.
    """
    if not name.lower().startswith(GGUF_PREFIX):
        return None
    kinds = tuple(dict.fromkeys(kind.strip() for kind in name.lower().removeprefix(GGUF_PREFIX).split(",")))
    if kinds == (GGUF_LORA,):
        return kinds
    for kind in kinds:
        if kind in GGUF_KINDS:
            continue
        known = f"choose from {', '.join(GGUF_KINDS)}, or gguf-lora alone"
        if kind.startswith(("iq1", "iq2", "iq3")):
            raise NotSupportedError(
                f"{name}: {kind} needs an importance matrix, which is not made here", fix=known
            )
        raise NotSupportedError(f"{name}: {kind!r} is not a kind of GGUF written here", fix=known)
    return kinds
