"""Switching a model's softmax attention to ours through its own configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from pronghorn.attention import interface

_REPLACEABLE = frozenset({"sdpa", "eager"})

# copies and pickles of an accelerated model import this module: the name their configuration holds must be
# known
interface.register()


class AttentionSwitch:
    """The implementation named in the configurations of a model's decoder, and the way back."""

    kind = "attention"

    def __init__(self, model: Any) -> None:
        text = model.config.get_text_config()
        below = [getattr(module, "config", None) for module in model.modules()]
        same = [config for config in below if type(config) is type(text)]
        self.configs = list({id(config): config for config in [text, *same]}.values())
        self.before = [config._attn_implementation for config in self.configs]
        self.cap = interface.lost_cap(model)

    @property
    def refused(self) -> str | None:
        """Why the model keeps its implementation, or None."""
        if self.cap is not None:
            return (
                f"sdpa of this transformers leaves the soft cap of {self.cap:g} out: load with "
                "pronghorn.load, or with attn_implementation='eager'"
            )
        names = {str(name) for name in self.before}
        return None if names <= _REPLACEABLE else f"uses {', '.join(sorted(names - _REPLACEABLE))} already"

    def on(self) -> None:
        """Use ours."""
        for config in self.configs:
            config._attn_implementation = interface.NAME

    def off(self) -> None:
        """Use what was there."""
        for config, name in zip(self.configs, self.before, strict=True):
            config._attn_implementation = name


def attention_callers(model: nn.Module, batch: dict[str, Any], run: Any) -> list[nn.Module]:
    """The modules that call our attention in ``run(model, batch)``, each once."""
    token = interface.callers.set([])
    try:
        run(model, batch)
        return list(dict.fromkeys(interface.callers.get() or []))
    finally:
        interface.callers.reset(token)
