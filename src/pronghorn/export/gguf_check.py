"""What the GGUF formats refuse before any work: for the export itself, and for ``verify --for llama.cpp``.

``python -m pronghorn.export.gguf_check FOLDER [BASE]`` prints the refusals as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from pronghorn.adapters.files import AdapterFolder, choose_adapter
from pronghorn.errors import NotSupportedError, PronghornError, SourceError
from pronghorn.export.gguf_models import (
    Architecture,
    ModelPlan,
    architecture_of,
    check_model,
    llama_cpp_name,
    plan_model,
    settings_of,
)
from pronghorn.export.gguf_ollama import modelfile
from pronghorn.export.gguf_tokens import padded, plan_tokens
from pronghorn.export.portable import Served, served_pairs
from pronghorn.sources.resolve import ADAPTER_CONFIG, resolve, resolve_base
from pronghorn.sources.source import Source
from pronghorn.weights.folder import open_weights


def refusals(folder: Path, base: Path | None = None) -> tuple[PronghornError, ...]:
    """Why a folder cannot be had as GGUF: a model as "gguf-f16" and so on, an adapter as "gguf-lora".

    Args:
        folder: A model or an adapter.
        base: The base of an adapter; by default the one recorded with it.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _said(lambda: _adapter(folder, base))
    plans: list[ModelPlan] = []
    found = _said(lambda: plans.append(_model(folder)))
    if plans or not any(isinstance(error, SourceError) for error in found):
        found += _said(lambda: _tokens(folder, plans[0].vocabulary if plans else None))
    return found


def require_lora(adapter: Path, base: Source) -> tuple[Architecture, AdapterFolder, tuple[Served, ...]]:
    """What "gguf-lora" writes of an adapter.

    Raises:
        NotSupportedError: something llama.cpp cannot apply; it is named.
        AdapterError: as the format "adapter".
    """
    architecture = architecture_of({**base.config, "quantization_config": None})
    found, served = served_pairs(adapter, base.path)
    for one in served:
        if llama_cpp_name(architecture, f"{one.module}.weight") is None or one.kind != "Linear":
            raise NotSupportedError(
                f"{one.module} is adapted; llama.cpp applies adapters to linear layers only",
                fix="merge it: --format gguf-f16",
            )
        if one.module == "lm_head" and bool(base.config.get("tie_word_embeddings")):
            raise NotSupportedError(
                "the output head is adapted, and it is the embedding in llama.cpp",
                fix="merge it: --format gguf-f16",
            )
    return architecture, found, served


def _adapter(folder: Path, base: Path | None) -> None:
    source = resolve(choose_adapter(folder, None))
    found = resolve_base(source, base=base, trust_remote_code=True)
    require_lora(source.path, found)
    check_model({**found.config, "quantization_config": None}, settings_of(found.path))


def _model(folder: Path) -> ModelPlan:
    source, settings = resolve(folder, trust_remote_code=True), settings_of(folder)
    check_model(source.config, settings)
    return plan_model(open_weights(folder), source.config, settings)


def _tokens(folder: Path, rows: int | None) -> None:
    plan = plan_tokens(folder)
    modelfile("", plan)  # the chat template has to end
    if rows is not None:
        padded(plan, rows)


def _said(check: Callable[[], object]) -> tuple[PronghornError, ...]:
    try:
        check()
    except PronghornError as error:
        return (error,)
    return ()


def main(*places: str) -> None:
    """Print each refusal; ``sure`` is false where only the base of an adapter could not be had."""
    folder, *base = (Path(place) for place in places)
    adapter = (folder / ADAPTER_CONFIG).is_file()
    said = [
        {"text": one.message, "fix": one.fix, "sure": not (adapter and isinstance(one, SourceError))}
        for one in refusals(folder, *base)
    ]
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
