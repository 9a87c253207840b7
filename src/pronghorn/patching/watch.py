"""Keeps an accelerated model's report with it, and notices adapters that are attached later."""

from __future__ import annotations

from typing import Any

import torch

from pronghorn.patching.report import PatchReport


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    while hasattr(model, "get_base_model") and (base := model.get_base_model()) is not model:
        model = base
    return model


class AdapterWatch:
    """A forward pre-hook of the base model: plans again when the set of adapters has changed since."""

    kind = "watch"

    def __init__(self, report: PatchReport, kinds: tuple[str, ...], tile: int | None) -> None:
        self.report = report
        self.kinds = kinds
        self.tile = tile
        self.adapters: tuple[str, ...] = ()
        self.busy = False

    def __call__(self, model: Any, *_: Any) -> None:
        """Called before each forward; costs one comparison of names."""
        if self.busy or not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        if adapters_of(model) != self.adapters:
            self.replan(model)

    def replan(self, model: Any) -> None:
        """Take everything back, then find and prove again: the modules have changed."""
        from pronghorn.patching.accelerate import plan

        self.busy = True
        try:
            keep = [switch for switch in self.report.switches if switch.kind == self.kind]
            self.report.switches = [switch for switch in self.report.switches if switch.kind != self.kind]
            self.report.undo()
            self.report.parts = []
            plan(model, self.report, self.kinds, self.tile)
            self.report.switches += keep
            self.adapters = adapters_of(model)
        finally:
            self.busy = False


class WatchSwitch:
    """The hook as something a report can undo."""

    kind = AdapterWatch.kind

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def off(self) -> None:
        """Remove the hook."""
        self.handle.remove()


def adapters_of(model: Any) -> tuple[str, ...]:
    """Names of the PEFT adapters in a transformers model."""
    return tuple(sorted(getattr(model, "peft_config", None) or ()))


def watch(base: Any, report: PatchReport, kinds: tuple[str, ...], tile: int | None) -> None:
    """Put the watch on ``base``; ``report.undo`` takes it off."""
    observer = AdapterWatch(report, kinds, tile)
    observer.adapters = adapters_of(base)
    report.switches.append(WatchSwitch(base.register_forward_pre_hook(observer)))


def current_report(base: Any) -> PatchReport | None:
    """The report of an accelerated model."""
    for hook in base._forward_pre_hooks.values():
        if isinstance(hook, AdapterWatch):
            return hook.report
    return None
