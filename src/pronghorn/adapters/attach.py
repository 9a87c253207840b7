"""Attach a LoRA adapter to a transformers model: PEFT wraps, this module decides what is wrapped."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from pronghorn.adapters.new_tokens import head_with_rows, start_rows, trainable_rows
from pronghorn.adapters.options import LoraOptions
from pronghorn.adapters.origin import Origin, origin_of
from pronghorn.adapters.save import bind_save
from pronghorn.adapters.targets import Targets, resolve_targets
from pronghorn.adapters.tied import Tied, settle
from pronghorn.errors import AdapterError, NotSupportedError
from pronghorn.quant.library import values

_PEFT_FIELDS = frozenset(one.name for one in fields(LoraConfig))


@dataclass(frozen=True)
class AttachReport:
    """What was attached: how many modules hold the adapter, by last name part, and parameter counts."""

    modules: dict[str, int]
    saved: tuple[str, ...]
    rank: int
    tied: Tied | None
    trainable: int
    total: int
    tokens: int = 0

    def __str__(self) -> str:
        where = ", ".join(f"{name} x{count}" for name, count in self.modules.items())
        whole = f"; trained in full: {', '.join(self.saved)}" if self.saved else ""
        whole += f"; rows of {self.tokens} tokens" if self.tokens else ""
        tied = f"; tied embeddings: {self.tied}" if self.tied else ""
        share = 100 * self.trainable / max(1, self.total)
        return (
            f"LoRA rank {self.rank} on {sum(self.modules.values())} modules ({where}){whole}{tied}; "
            f"{self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)"
        )


def attach_lora(
    model: Any, options: LoraOptions | None = None, *, say: Callable[[str], None] | None = print
) -> PeftModel:
    """Put a new LoRA adapter on a model, freeze everything else, and say what was attached.

    The same seed gives the same adapter; the global random streams are left as they were. ``save_pretrained``
    of the returned instance also writes the tokenizer and pronghorn.json. Where the model was loaded with
    recompute, it stays on. ``say`` receives one line (None: silent).

    Raises:
        AdapterError: the model already has an adapter, or an option does not fit the model.
        NotSupportedError: an option that PEFT or pronghorn cannot honour on this model.
    """
    options = options or LoraOptions()
    if hasattr(model, "peft_config"):
        raise AdapterError(
            "the model already has an adapter; a second one on top would train beside it",
            fix="go on training the loaded adapter as it is, or load the base model alone for a new one",
        )
    origin = origin_of(model)
    options, targets, tied = settle(model, options, resolve_targets(model, options))
    rows = trainable_rows(model, [*options.modules_to_save, *targets.modules])
    require_rows(model, rows)
    config = _peft_config(model, options, targets, tied, rows)
    try:
        with seeded(options.seed), peft_warnings():
            wrapped = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise AdapterError(
            f"PEFT refuses this adapter on {type(model).__name__}: {error}",
            fix="change target_modules, and load the model again: it may be wrapped in part",
        ) from error
    if rows:
        start_rows(wrapped, wrapped.active_adapter)
    _name_base(wrapped, origin)
    bind_save(wrapped, tied=tied)
    if say is not None:
        say(str(report(wrapped, tied=tied)))
    return wrapped


def report(model: PeftModel, *, tied: Tied | None = None) -> AttachReport:
    """Describe the active adapter of a wrapped model."""
    config = model.peft_config[model.active_adapter]
    counts = dict(Counter(_adapted(model.get_base_model(), model.active_adapter)))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = getattr(config, "trainable_token_indices", None) or {}
    tokens = len({index for ids in rows.values() for index in ids})
    kept = tuple(config.modules_to_save or ())
    return AttachReport(counts, kept, config.r, tied, trainable, values(model), tokens)


def _adapted(base: Any, adapter: str) -> Iterator[str]:
    """The last name part of every module, or parameter of stacked experts, that holds this adapter now."""
    for name, module in base.named_modules():
        if any(adapter in getattr(module, table, ()) for table in ("lora_A", "lora_embedding_A")):
            parameter = getattr(module, "parameter_name", "weight")
            leaf = name.replace(".base_layer", "").rpartition(".")[2]
            yield leaf if parameter == "weight" else parameter


def _peft_config(
    model: Any, options: LoraOptions, targets: Targets, tied: Tied | None, rows: dict[str, list[int]] | None
) -> LoraConfig:
    modules, moved = _keep_from_conversion(model, targets.modules)
    parameters = [*targets.parameters, *moved]
    if parameters and (options.dropout or options.use_dora):
        setting = "lora_dropout" if options.dropout else "use_dora"
        raise NotSupportedError(
            f"{setting} cannot be used with an adapter on {parameters[0]}, which is adapted as a bare weight",
            fix=f"leave {setting} out, or leave the experts and MLPs out of target_modules",
        )
    extra: dict[str, Any] = {}
    if parameters:
        extra["target_parameters"] = parameters
    if rows:
        extra["trainable_token_indices"] = rows
    if tied == "keep":
        if "ensure_weight_tying" not in _PEFT_FIELDS:
            raise NotSupportedError(
                'tied="keep" needs a newer peft', fix='pip install -U peft, or use tied="untie"'
            )
        extra["ensure_weight_tying"] = True
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(modules),
        bias=options.bias,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules_to_save=list(options.modules_to_save) or None,
        init_lora_weights=options.init,
        **extra,
    )


def _keep_from_conversion(model: Any, modules: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split names into those PEFT takes as modules, and those to be given as parameters (``NAME.weight``).

    From 0.19 PEFT rewrites gate_proj, up_proj, down_proj and gate of some mixture-of-experts models into the
    stacked experts' parameters, so that dense and shared-expert MLPs of these names would get no adapter.
    Given as a parameter such a matrix keeps its adapter, and the saved tensors have the usual names.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # older PEFT or transformers: nothing is rewritten
        return modules, ()
    conversions = get_model_conversion_mapping(model)
    rewritten: dict[str, bool] = {}
    for name in modules:
        leaf = name.rpartition(".")[2]
        if leaf not in rewritten:
            probe = LoraConfig(target_modules=[name])
            try:
                convert_peft_config_for_transformers(probe, model=model, conversions=conversions)
            except ValueError:  # "gate_proj without up_proj": it would have been rewritten
                rewritten[leaf] = True
            else:
                rewritten[leaf] = name not in (probe.target_modules or ())
    kept = tuple(name for name in modules if not rewritten[name.rpartition(".")[2]])
    return kept, tuple(f"{name}.weight" for name in modules if rewritten[name.rpartition(".")[2]])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of their own inside the block; the global streams go on as if nothing was drawn."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def peft_warnings() -> Iterator[None]:
    """Silence PEFT's advice on choices made here, and its use of a name transformers deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True.*")
        warnings.filterwarnings("ignore", message=".*target_modules.*were set but no module was matched.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated.*")
        yield


@cache
def trains_rows_of_heads() -> bool:
    """Whether PEFT lets single rows of an output head train; 0.17 does so for embeddings only."""
    layer = TrainableTokensLayer(nn.Linear(2, 2), "probe", [])
    try:
        layer.update_layer("probe", token_indices=[0])
    except AttributeError:  # it asks for an embedding's width
        return False
    return True


def require_rows(model: Any, rows: Mapping[str, Any] | None) -> None:
    """Hold the ends of which single ``rows`` are to train against what PEFT can do.

    Raises:
        NotSupportedError: the output head is among them, and this PEFT cannot.
    """
    head = head_with_rows(model, rows or ())
    if head is not None and not trains_rows_of_heads():
        raise NotSupportedError(
            f"new tokens need rows of {head}, which peft {peft.__version__} cannot train by themselves",
            fix="pip install -U peft, or take a base whose head and embedding are one matrix",
        )


def _name_base(model: PeftModel, origin: Origin | None) -> None:
    """Write into the PEFT config how others find the base: the hub id and commit, or the folder."""
    if origin is None:
        return
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = origin.name if origin.revision else str(origin.path)
    config.revision = origin.revision
