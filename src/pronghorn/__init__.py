"""Fine-tune open language models with LoRA, and prove that what was trained is what is served.

Importing this package changes no other library and loads none of the heavy ones: every public name is
looked up on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.adapters.attach import attach_lora as attach_lora
    from pronghorn.adapters.options import LoraOptions as LoraOptions
    from pronghorn.data.inspect import inspect_data as inspect_data
    from pronghorn.errors import PronghornError as PronghornError
    from pronghorn.export.run import export as export
    from pronghorn.export.verify import verify as verify
    from pronghorn.fast import FastLanguageModel as FastLanguageModel
    from pronghorn.loading.load import load as load
    from pronghorn.loading.options import LoadOptions as LoadOptions
    from pronghorn.training.config import RunConfig as RunConfig
    from pronghorn.training.run import train as train

__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "FastLanguageModel": "pronghorn.fast",
    "LoadOptions": "pronghorn.loading.options",
    "LoraOptions": "pronghorn.adapters.options",
    "PronghornError": "pronghorn.errors",
    "RunConfig": "pronghorn.training.config",
    "attach_lora": "pronghorn.adapters.attach",
    "export": "pronghorn.export.run",
    "inspect_data": "pronghorn.data.inspect",
    "load": "pronghorn.loading.load",
    "train": "pronghorn.training.run",
    "verify": "pronghorn.export.verify",
}

__all__ = [
    "FastLanguageModel",
    "LoadOptions",
    "LoraOptions",
    "PronghornError",
    "RunConfig",
    "attach_lora",
    "export",
    "inspect_data",
    "load",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pronghorn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
