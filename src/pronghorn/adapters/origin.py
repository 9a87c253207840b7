"""Where a model in memory came from: kept on the instance, so that saving and exporting never guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ATTRIBUTE = "_pronghorn_origin"


@dataclass
class Origin:
    """The base files a model instance was loaded from, and how it was loaded.

    ``fingerprint`` is that of the weight files; ``rows`` the embedding rows at load; ``seed`` the default seed of a
    new adapter; ``recompute`` whether recompute (gradient checkpointing) was asked for.
    """

    name: str
    path: Path
    revision: str | None
    fingerprint: str
    max_seq_length: int | None
    tokenizer: Any = None
    tokenizer_print: str = ""
    tokenizer_folder: Path | None = None
    seed: int = 3407
    recompute: bool = False
    rows: int | None = None


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
