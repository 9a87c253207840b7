"""``plan``: what a run will need, before anything is loaded: memory, the longest sequence, disk, time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from pronghorn.errors import MissingDependencyError, OutOfMemoryError, PronghornError
from pronghorn.hardware import accelerator, free_host_bytes, matrix_rate
from pronghorn.memory.budget import Card, Need, StepBytes, card_of, longest_that_fits, optimizer_bytes
from pronghorn.memory.layers import BUDGET_SHARE
from pronghorn.patching.whole import COPY_BYTES
from pronghorn.training.config import RunConfig, as_config, parse_config
from pronghorn.training.rehearse import BatchShape
from pronghorn.training.stage import Recompute, Stage

# of the data sheet's rate, what a training step reaches. Assumed.
SHEET_SHARE = 0.4
SETTINGS: tuple[Recompute, ...] = (False, True, "unsloth", "auto")
LONGEST = 2**20


@dataclass(frozen=True)
class Setting:
    """What one value of ``training.recompute`` would need; ``longest``: tokens of a row, 0 if none fits."""

    recompute: Recompute
    need: Need
    total_bytes: int
    fits: bool
    longest: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Disk:
    """Bytes the run folder will hold at its most, an export of it, and what is free where the run lives."""

    checkpoints: int
    adapter: int
    merged_export: int
    free: int


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step at full length and of all steps (None: their number is not known yet)."""

    step_seconds: float
    all_seconds: float | None
    basis: str


@dataclass(frozen=True)
class Plan:
    """What a run will need. ``fits`` is about memory; ``changes`` are single ones that would make it fit."""

    model: str
    card: Card
    shape: BatchShape
    chosen: Setting
    settings: tuple[Setting, ...]
    recommended: Recompute | None
    changes: tuple[str, ...]
    disk: Disk
    time: Time | None
    basis: str
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the run as configured stays within the card's memory."""
        return self.chosen.fits

    def __str__(self) -> str:
        need, card = self.chosen.total_bytes, self.card
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return (
            f"plan: {need / 1e9:.2f} GB of {card.memory_bytes / 1e9:.2f} GB on {card.name} ({card.basis}): "
            f"{verdict}; micro-batches of {self.shape.rows} x {self.shape.tokens} tokens, {self.basis}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON and the manifest."""
        return {"fits": self.fits, **asdict(self)}

    def as_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)


def plan(config: RunConfig | str | Path | dict[str, Any], *, memory: str | None = None) -> Plan:
    """Work out what a run will need from config.json and the headers of the weight files.

    Args:
        config: A RunConfig, the path of a run.yaml, or its content as a mapping.
        memory: The card's, such as "24GB" or "24GiB", or a card's name; by default what is free here now.

    Raises:
        ConfigError: a key or value is wrong, or ``memory`` is no size.
        SourceError, AdapterError: the base or the adapter cannot be used.
    """
    resolved = as_config(config)
    return Planner(resolved, detect() if memory is None else card_of(memory)).full()


def detect() -> Card:
    """The device a run would go to, with the memory that is free on it now."""
    device = accelerator()
    if device == "cuda":
        free = int(torch.cuda.mem_get_info()[0])  # makes the context: it is not needed a second time
        return Card(torch.cuda.get_device_name(), free, "free on this device now", context_bytes=0)
    if device is None:
        return Card("this machine's CPU", free_host_bytes(), "free in this machine now", is_cpu=True)
    return Card(device, free_host_bytes(), "free in this machine now", is_cpu=True)


