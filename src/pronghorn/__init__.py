"""Fine-tune open language models with LoRA, and prove that what was trained is what is served.

Importing this package changes no other library and loads none of the heavy ones: every public name is
looked up on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pronghorn.adapters.attach import attach_lora as attach_lora
    from pronghorn.adapters.new_tokens import add_new_tokens as add_new_tokens
    from pronghorn.adapters.options import LoraOptions as LoraOptions
    from pronghorn.data.for_trl import rows_for_trl as rows_for_trl
    from pronghorn.data.inspect import inspect_data as inspect_data
    from pronghorn.data.notebook import get_chat_template as get_chat_template
    from pronghorn.data.notebook import standardize_data_formats as standardize_data_formats
    from pronghorn.data.notebook import standardize_sharegpt as standardize_sharegpt
    from pronghorn.data.notebook import to_sharegpt as to_sharegpt
    from pronghorn.data.responses import train_on_responses_only as train_on_responses_only
    from pronghorn.errors import PronghornError as PronghornError
    from pronghorn.export.run import export as export
    from pronghorn.export.verify import verify as verify
    from pronghorn.fast.model import FastLanguageModel as FastLanguageModel
    from pronghorn.loading.load import load as load
    from pronghorn.loading.options import LoadOptions as LoadOptions
    from pronghorn.patching.accelerate import accelerate as accelerate
    from pronghorn.training.config import RunConfig as RunConfig
    from pronghorn.training.plan import plan as plan
    from pronghorn.training.run import train as train

__version__ = "0.1.0"

# public name -> the module that defines it
_HOMES = {
    "FastLanguageModel": "pronghorn.fast.model",
    "LoadOptions": "pronghorn.loading.options",
    "LoraOptions": "pronghorn.adapters.options",
    "PronghornError": "pronghorn.errors",
    "RunConfig": "pronghorn.training.config",
    "accelerate": "pronghorn.patching.accelerate",
    "add_new_tokens": "pronghorn.adapters.new_tokens",
    "attach_lora": "pronghorn.adapters.attach",
    "export": "pronghorn.export.run",
    "get_chat_template": "pronghorn.data.notebook",
    "inspect_data": "pronghorn.data.inspect",
    "load": "pronghorn.loading.load",
    "plan": "pronghorn.training.plan",
    "rows_for_trl": "pronghorn.data.for_trl",
    "standardize_data_formats": "pronghorn.data.notebook",
    "standardize_sharegpt": "pronghorn.data.notebook",
    "to_sharegpt": "pronghorn.data.notebook",
    "train": "pronghorn.training.run",
    "train_on_responses_only": "pronghorn.data.responses",
    "verify": "pronghorn.export.verify",
}

__all__ = [
    "FastLanguageModel",
    "LoadOptions",
    "LoraOptions",
    "PronghornError",
    "RunConfig",
    "accelerate",
    "add_new_tokens",
    "attach_lora",
    "export",
    "get_chat_template",
    "inspect_data",
    "load",
    "plan",
    "rows_for_trl",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train",
    "train_on_responses_only",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pronghorn' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
