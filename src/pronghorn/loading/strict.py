"""Load base weights so that every tensor of the model comes from the files and all of the files is used.

transformers only logs a missing tensor and fills it with random numbers; here that is an error, found on the
meta device before a byte of the weights is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils import logging as transformers_logging

from pronghorn.attention.interface import lost_cap
from pronghorn.errors import NotSupportedError, PronghornError, SourceError
from pronghorn.loading.eight_bit import load_int8
from pronghorn.loading.four_bit import (
    hold_the_rest,
    left_of_stored,
    load_encoded,
    plan_load,
    settle,
    stored_modules,
)
from pronghorn.loading.report import LoadReport, memory, report_load
from pronghorn.sources.source import Source
from pronghorn.weights.folder import open_weights

_SHOWN = 8


@dataclass(frozen=True)
class Loaded:
    """A base in memory; ``files``: the file tensors of its quantised modules by module name."""

    model: Any
    report: LoadReport
    files: Mapping[str, str]
    quantization: str | None


def load_base(
    source: Source,
    *,
    dtype: torch.dtype | str,
    device_map: Any,
    trust_remote_code: bool,
    quantization: str | None = None,
) -> Loaded:
    """Load the causal language model of a base folder, in evaluation mode.

    Raises:
        SourceError: the config builds no model, its tensors and those of the files differ, or "nf4" found
            nothing to quantise.
        ConfigError: ``quantization`` contradicts what the folder holds.
        NotSupportedError: the model is no causal language model.
    """
    plan = plan_load(source, quantization)
    before = memory()
    common = common_arguments(trust_remote_code)
    config = read_config(source, common, quantised=plan.quantised is not None)
    # 4-bit tensors cannot be put together on the meta device
    blank = None if plan.stored else load_blank(source, config, dtype, common)
    if plan.encode is not None:
        assert blank is not None
        held = blank.dtype if isinstance(dtype, str) else dtype
        with load_errors(source):
            if plan.encode == "int8":
                model, info, choice = load_int8(source, plan.weights, blank, held, device_map)
            else:
                model, info, choice = load_encoded(source, plan, config, blank, held, device_map)
        files, left = choice.files, choice.left
    else:
        model, info = _build(source, config=config, dtype=dtype, device_map=device_map, **common)
        if plan.stored and isinstance(dtype, torch.dtype):
            hold_the_rest(model, dtype)
        files, left = stored_modules(model, plan), left_of_stored(model, plan) if plan.stored else {}
    _check(source, info, model)
    settle(source, model, frozenset(files if plan.quantised == "nf4" else ()))
    attention = keep_soft_cap(model)
    return Loaded(model.eval(), report_load(model, left, before, attention), files, plan.quantised)


def keep_soft_cap(model: Any) -> str:
    """Have a model compute its soft cap where transformers' choice leaves it out; says so, or is empty."""
    if (cap := lost_cap(model)) is None:
        return ""
    model.set_attn_implementation("eager")
    return f"attention in eager: sdpa of this transformers leaves the soft cap of {cap:g} out"


def common_arguments(trust_remote_code: bool) -> dict[str, Any]:
    """What every call of transformers' loaders gets."""
    return {"local_files_only": True, "trust_remote_code": trust_remote_code}


def load_blank(source: Source, config: Any, dtype: torch.dtype | str, common: dict[str, Any]) -> Any:
    """The model of a base folder on the meta device: only headers are read.

    Raises:
        SourceError: its tensors and those of the files differ.
    """
    with _quiet():
        blank, info = _build(
            source, config=config, dtype=dtype, device_map="meta", ignore_mismatched_sizes=True, **common
        )
    _check(source, info, blank)
    return blank


def read_config(source: Source, common: dict[str, Any], *, quantised: bool) -> Any:
    """The transformers config of a base folder, which is to be held ``quantised`` or not.

    Raises:
        SourceError: transformers does not understand it.
        NotSupportedError: it is of a multimodal model without a language model, or one to be quantised.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, **common)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise SourceError(
            f"{source.path / 'config.json'} is not understood by transformers: {error}",
            fix="check the config, or upgrade transformers if the model is newer than it",
        ) from error
    images = hasattr(config, "vision_config")
    if hasattr(config, "audio_config") or (
        images and type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    ):
        raise NotSupportedError(
            f"{source.name} is a multimodal model ({config.model_type}) without a language model to train",
            fix="use a model of text, or of text and images",
        )
    if images and quantised:
        raise NotSupportedError(
            f"{source.name} is a multimodal model ({config.model_type}), which is held in 16-bit only",
            fix="leave the quantization out (load_in_4bit, load_in_8bit)",
        )
    return config


def _build(source: Source, config: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """A model with an image tower is built whole; its language model is what trains."""
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with load_errors(source):
        model, info = kind.from_pretrained(source.path, config=config, output_loading_info=True, **arguments)
    return model, info


@contextmanager
def load_errors(source: Source) -> Iterator[None]:
    """What transformers raises for a folder it cannot load, as a SourceError."""
    try:
        yield
    except (torch.OutOfMemoryError, PronghornError):
        raise
    except (
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        OSError,
        AttributeError,
        ZeroDivisionError,
    ) as error:
        raise SourceError(
            f"{source.path} cannot be loaded as a causal language model: {type(error).__name__}: {error}",
            fix="check that config.json belongs to these weights and that transformers knows the model",
        ) from error


def _check(source: Source, info: dict[str, Any], model: Any) -> None:
    """A tied head is not among the missing: transformers knows which tensors a tie provides."""
    problems = []
    for key, meaning in (
        ("missing_keys", "missing from the files"),
        ("unexpected_keys", "in the files, not in the model"),
    ):
        names = sorted(info.get(key) or ())
        if names:
            problems.append(f"{len(names)} {meaning}: {_listed(names)}")
    wrong = sorted(
        f"{name} (files {list(found)}, model {list(wanted)})"
        for name, found, wanted in _mismatches(source, info, model)
    )
    if wrong:
        problems.append(f"{len(wrong)} of another shape: {_listed(wrong)}")
    if info.get("error_msgs"):
        problems.append("; ".join(str(message) for message in info["error_msgs"]))
    if problems:
        raise SourceError(
            f"{source.path}: the weight files and config.json do not describe the same model. "
            + "; ".join(problems),
            fix="download or copy the model again, with its own config.json",
        )


def _mismatches(source: Source, info: dict[str, Any], model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name and both shapes; transformers 4 gives names only, which are those in the files."""
    for one in info.get("mismatched_keys") or ():
        if isinstance(one, str):
            _, entry = open_weights(source.path).tensors[one]
            yield one, entry.shape, model.state_dict()[one].shape
        else:
            name, found, wanted = one
            yield str(name), found, wanted


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def _quiet() -> Iterator[None]:
    """No report and no progress bar for the dry run; what it finds becomes the error."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with no_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers' progress bars off inside the block, then as they were."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
