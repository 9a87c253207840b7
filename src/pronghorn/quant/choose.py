"""Which modules of a model are quantised, and why the others are not: one rule for loading and writing."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pronghorn.ops.packed import BLOCK
from pronghorn.weights import keymap

HEAD = "the output head"
ROUTER = "a router"
TOWER = "outside the language model"
FLOAT32 = "kept in float32 by its model"
ELSEWHERE = "stored in another form in the files"
STORED = "stored in 16-bit in the files"
EXPERTS = "stacked experts, not linear modules"
# bitsandbytes 0.50 decodes such weights wrongly on a CPU: relative error 0.23 where NF4's own is 0.09
WIDTH = f"a width that is no multiple of {BLOCK}"

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_TOWERS = re.compile(r"(^|[._])(vision|visual|audio|image|multi_modal_projector)")


@dataclass(frozen=True)
class Choice:
    """``files``: module -> its weight in the files, for modules to quantise; ``left``: module -> why not."""

    files: Mapping[str, str]
    left: Mapping[str, str]

    @property
    def skipped(self) -> list[str]:
        """The left linear modules as patterns for quantization_config's llm_int8_skip_modules.

        A tower is named as a whole: transformers 4 takes "0" of a layer in it for the first of any layers.
        """
        towers = {tower_of(name) for name, reason in self.left.items() if reason == TOWER}
        others = [name for name, reason in self.left.items() if reason != TOWER]
        return sorted({*towers, *skip_patterns(others, self.files)})


def choose(model: Any, stored: Collection[str], *, block: int = BLOCK) -> Choice:
    """Decide for every linear module of a model (on the meta device, or loaded in 16-bit).

    Args:
        model: a transformers causal language model.
        stored: names of the tensors in its files.
        block: what a width must be a multiple of; 1 for 8-bit, which has a scale for each row.
    """
    head = model.get_output_embeddings()
    float32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    files: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if type(module) is not torch.nn.Linear:
            continue
        reason, found = _reason(name, module is head, float32), keymap.find(f"{name}.weight", stored)
        if reason is None and module.in_features % block:
            reason = WIDTH
        if reason is None and found is None:
            reason = ELSEWHERE
        if reason is None and found is not None:
            files[name] = found
        elif reason is not None:
            left[name] = reason
    left |= {
        name: EXPERTS
        for name, tensor in model.named_parameters()
        if tensor.dim() == 3 and ".experts." in name
    }
    return Choice(files, left)


def _reason(name: str, is_head: bool, float32: tuple[str, ...]) -> str | None:
    if is_head:
        return HEAD
    if tower_of(name):
        return TOWER
    if name.rpartition(".")[2] in _ROUTERS:
        return ROUTER
    return FLOAT32 if any(part in name.split(".") for part in float32) else None


def tower_of(module: str) -> str:
    """The tower that a module lies in, ``model.visual`` of ``model.visual.blocks.0.attn.qkv``; "" outside."""
    found = _TOWERS.search(module)
    return module[: found.end()] + module[found.end() :].partition(".")[0] if found else ""


def skip_patterns(left: Iterable[str], chosen: Collection[str]) -> list[str]:
    """Patterns for exactly the modules left: last names where no chosen module has one, else full names."""
    found = []
    for name in left:
        leaf = name.rpartition(".")[2]
        clear = not any(one.endswith(leaf) or one.startswith(leaf) for one in chosen)
        found.append(leaf if clear else re.escape(name) + "$")
    return sorted(set(found))
