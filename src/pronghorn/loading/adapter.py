"""Load a saved adapter onto its base; a tensor that is missing or left over is an error, not a warning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from pronghorn.adapters.attach import peft_warnings, require_rows, seeded
from pronghorn.adapters.new_tokens import ready_rows
from pronghorn.adapters.options import check_keeps_base
from pronghorn.errors import AdapterError
from pronghorn.sources.resolve import ADAPTER_WEIGHTS
from pronghorn.sources.source import Source

_PREFIX = "base_model.model."
_SHOWN = 8


def load_adapter(model: Any, source: Source) -> PeftModel:
    """Wrap ``model`` with the adapter of ``source``, trainable again.

    An adapter that carries a resized embedding resizes the model first.

    Raises:
        AdapterError: the adapter's tensors are not exactly those its config asks for on this base.
        NotSupportedError: rows of new tokens that this PEFT cannot train.
    """
    tensors = load_file(source.path / ADAPTER_WEIGHTS, device="cpu")
    _check_finite(source.path, tensors)
    _resize(model, tensors, source.config)
    check_keeps_base(source.config.get("init_lora_weights"))
    require_rows(model, _token_rows(source.config))
    try:
        config = LoraConfig.from_pretrained(str(source.path))
        config.inference_mode = False
        with seeded(0), peft_warnings():  # every value drawn here is overwritten
            wrapped = PeftModel(model, config)
            ready_rows(wrapped)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"the adapter {source.path} does not fit its base: {error}",
            fix="check that adapter_config.json belongs to these weights, or pass base= with another base",
        ) from error
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    problems = _compare(wrapped, expected, tensors)
    if wrapped.state_dict().keys() & (tensors.keys() - expected.keys() - _carried(wrapped, tensors)):
        raise _refusal(source.path, problems)  # loading them would change the base itself
    owned = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    try:
        result = set_peft_model_state_dict(wrapped, tensors)
    except (RuntimeError, KeyError, ValueError) as error:
        raise _refusal(source.path, problems or [f"{type(error).__name__}: {error}"]) from error
    # an adapter with the names of an older transformers differs from `expected` and may still fit exactly
    missing, extra = sorted(owned & set(result.missing_keys)), sorted(result.unexpected_keys)
    if missing or extra:
        raise _refusal(source.path, problems or [*_line("missing", missing), *_line("extra", extra)])
    return wrapped


def attach_blank(model: Any, source: Source) -> PeftModel:
    """Wrap a model on the meta device with an adapter of the shape of ``source``, trainable; nothing is read.

    Raises:
        AdapterError: the adapter's config does not fit the base.
    """
    try:
        config = LoraConfig.from_pretrained(str(source.path))
        config.inference_mode = False
        with seeded(0), peft_warnings():
            return PeftModel(model, config)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise AdapterError(
            f"the adapter {source.path} does not fit its base: {error}",
            fix="check that adapter_config.json belongs to these weights, or pass base= with another base",
        ) from error


def _compare(
    model: PeftModel, expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    carried = _carried(model, tensors)
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys() - carried)
    shapes = [
        f"{name} (file {list(tensors[name].shape)}, model {list(expected[name].shape)})"
        for name in sorted(expected.keys() & tensors.keys())
        if tensors[name].shape != expected[name].shape
    ]
    return [*_line("missing", missing), *_line("extra", extra), *_line("of another shape", shapes)]


def _line(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"] if names else []


def _refusal(folder: Path, problems: list[str]) -> AdapterError:
    return AdapterError(
        f"the adapter {folder} does not hold the tensors its config asks for: {'; '.join(problems)}",
        fix="save or copy the adapter again with its adapter_config.json, and check that the base is its own",
    )


def _carried(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Whole embeddings: PEFT saves them beside the factors when they are adapted or were resized."""
    return {name for name in tensors if _is_embedding(model, name)}


def _is_embedding(model: PeftModel, name: str) -> bool:
    bare = name.removeprefix(_PREFIX).replace(".base_layer", "")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    ends += tuple(getattr(end, "base_layer", None) for end in ends)
    return any(
        module in ends and bare == f"{key.removeprefix(_PREFIX).replace('.base_layer', '')}.weight"
        for key, module in model.named_modules()
        if module is not None
    )


def _resize(model: Any, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> None:
    needed = max((max(ids) + 1 for ids in _token_rows(config).values()), default=0)
    if needed > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)  # the adapter holds every new row
    names = {id(module): name for name, module in model.named_modules()}
    name = names.get(id(model.get_input_embeddings()))
    for suffix in (".weight", ".base_layer.weight"):
        carried = tensors.get(f"{_PREFIX}{name}{suffix}")
        if carried is not None and carried.shape[0] != model.get_input_embeddings().weight.shape[0]:
            # the carried embedding overwrites every row, so none needs a sensible start
            model.resize_token_embeddings(carried.shape[0], mean_resizing=False)


def _token_rows(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Ids of the tokens whose rows an adapter trains, by module."""
    listed = config.get("trainable_token_indices")
    return listed if isinstance(listed, Mapping) else {}


def _check_finite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise AdapterError(
            f"the adapter {folder} holds NaN or infinite values: {'; '.join(_line('tensors', broken))}",
            fix="use an earlier checkpoint",
        )
