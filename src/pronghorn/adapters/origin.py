"""Where a model in memory came from: kept on the instance, so that saving and exporting never guess."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_ATTRIBUTE = "_pronghorn_origin"
SAMPLED_VALUES = 64


@dataclass
class Origin:
    """The base files a model instance was loaded from, and how it was loaded.

    ``fingerprint`` is that of the weight files; ``tokenizer_limit`` the tokenizer's own model_max_length;
    ``rows`` the embedding rows at load; ``seed``, ``recompute``, ``mlp_tile_tokens`` for a later adapter;
    ``samples`` a few values of every weight at load; ``quantised`` the file tensors held in ``quantization``,
    ``quantised_dtype`` what they decode to; ``report`` the LoadReport.
    """

    name: str
    path: Path
    revision: str | None
    fingerprint: str
    max_seq_length: int | None
    tokenizer: Any = None
    tokenizer_print: str = ""
    tokenizer_folder: Path | None = None
    tokenizer_limit: int | None = None
    seed: int = 3407
    recompute: bool | str = False
    mlp_tile_tokens: int | None = None
    rows: int | None = None
    samples: dict[str, str] = field(default_factory=dict)
    quantization: str | None = None
    quantised: tuple[str, ...] = ()
    quantised_dtype: str | None = None
    report: Any = None


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel; a plain model as it is."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def remember(model: Any, origin: Origin) -> None:
    """Keep ``origin`` on the instance (on the transformers model, so that wrapping does not lose it)."""
    setattr(base_of(model), _ATTRIBUTE, origin)


def origin_of(model: Any) -> Origin | None:
    """The origin of a model loaded here; None for a model loaded by other means."""
    found = getattr(base_of(model), _ATTRIBUTE, None)
    return found if isinstance(found, Origin) else None


def sample_weights(model: Any) -> dict[str, str]:
    """A hash of a few values of every base weight: shows a change made in memory, in milliseconds."""
    return {
        name: _sample(parameter)
        for key, parameter in model.named_parameters()
        if (name := _base_name(key)) is not None
    }


def changed_weights(model: Any, origin: Origin) -> list[str]:
    """Names of base weights whose sampled values differ from those at load, resized embeddings left out."""
    now = sample_weights(model)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    resized = {
        _base_name(key)
        for key, parameter in model.named_parameters()
        if origin.rows is not None
        and any(end is not None and getattr(end, "weight", None) is parameter for end in ends)
        and parameter.shape[0] != origin.rows
    }
    return sorted(
        name for name, seen in origin.samples.items() if name not in resized and now.get(name) != seen
    )


def _base_name(key: str) -> str | None:
    """The name of a base weight without what PEFT put around it; None for an adapter's own tensor."""
    parts = key.removeprefix("base_model.model.").split(".")
    if any(part.startswith("lora_") or part in ("modules_to_save", "token_adapter") for part in parts):
        return None
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _sample(parameter: torch.Tensor) -> str:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED_VALUES)
    values = flat[::step][: SAMPLED_VALUES + 1].float().cpu()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
