"""Which modules an adapter sits on: names as people type them become full module and parameter names.

PEFT's own "all-linear" skips dense and shared-expert MLPs in some mixture-of-experts models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from torch import nn

from pronghorn.adapters.options import ALL_LINEAR, LoraOptions
from pronghorn.errors import AdapterError

# one product in some families where others have several
FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "query_key_value": ("q_proj", "k_proj", "v_proj"),
        "c_attn": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
)
# stacked experts ([experts, ...] parameters) and the names their parts have in files and in older versions
STACKED: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
)
_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Targets:
    """Full names: linear or embedding ``modules``, and ``parameters`` that hold a weight without a module."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


class _Catalog:
    """What of a model can carry an adapter; of a multimodal one its language model and the head."""

    def __init__(self, model: Any) -> None:
        kinds = (nn.Linear, nn.Embedding)
        head = model.get_output_embeddings()
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if (isinstance(module, kinds) or type(module).__name__ == "Conv1D")
            and (module is head or _in_language_model(model, name))
        }
        self.stacks = [
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() == 3 and name.rpartition(".")[2] in STACKED and _in_language_model(model, name)
        ]
        self.head = next((name for name, module in self.modules.items() if module is head), None)
        self.leaves = sorted({name.rpartition(".")[2] for name in [*self.modules, *self.stacks]})
        self.others = {
            name.rpartition(".")[2]: type(module).__name__ for name, module in model.named_modules()
        }


def _in_language_model(model: Any, name: str) -> bool:
    """False for the image tower of a multimodal model, and for what joins the two."""
    return not hasattr(model.config, "vision_config") or "language_model" in name.split(".")


def resolve_targets(model: Any, options: LoraOptions) -> Targets:
    """Full names of everything the options name, restricted to the layers they name.

    Raises:
        AdapterError: a name that matches nothing, half of a fused product, a layer that does not exist.
    """
    catalog = _Catalog(model)
    found = list(_named(catalog, options.targets))
    found += list(_parameters(model, options.target_parameters))
    kept = _in_layers(model, dict.fromkeys(found), options)
    saved = options.modules_to_save
    _check_saved(model, saved)
    kept = [
        name for name in kept if not any(re.match(rf"(^|.*\.){re.escape(s)}($|\..*)", name) for s in saved)
    ]
    if not kept and not saved:
        raise AdapterError(
            f"no module is left to adapt: targets {options.targets!r}, layers {options.layers!r}",
            fix=f"adaptable names in this model: {', '.join(catalog.leaves)}",
        )
    modules = tuple(name for name in kept if name in catalog.modules)
    return Targets(modules, tuple(name for name in kept if name not in catalog.modules))


