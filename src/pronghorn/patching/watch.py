"""Keeps an accelerated model's report with it, and notices adapters that are attached later."""

from __future__ import annotations

from typing import Any

import torch

from pronghorn.patching.report import Choice, PatchReport


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    while hasattr(model, "get_base_model") and (base := model.get_base_model()) is not model:
        model = base
    return model


class AdapterWatch:
    """A forward pre-hook of the backbone: plans again when the model's set of adapters has changed since.

    Of the backbone, because wrappers call ``forward`` of the model itself, which runs no hooks.
    """

    kind = "watch"

    def __init__(self, model: Any, report: PatchReport, choice: Choice) -> None:
        self.model = model
        self.report = report
        self.choice = choice
        self.adapters: tuple[str, ...] = ()
        self.busy = False

    def __call__(self, *_: Any) -> None:
        """Called before each forward; costs one comparison of names."""
        if (
            self.busy
            or not (self.model.training and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
        ):
            return
        if adapters_of(self.model) != self.adapters:
            self.replan()

    def replan(self) -> None:
        """Take everything back, then find and prove again: the modules have changed."""
        from pronghorn.patching.accelerate import plan

        self.busy = True
        try:
            keep = [switch for switch in self.report.switches if switch.kind == self.kind]
            self.report.switches = [switch for switch in self.report.switches if switch.kind != self.kind]
            self.report.undo()
            self.report.parts = []
            plan(self.model, self.report, self.choice)
            self.report.switches += keep
            self.adapters = adapters_of(self.model)
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


def _backbone(base: Any) -> Any:
    return getattr(base, "base_model", base)


def watch(base: Any, report: PatchReport, choice: Choice) -> None:
    """Put the watch on ``base``; ``report.undo`` takes it off."""
    observer = AdapterWatch(base, report, choice)
    observer.adapters = adapters_of(base)
    report.switches.append(WatchSwitch(_backbone(base).register_forward_pre_hook(observer)))


def current_report(base: Any) -> PatchReport | None:
    """The report of an accelerated model."""
    for hook in _backbone(base)._forward_pre_hooks.values():
        if isinstance(hook, AdapterWatch):
            return hook.report
    return None
