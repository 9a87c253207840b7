"""Turns pydantic's errors into one ConfigError that names path, value, rule and the key that was meant."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pronghorn.errors import ConfigError, PronghornError

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument")

# what the same thing is called in TRL, PEFT, Unsloth, Axolotl and LLaMA-Factory
_OTHER_NAMES = MappingProxyType(
    {
        "base_model": "model.name",
        "cutoff_len": "model.max_seq_length",
        "dataset": "data.train",
        "datasets": "data.train",
        "eval_steps": "eval.every_steps",
        "files": "data.train",
        "gradient_accumulation_steps": "training.gradient_accumulation",
        "gradient_checkpointing": "training.recompute",
        "logging_steps": "logging.every_steps",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_r": "lora.r",
        "lora_rank": "lora.r",
        "lora_target": "lora.targets",
        "lr": "training.learning_rate",
        "lr_scheduler_type": "training.schedule",
        "max_length": "model.max_seq_length",
        "micro_batch_size": "training.batch_size",
        "model_name": "model.name",
        "model_name_or_path": "model.name",
        "num_epochs": "training.epochs",
        "num_train_epochs": "training.epochs",
        "optim": "training.optimizer",
        "output_dir": "output.folder",
        "per_device_eval_batch_size": "eval.batch_size",
        "per_device_train_batch_size": "training.batch_size",
        "rank": "lora.r",
        "save_steps": "checkpoints.every_steps",
        "save_total_limit": "checkpoints.keep",
        "sequence_len": "model.max_seq_length",
        "target_modules": "lora.targets",
        "val_set_size": "data.eval_fraction",
        "val_size": "data.eval_fraction",
        "warmup_steps": "training.warmup_ratio",
    }
)


def explain(error: ValidationError, model: type[BaseModel], origin: str) -> ConfigError:
    """One error for all wrong keys of ``origin`` (a file name), each on its own line with its way out."""
    known = tuple(_known_keys(model))
    found = [_describe(item, known) for item in error.errors(include_url=False)]
    if len(found) == 1:
        line, fix = found[0]
        return ConfigError(f"{origin}: {line}", fix=fix)
    lines = [f"{line} ({fix})" for line, fix in found]
    return ConfigError(
        "\n  ".join([f"{origin}: {len(lines)} errors", *lines]), fix="correct each of them, as it says there"
    )


def _describe(item: Any, known: Sequence[str]) -> tuple[str, str]:
    """What is wrong with one key, and the way out."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] in _UNKNOWN:
        return f"{path}: unknown key", _meant(path, known)
    if item["type"] in _MISSING:
        return f"{path}: required, and not given", f"set {path}"
    own = item.get("ctx", {}).get("error")  # raised by a section that validates itself
    if isinstance(own, PronghornError):
        return f"{path}: {own.message}", f"{path}: {own.fix}"
    return f"{path}: {_rule(item['msg'])} (got {_short(item['input'])})", f"correct {path}"


def _known_keys(model: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a pydantic model, through nested models and dataclasses."""
    if dataclasses.is_dataclass(model):
        fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(model)}
    else:
        fields = {name: field.annotation for name, field in model.model_fields.items()}
    for name, kind in fields.items():
        yield prefix + name
        for part in get_args(kind) or (kind,):  # "LoraOptions | None" counts as LoraOptions
            if isinstance(part, type) and (issubclass(part, BaseModel) or dataclasses.is_dataclass(part)):
                yield from _known_keys(part, f"{prefix}{name}.")


def _meant(path: str, known: Sequence[str]) -> str:
    section, _, name = path.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    anywhere = {key.rpartition(".")[2]: key for key in reversed(known)}  # the first of two wins
    for names in (siblings, _OTHER_NAMES, anywhere):
        close = [name] if name in names else difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if close:
            return f"did you mean {names[close[0]]}?"
    return f"{section or 'the top level'} knows: {', '.join(siblings)}"


def _rule(message: str) -> str:
    """pydantic's sentence, without the prefix it puts before errors raised by validators of ours."""
    return (
        message.removeprefix("Value error, ")
        .removeprefix("Assertion failed, ")
        .replace("Input should", "should")
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
