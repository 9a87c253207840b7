"""Rotary positions as llama.cpp wants them, from both forms of config.json (transformers 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pronghorn.errors import NotSupportedError

_USE_16 = "serve the merged folder with vLLM or transformers (--format merged_16bit)"
_DEFAULT_BASE = 10000.0
_LOCAL = "rope_local_base_freq"


@dataclass(frozen=True)
class Rope:
    """``metadata`` without the architecture's prefix; ``factors``: tensors; ``partial``: share rotated."""

    metadata: Mapping[str, bool | int | float | str]
    factors: Mapping[str, list[float]] = field(default_factory=dict)
    partial: float = 1.0
    warnings: tuple[str, ...] = ()


def rope_of(architecture: str, config: Mapping[str, Any], settings: Mapping[str, Any]) -> Rope:
    """Read the rope settings of a config.json (``settings``: with defaults).

    Raises:
        NotSupportedError: a scaling that llama.cpp does not compute, by its name.
    """
    full, local = _settings(config, settings)
    kind = str(full.get("rope_type") or full.get("type") or "default")
    metadata: dict[str, bool | int | float | str] = {"rope.freq_base": float(full["rope_theta"])}
    if local is not None:
        metadata["rope.freq_base_swa"] = local
    partial = float(full.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0)
    if partial != 1.0 and architecture != "phi3":
        raise NotSupportedError(
            f"partial_rotary_factor is {partial}; llama.cpp's {architecture} rotates whole heads", fix=_USE_16
        )
    if kind == "default":
        return Rope(metadata, partial=partial)
    if kind == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
        return Rope(metadata, partial=partial)
    if kind == "llama3":
        return Rope(metadata, {"rope_freqs.weight": llama3_factors(full, settings)}, partial)
    if kind == "yarn":
        return Rope({**metadata, **_yarn(full, settings)}, partial=partial)
    if kind in ("longrope", "su") and architecture == "phi3":
        return _longrope(full, settings, metadata, partial)
    raise NotSupportedError(
        f"rope scaling {kind!r} is not computed by llama.cpp's {architecture}", fix=_USE_16
    )


def _settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The settings of layers with full attention, and the base of the sliding ones (Gemma 3)."""
    stated = config if "rope_parameters" in config or "rope_theta" in config else settings
    given = stated.get("rope_parameters")
    if given is None:
        full = dict(stated.get("rope_scaling") or {})
        full["rope_theta"] = stated.get("rope_theta") or _DEFAULT_BASE
        local = stated.get(_LOCAL, settings.get(_LOCAL))
        return full, None if local is None else float(local)
    if "full_attention" not in given:
        return {"rope_theta": stated.get("rope_theta") or _DEFAULT_BASE, **given}, None
    sliding = given.get("sliding_attention") or {}
    if (sliding.get("rope_type") or "default") != "default":
        raise NotSupportedError("rope scaling of sliding layers is not computed by llama.cpp", fix=_USE_16)
    return dict(given["full_attention"]), float(sliding.get("rope_theta") or _DEFAULT_BASE)


def _original(full: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    found = full.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    return int(found or settings["max_position_embeddings"])


def llama3_factors(full: Mapping[str, Any], settings: Mapping[str, Any]) -> list[float]:
    """What llama.cpp divides each frequency by: 1 for short waves, ``factor`` for long ones.

    The formula is that of transformers' ``rope_type: llama3``.
    """
    heads = settings["num_attention_heads"]
    width = int(settings.get("head_dim") or settings["hidden_size"] // heads)
    factor, low, high = (float(full[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _original(full, settings)
    factors = []
    for index in range(0, width, 2):
        wave = 2 * math.pi * float(full["rope_theta"]) ** (index / width)
        if wave < original / high:
            factors.append(1.0)
        elif wave > original / low:
            factors.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _yarn(full: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    factor = float(full["factor"])
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    stated = full.get("attention_factor")
    own = [key for key in ("mscale", "mscale_all_dim") if full.get(key)]
    if (stated is not None and not math.isclose(stated, usual, rel_tol=1e-4)) or own:
        raise NotSupportedError(
            f"yarn with {own[0] if own else 'attention_factor'} of its own is not what "
            f"llama.cpp computes ({usual:.4f})",
            fix=_USE_16,
        )
    if full.get("truncate") is False:
        raise NotSupportedError("yarn with truncate false is not what llama.cpp computes", fix=_USE_16)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": _original(full, settings),
        "rope.scaling.yarn_beta_fast": float(full.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(full.get("beta_slow") or 1.0),
    }


def _longrope(
    full: Mapping[str, Any],
    settings: Mapping[str, Any],
    metadata: dict[str, bool | int | float | str],
    partial: float,
) -> Rope:
    original, context = _original(full, settings), int(settings["max_position_embeddings"])
    scale = context / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    metadata |= {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": float(full.get("attention_factor") or usual),
    }
    factors = {
        "rope_factors_long.weight": [float(value) for value in full["long_factor"]],
        "rope_factors_short.weight": [float(value) for value in full["short_factor"]],
    }
    told = (
        f"llama.cpp picks the long rope factors by the size of the context it was started with, transformers "
        f"by the length of the text: for texts up to {original} tokens start it with -c {original}"
    )
    return Rope(metadata, factors, partial, (told,))
