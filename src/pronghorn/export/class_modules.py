"""The modules of the class that a base's config.json names, by the names servers use; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from pronghorn.errors import ExportError, NotSupportedError
from pronghorn.export.text_only import TEXT_CLASSES
from pronghorn.sources.resolve import BASE_CONFIG, read_json

# where the layers of the language model lie: multimodal classes today, multimodal files before
# transformers 4.52, text classes
TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.")


@dataclass(frozen=True)
class ClassModule:
    """A module with one weight matrix: its class's ``kind`` and the weight's ``shape``."""

    kind: str
    shape: tuple[int, ...]


def class_model(base: Path, *, text_only: bool = False) -> Any:
    """The class named in config.json (``text_only``: that of its language model), built on the meta device.

    Raises:
        NotSupportedError: this transformers has no class of that name.
        ExportError: transformers does not build it from this config without running the model's own code.
    """
    named = str((read_json(base / BASE_CONFIG).get("architectures") or [""])[0])
    found: Any = getattr(transformers, named, None)
    if found is None:
        raise NotSupportedError(
            f"transformers {transformers.__version__} has no class {named!r}, which {base} names",
            fix="install the transformers that the model asks for, or use --format merged_16bit",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
        if text_only:
            config = config.get_text_config()
            found = getattr(transformers, TEXT_CLASSES[config.model_type])
        with torch.device("meta"):
            return found(config)
    except Exception as error:  # hundreds of configs and classes, each with errors of its own
        raise ExportError(
            f"transformers {transformers.__version__} does not build the {named} of {base}: "
            f"{type(error).__name__}: {error}",
            fix="compare its config.json with that of the original model, or use --format merged_16bit",
        ) from error


def class_modules(base: Path, *, text_only: bool = False) -> Mapping[str, ClassModule]:
    """Linear layers and embeddings of the class named in config.json, or of its language model alone.

    Raises:
        NotSupportedError, ExportError: as ``class_model``.
    """
    model = class_model(base, text_only=text_only)
    return {
        name: ClassModule(_kind(module), tuple(module.weight.shape))
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 2
    }


def _kind(module: Any) -> str:
    for kind in (torch.nn.Linear, torch.nn.Embedding):
        if isinstance(module, kind):
            return kind.__name__
    return type(module).__name__


def serving_name(module: str, known: Mapping[str, ClassModule]) -> str | None:
    """A module of an adapter by its name in the class: prefixes are exchanged where they differ."""
    if module in known:
        return module
    for prefix in TEXT_PREFIXES:
        if module.startswith(prefix):
            for other in TEXT_PREFIXES:
                name = other + module.removeprefix(prefix)
                if name in known:
                    return name
    return None