class Planner:
    """The figures of one configuration on one card."""

    def __init__(self, config: RunConfig, card: Card) -> None:
        self.card = card
        self.stage = Stage(config)
        self.config = self.stage.config
        self.shape = self._shape(self.stage.max_length)

    def _shape(self, length: int) -> BatchShape:
        rows, data = self.config.training.batch_size, self.config.data
        if data.packing:
            return BatchShape(rows=rows, tokens=data.pack_tokens or length, packed=True)
        return BatchShape(rows=rows, tokens=length, padded=rows > 1)

    def settings(self) -> tuple[Recompute, ...]:
        """The values of ``training.recompute`` that this configuration may have."""
        return SETTINGS if self.config.training.accelerate else (False, True)

    def need(self, setting: Recompute, shape: BatchShape | None = None) -> Need:
        """What a setting takes for micro-batches of ``shape``."""
        shape, stage = shape or self.shape, self.stage
        proof = stage.parameters * 4
        proven = self.config.training.accelerate and stage.dtype != torch.float32 and proof <= COPY_BYTES
        offloaded = stage.layers * shape.all_tokens * stage.input_bytes
        return Need(
            weights=stage.weight_bytes,
            adapters=stage.adapter_bytes,
            optimizer=self.optimizer_bytes(),
            step=self.step(shape, setting),
            buffers=self.stage.buffer_bytes,
            at_start=proof if proven else 0,
            on_host=offloaded if setting == "unsloth" and not self.card.is_cpu and not stage.upper else 0,
        )

    def step(self, shape: BatchShape, setting: Recompute, *, accumulates: bool | None = None) -> StepBytes:
        """Bytes of a micro-step; ``accumulates`` None: as the configuration has it."""
        how = self.stage.how()
        if accumulates is not None:
            how = replace(how, accumulates=accumulates)
        budget = self._auto_budget() if setting == "auto" else None
        return self.stage.step(shape, setting, how=how, activation_bytes=budget)

    def _auto_budget(self) -> int:
        """What "auto" will find free when the model is loaded, and take half of."""
        held = self.stage.weight_bytes + self.stage.adapter_bytes
        return max(0, int((self.card.memory_bytes - held - self.card.reserve(held)) * BUDGET_SHARE))

    def setting(self, recompute: Recompute) -> Setting:
        """A setting with what it needs and whether that fits."""
        need = self.need(recompute)
        return Setting(recompute, need, need.total(self.card), need.fits(self.card))

    def brief(self) -> Plan:
        """The plan of the configured setting alone; the rest only where it does not fit."""
        chosen = self.setting(self.config.training.recompute)
        return self._plan(chosen, (chosen,), None, tuple(self.changes()) if not chosen.fits else (), None)

    def full(self) -> Plan:
        """Everything: all settings, the longest sequence of each, time."""
        settings = tuple(
            Setting(
                one.recompute, one.need, one.total_bytes, one.fits,
                self.longest(one.recompute), self.stage.flops(self.shape, one.recompute),
            )
            for one in map(self.setting, self.settings())
        )  # fmt: skip
        chosen = next(one for one in settings if one.recompute == self.config.training.recompute)
        # the first that fits recomputes least; "auto" only as much as the memory asks for
        order = (False, "auto", True, "unsloth")
        fitting = {one.recompute for one in settings if one.fits}
        recommended = next((value for value in order if value in fitting), None)
        changes = () if chosen.fits else tuple(self.changes())
        return self._plan(chosen, settings, recommended, changes, self.time(chosen))

    def _plan(
        self,
        chosen: Setting,
        settings: tuple[Setting, ...],
        recommended: Recompute | None,
        changes: tuple[str, ...],
        time: Time | None,
    ) -> Plan:
        upper = self.stage.upper
        return Plan(
            model=self.config.model.name,
            card=self.card,
            shape=self.shape,
            chosen=chosen,
            settings=settings,
            recommended=recommended,
            changes=changes,
            disk=self.disk(),
            time=time,
            basis=f"UPPER ESTIMATE: {upper}" if upper else "one micro-step rehearsed on shapes",
            notes=tuple(self._notes()),
        )

    def longest(self, setting: Recompute) -> int:
        """Tokens of the longest row (or bin) that fits: rehearsed, and within 2 % of one that does not."""
        if setting == "auto":  # it recomputes more as rows get longer: at its longest, every layer
            return self.longest(True)

        def need(tokens: int) -> int:
            return self.need(setting, self._resized(tokens)).total(self.card)

        most = LONGEST if self.shape.packed else min(LONGEST, self.stage.positions or LONGEST)
        held = self.stage.weight_bytes + self.stage.adapter_bytes + self.optimizer_bytes()
        return longest_that_fits(need, self.card.memory_bytes, self.shape.tokens, most, at_zero=held)

    def _resized(self, tokens: int) -> BatchShape:
        shape = self.shape
        return BatchShape(rows=shape.rows, tokens=tokens, packed=shape.packed, padded=shape.padded)

    def changes(self) -> Iterator[str]:
        """Single changes of the configuration after which it would fit."""
        training, card = self.config.training, self.card
        for value in self.settings():
            if value != training.recompute and self.need(value).fits(card):
                yield f"training.recompute={json.dumps(value)}"
        setting = training.recompute
        for rows in _halves(self.shape.rows):
            smaller = BatchShape(
                rows=rows,
                tokens=self.shape.tokens,
                packed=self.shape.packed,
                padded=self.shape.padded and rows > 1,
            )
            if self.need(setting, smaller).fits(card):
                factor = ceil(training.gradient_accumulation * self.shape.rows / rows)
                yield f"training.batch_size={rows} (the same step: training.gradient_accumulation={factor})"
                break
        if (tokens := min(self.longest(setting), self.shape.tokens - 1)) >= 64:
            key = "data.pack_tokens" if self.config.data.pack_tokens else "model.max_seq_length"
            yield f"{key}={tokens}"
        if not self.stage.quantised and self._fits_with({"model": {"quantization": "nf4"}}):
            yield "model.quantization=nf4"
        if self.config.lora is not None:
            for rank in _halves(self.config.lora.r):
                if self._fits_with({"lora": {"r": rank}}):
                    yield f"lora.r={rank}"
                    break

    def _fits_with(self, change: Mapping[str, Mapping[str, Any]]) -> bool:
        values = self.config.to_dict()
        for section, keys in change.items():
            values[section] = {**(values[section] or {}), **keys}
        try:
            other = Planner(parse_config(values), self.card)
        except (PronghornError, MissingDependencyError):  # this base cannot be had that way
            return False
        return other.need(self.config.training.recompute).fits(self.card)

    def disk(self) -> Disk:
        """Files of the run folder and of a merged export."""
        stage, kept = self.stage, self.config.checkpoints.keep
        one = stage.adapter_bytes + self.optimizer_bytes()
        merged = stage.file_bytes if not stage.quantised else max(stage.file_bytes, 2 * stage.parameters)
        folder = self.config.output.folder.expanduser().absolute()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        # one more than is kept, while a new one is written
        return Disk((kept + 1) * one, stage.adapter_bytes, merged, shutil.disk_usage(there).free)

    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        trained = [(tuple(p.shape), p.element_size()) for p in self.stage.trained]
        return optimizer_bytes(self.config.training.optimizer, trained)

    def time(self, chosen: Setting) -> Time | None:
        """A step's products at the rate of the card; None where neither is known."""
        if chosen.flops is None:
            return None
        training = self.config.training
        flops = chosen.flops * training.gradient_accumulation
        bf16 = self.stage.how().bf16
        if self.card.tflops is not None:
            rate = self.card.tflops * 1e12 * SHEET_SHARE
            basis = f"{SHEET_SHARE:.0%} (assumed) of the data sheet's {self.card.tflops:g} TFLOP/s"
        elif self.card.basis != "as given":
            rate = matrix_rate(accelerator() or "cpu", torch.bfloat16 if bf16 else torch.float32)
            basis = f"at least: {rate / 1e9:.3g} GFLOP/s of products measured here now"
        else:
            return None
        seconds = flops / rate
        steps = training.max_steps
        per_token = flops / (self.shape.all_tokens * training.gradient_accumulation)
        basis = f"{flops:.3g} operations in products, counted ({per_token:.3g} a token); {basis}"
        return Time(seconds, None if steps is None else steps * seconds, basis)

    def _notes(self) -> Iterator[str]:
        report = self.stage.report
        if report is not None and self.stage.upper is None:
            for kind in ("norm", "attention", "qkv", "o", "linear", "mlp", "experts", "loss"):
                for reason, count in report.left(kind).items():
                    yield f"{count} {kind} left as they are: {reason}"
        if self.shape.packed or self.shape.padded:
            yield "the batch has a mask; without one (rows of equal length) a step needs less"
        evaluated = self.config.eval.batch_size or self.config.training.batch_size
        if evaluated > self.config.training.batch_size:
            yield f"eval.batch_size={evaluated} is larger than the training batch and is not planned for"
        if not self.card.is_cpu:
            yield (
                f"beside tensors: {self.card.context_bytes / 1e9:.1f} GB for the context and "
                f"{self.card.allocator_share:.0%} for the allocator, both assumed"
            )


def _halves(value: int) -> Iterator[int]:
    while value > 1:
        value //= 2
        yield value


def require_fit(made: Plan) -> None:
    """Refuse a run that does not fit.

    Raises:
        OutOfMemoryError: says what is missing, and which single change would fit.
    """
    if made.fits:
        return
    need, card = made.chosen.total_bytes, made.card
    what = (
        f"any one of: {'; '.join(made.changes)}"
        if made.changes
        else "no single change of it fits: combine them"
    )
    raise OutOfMemoryError(
        f"the run needs {need / 1e9:.2f} GB and {card.name} has {card.memory_bytes / 1e9:.2f} GB "
        f"({card.basis}); micro-batches of {made.shape.rows} x {made.shape.tokens} tokens, {made.basis}",
        fix=f"{what}; `pronghorn plan` shows all figures, training.over_budget=warn trains anyway",
    )
