"""The names of the export formats, and what to do instead of the ones that are asked for and not there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pronghorn.errors import ConfigError, NotSupportedError

QUANTISED = ("w4a16", "w8a8", "fp8", "nvfp4")
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
# what a whole model in 16 bit becomes, with or without an adapter merged into it first
FROM_WHOLE = ("merged_4bit", "merged_4bit_forced", *QUANTISED)
FORMATS = ("merged_16bit", *FROM_WHOLE, "adapter", "lora")

_BITSANDBYTES = (
    "a bitsandbytes checkpoint, which is called merged_4bit here: vLLM reads it only with vllm-bnb-plugin",
    "use w4a16: 4 bit, read by vLLM itself and by transformers",
)
_CALIBRATED = ("made with calibration data, which is not there", "use w4a16, which needs none")
_GGUF = ("a kind of GGUF", "write gguf-q8_0, gguf-q4_k_m and so on")
_GPU_ONLY = ("read on GPUs only and not written here", "use nvfp4, w4a16 or fp8")
# what is asked for -> (what it is, what to use)
_ANSWERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "bnb-4bit": _BITSANDBYTES,
        "bitsandbytes": _BITSANDBYTES, "nf4": _BITSANDBYTES, "gptq": _CALIBRATED, "awq": _CALIBRATED,
        "gguf": _GGUF, "q8_0": _GGUF, "q4_k_m": _GGUF, "mxfp4": _GPU_ONLY,
    }
)  # fmt: skip


# names of Unsloth's save_method -> the format that is the same
_SAME: Mapping[str, str] = MappingProxyType(
    {
        "fp8_dynamic": "fp8", "dynamic_fp8": "fp8", "w8a8_fp8": "fp8", "w8a8_int8": "w8a8",
        "int4": "w4a16", "int4_weight": "w4a16", "nvfp4a16": "nvfp4", "w4a16_nvfp4": "nvfp4",
    }
)  # fmt: skip
_W4A4 = ("nvfp4", "w4a4_nvfp4")
_METHODS = tuple("nvfp4a16" if name == "nvfp4" else name for name in FORMATS)


def format_of_method(asked: str) -> str:
    """The format that ``save_pretrained_merged(save_method=...)`` names.

    Raises:
        ConfigError: no format, or a name that elsewhere means another one.
    """
    if asked in _W4A4:
        raise ConfigError(
            f"save_method is {asked!r}: elsewhere that quantises activations to 4 bit as well (W4A4), which "
            "is not written here",
            fix='use "nvfp4a16": weights in NVFP4, activations in 16 bit',
        )
    if asked in _SAME or asked in FORMATS:
        return _SAME.get(asked, asked)
    message, fix = unknown_format(asked, _METHODS)
    raise ConfigError(f"save_method is {asked!r}: {message}", fix=fix)


def unknown_format(asked: str, formats: tuple[str, ...] = FORMATS) -> tuple[str, str]:
    """What a name that is no format means, and the way out: for an error's message and its fix."""
    listed = f"choose one of {', '.join((*formats, *_GGUF_SHOWN))}"
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