def _check_saved(model: Any, saved: Iterable[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for wanted in saved:
        if not any(name == wanted or name.endswith("." + wanted) for name in names):
            close = get_close_matches(
                wanted, sorted({name.rpartition(".")[2] for name in names}), n=3, cutoff=0.5
            )
            raise AdapterError(
                f"modules_to_save names {wanted!r}, but this model has no such module",
                fix=f"did you mean {' or '.join(close)}?" if close else "list the model's named_modules()",
            )


def _named(catalog: _Catalog, targets: str | Iterable[str]) -> Iterator[str]:
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        for name, module in catalog.modules.items():
            if not isinstance(module, nn.Embedding) and name != catalog.head and not _is_router(module):
                yield name
        yield from catalog.stacks
    elif isinstance(targets, str):
        yield from _matching(catalog, targets)
    else:
        asked = tuple(targets)
        for name in asked:
            yield from _one(catalog, name, asked)


def _is_router(module: nn.Module) -> bool:
    """Whether it is a Linear that returns several tensors, as some routers do: LoRA cannot sit on it."""
    return isinstance(module, nn.Linear) and (
        type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith("transformers.models.")
    )


def _matching(catalog: _Catalog, pattern: str) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"target_modules={pattern!r} is not a regular expression: {error}") from error
    found = [name for name in [*catalog.modules, *catalog.stacks] if compiled.fullmatch(name)]
    if not found:
        leaf = pattern in catalog.leaves
        raise AdapterError(
            f"the regular expression target_modules={pattern!r} matches no full module name",
            fix=f'write target_modules=["{pattern}"]'
            if leaf
            else f"start it with .* ; a full name looks like {next(iter(catalog.modules), '')}",
        )
    return found


def _one(catalog: _Catalog, target: str, asked: tuple[str, ...]) -> list[str]:
    """What one entry of a list stands for: modules, stacked experts, or the fused product it is part of."""
    found = [name for name in catalog.modules if name == target or name.endswith("." + target)]
    found += [name for name in catalog.stacks if name == target or name.endswith("." + target)]
    for leaf, spellings in STACKED.items():
        parts = next((parts for parts in spellings if target in parts), None)
        stacks = [name for name in catalog.stacks if name.rpartition(".")[2] == leaf]
        if parts and stacks:
            _require_all(parts, asked, f"{leaf} of the stacked experts")
            found += stacks
    if not found:
        for fused, parts in FUSED.items():
            if target in parts:
                found = [name for name in catalog.modules if name.rpartition(".")[2] == fused]
                if found:
                    _require_all(parts, asked, fused)
                    return found
        raise _unmatched(catalog, target)
    return found


def _require_all(parts: tuple[str, ...], asked: tuple[str, ...], fused: str) -> None:
    lacking = [part for part in parts if part not in asked]
    if lacking:
        raise AdapterError(
            f"this model holds {', '.join(parts)} as one weight ({fused}), and only some of them are targets",
            fix=f"add {', '.join(lacking)}, or leave {', '.join(p for p in parts if p in asked)} out",
        )


def _unmatched(catalog: _Catalog, target: str) -> AdapterError:
    leaf = target.rpartition(".")[2]
    close = get_close_matches(leaf, catalog.leaves, n=3, cutoff=0.5)
    kind = f", only a {catalog.others[leaf]}, which cannot carry an adapter" if leaf in catalog.others else ""
    near = f"did you mean {' or '.join(close)}? " if close else ""
    return AdapterError(
        f"target_modules names {target!r}, but this model has no such linear or embedding module{kind}",
        fix=f"{near}it has {', '.join(catalog.leaves)}; "
        f'target_modules="{ALL_LINEAR}" takes every linear module',
    )


def _parameters(model: Any, wanted: Iterable[str]) -> Iterator[str]:
    names = [name for name, parameter in model.named_parameters() if parameter.dim() in (2, 3)]
    for target in wanted:
        found = [name for name in names if name == target or name.endswith("." + target)]
        if not found:
            close = get_close_matches(
                target, sorted({name.rpartition(".")[2] for name in names}), n=3, cutoff=0.4
            )
            raise AdapterError(
                f"target_parameters names {target!r}, but no matrix or stack of matrices has that name",
                fix=f"did you mean {' or '.join(close)}?" if close else "list the model's named_parameters()",
            )
        yield from found


def _in_layers(model: Any, names: Iterable[str], options: LoraOptions) -> list[str]:
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if options.last_layers is not None:
        if count is None or options.last_layers > count:
            raise AdapterError(
                f"last_layers is {options.last_layers}, the model has {count} layers", fix="lower it"
            )
        wanted = frozenset(range(count - options.last_layers, count))
    elif options.layers is not None:
        wanted = frozenset([options.layers] if isinstance(options.layers, int) else options.layers)
        beyond = sorted(one for one in wanted if not 0 <= one < (count or one + 1))
        if beyond or not wanted:
            raise AdapterError(
                f"layers_to_transform names {beyond or 'no layer'}, the model has layers 0 to "
                f"{(count or 1) - 1}",
                fix="name existing layers",
            )
    else:
        return list(names)
    # a named module outside the layers (lm_head, embed_tokens) was asked for by name and stays
    return [
        name for name in names if (index := _layer(name, options.layers_pattern)) is None or index in wanted
    ]


def _layer(name: str, patterns: str | Iterable[str] | None) -> int | None:
    if not patterns:
        found = _LAYER_INDEX.search(name)
        return int(found.group(1)) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.search(rf"(?:^|\.){pattern}\.(\d+)(?:\.|$)", name)
        if found:
            return int(found.group(1))
    return None
