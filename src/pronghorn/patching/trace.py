"""One short forward of the model, watched: which module got which input, in which order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.patching.adapted import is_adapted, linear_shape

TOKENS = 12


@dataclass
class Trace:
    """What one forward showed, by module name."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """shape of the first tensor each module received as its only argument"""
    called: set[str] = field(default_factory=set)
    """every module that ran, with whatever arguments"""
    routed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(width, choices) of modules called with states, chosen experts and their weights, of two dimensions"""
    groups: list[tuple[str, ...]] = field(default_factory=list)
    """linears in call order; those that received the very same tensor one after the other are together"""


def sample_batch(model: Any, rows: int = 1, tokens: int = TOKENS, seed: int = 0) -> dict[str, Tensor]:
    """Token ids the model accepts, on the device of its embeddings; labels are the ids."""
    embeddings = model.get_input_embeddings().weight
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(seed)
    # the last ids of a vocabulary are often placeholders for images or sound
    last = max(4, min(int(config.vocab_size), embeddings.shape[0]) - 6)
    ids = torch.randint(3, last, (rows, tokens), generator=generator).to(embeddings.device)
    return {"input_ids": ids, "labels": ids.clone()}


def trace(model: nn.Module, batch: dict[str, Tensor]) -> Trace:
    """Run ``model`` once without gradients, with hooks that are gone afterwards."""
    found = Trace()
    seen: list[tuple[str, Tensor, int]] = []  # keeps the inputs alive: no object is taken for another

    def watch(name: str, is_linear: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.called.add(name)
            given = [*(a for a in args if a is not None), *(v for v in kwargs.values() if v is not None)]
            if given and isinstance(given[0], Tensor) and len(given) == 1:
                found.shapes.setdefault(name, tuple(given[0].shape))
                if is_linear:
                    seen.append((name, given[0], given[0]._version))
            if not kwargs and len(args) == 3 and all(isinstance(a, Tensor) and a.dim() == 2 for a in args):
                found.routed.setdefault(name, (args[0].shape[1], args[1].shape[1]))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name, _is_leaf_linear(name, module, model)), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        # in train mode: on some processors an eval forward repacks 4-bit weights for an inference kernel for
        # good
        with torch.no_grad(), train_mode(model):
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found.groups = _groups(seen)
    return found


@contextmanager
def train_mode(model: nn.Module) -> Iterator[None]:
    """Train mode inside the block, every module's own mode and the random state afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[]):
            model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _is_leaf_linear(name: str, module: nn.Module, model: nn.Module) -> bool:
    """A linear the model calls itself: not the base layer or a factor inside an adapter."""
    parts = name.split(".")
    inside = any(is_adapted(model.get_submodule(".".join(parts[:i]))) for i in range(1, len(parts)))
    return not inside and linear_shape(module) is not None


def _groups(seen: list[tuple[str, Tensor, int]]) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    last: tuple[Tensor, int] | None = None
    for name, x, version in seen:
        parent = name.rpartition(".")[0]
        together = last is not None and last[0] is x and last[1] == version
        if together and groups[-1][0].rpartition(".")[0] == parent and name not in groups[-1]:
            groups[-1] += (name,)
        elif not any(name in group for group in groups):
            groups.append((name,))
        last = (x, version)
    return groups
