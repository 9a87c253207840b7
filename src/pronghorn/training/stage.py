"""A run's model as shapes only: what it holds, and what a micro-step of it adds, before anything is loaded.

A deep model is rehearsed with few of its layers: two of each make, then one more of each; what the one more
adds is added for every layer that was left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.origin import base_of
from pronghorn.errors import NotSupportedError
from pronghorn.loading.adapter import attach_blank
from pronghorn.loading.blank import as_fake, blank_base
from pronghorn.loading.load import as_recorded, sequence_length
from pronghorn.loading.options import LoadOptions
from pronghorn.loading.report import dtype_bytes
from pronghorn.memory import recompute as stock
from pronghorn.memory.budget import StepBytes
from pronghorn.memory.layers import RecomputePlan
from pronghorn.memory.shapes_only import ShapesOnly
from pronghorn.memory.upper import upper_step
from pronghorn.patching.accelerate import RECOMPUTE_MODES
from pronghorn.patching.assumed import accelerate_shapes, recomputing
from pronghorn.patching.places import PlacesSwitch
from pronghorn.patching.report import PatchReport
from pronghorn.patching.trl_head import assume_unit_gradient
from pronghorn.sources.record import read_record
from pronghorn.sources.resolve import resolve, resolve_base
from pronghorn.sources.source import SourceKind
from pronghorn.training.config import RunConfig, with_lora_defaults
from pronghorn.training.depth import Depth
from pronghorn.training.rehearse import Arithmetic, BatchShape, count_flops, rehearse
from pronghorn.training.trainer import add_fused_head, runs_in_bf16

# what running a model on shapes raises where numbers decide what happens next
_NEEDS_NUMBERS = (
    RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, AssertionError, LookupError,
)  # fmt: skip

Recompute = bool | str


class Stage:
    """The model of a run, with its adapter, as shapes only.

    ``upper`` says why its step cannot be rehearsed; its figures are upper estimates then.
    """

    def __init__(self, config: RunConfig) -> None:
        with torch.random.fork_rng(devices=[]):  # nobody's random numbers depend on a plan
            self._build(config)
        self._depth = Depth(self.model)
        self.upper: str | None = None
        self.report: PatchReport | None = None
        self._fused = False
        self._known: dict[Any, Any] = {}
        with torch.random.fork_rng(devices=[]):
            self._prepare()

    def _build(self, config: RunConfig) -> None:
        wanted = config.model
        source = resolve(wanted.name, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
        is_adapter = source.kind is SourceKind.ADAPTER
        if wanted.new_tokens or source.config.get("trainable_token_indices"):
            raise NotSupportedError(
                "rows of new tokens train beside the adapter, and their memory cannot be planned yet",
                fix="plan without them (model.new_tokens), and leave room for two copies of the embedding",
            )
        self.config = with_lora_defaults(config, adapter=is_adapter)
        options = LoadOptions(
            max_seq_length=wanted.max_seq_length,
            dtype=wanted.dtype,
            quantization=wanted.quantization,
            trust_remote_code=wanted.trust_remote_code,
        )
        record = read_record(source.path) if is_adapter else None
        base = source
        if is_adapter:
            base = resolve_base(source, base=wanted.base, trust_remote_code=wanted.trust_remote_code)
        blank = blank_base(base, as_recorded(options, record))
        self.base_folder, self.file_bytes, self.quantised = base.path, blank.file_bytes, len(blank.quantised)
        recorded = record.max_seq_length if record else None
        self.max_length = sequence_length(blank.model, wanted.max_seq_length, recorded)
        self.dtype: torch.dtype = blank.model.dtype
        if is_adapter:
            self.model: Any = attach_blank(blank.model, source)
        else:
            self.model = attach_lora(blank.model, self.config.lora, say=None)
        self._shapes = ShapesOnly()
        as_fake(self.model, self._shapes)
        self._count()

    def _count(self) -> None:
        """What is held all the time, by the arithmetic of the load report."""
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.adapter_bytes = sum(p.numel() * p.element_size() for p in self.trained)
        self.weight_bytes = sum(dtype_bytes(self.model).values()) - self.adapter_bytes
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def _prepare(self) -> None:
        """Accelerate and fuse the head, as ``train`` does, in the layers that are rehearsed."""
        base = base_of(self.model)
        try:
            with _quiet(), self._depth.only(self._depth.rehearsed):
                if self.config.training.accelerate:
                    tile = self.config.training.mlp_tile_tokens
                    self.report = accelerate_shapes(self.model, self._shapes, tile)
                    if self.report.model_check.startswith("nothing done"):
                        self.upper = self.report.model_check
                self._fused = add_fused_head(base)
                if self.config.training.accelerate:
                    assume_unit_gradient(base)
            if self.upper is None and self.quantised:  # the buffer for decoded weights is made once, and held
                with self._running(self._depth.few, False, None):
                    rehearse(self.model, BatchShape(rows=1, tokens=1), self.how())
        except _NEEDS_NUMBERS as error:
            self.upper = _why(error)

    @property
    def buffer_bytes(self) -> int:
        """What all layers in 4-bit share to be decoded into."""
        switches = [] if self.report is None else self.report.switches
        return sum(s.buffer.elements * self.dtype.itemsize for s in switches if isinstance(s, PlacesSwitch))

    def how(self) -> Arithmetic:
        """How the trainer runs the model."""
        training = self.config.training
        return Arithmetic(
            bf16=runs_in_bf16(training, self.dtype),
            fused_head=self._fused,
            accumulates=training.gradient_accumulation > 1,
        )

    def step(
        self,
        shape: BatchShape,
        setting: Recompute,
        *,
        how: Arithmetic | None = None,
        activation_bytes: int | None = None,
    ) -> StepBytes:
        """Bytes of a micro-step; an upper estimate where it cannot be rehearsed.

        Args:
            shape: of the batch.
            setting: ``training.recompute``.
            how: by default as the configuration has it.
            activation_bytes: the budget of "auto".
        """
        how = how or self.how()

        def run(layers: Sequence[int]) -> tuple[int, int]:
            with self._running(layers, setting, activation_bytes):
                found = rehearse(self.model, shape, how)
            return found.saved, found.peak

        if setting == "auto" and self._depth.repeated and self.upper is None:
            return self._auto(shape, how, activation_bytes or 0)
        found = self._extrapolated(("bytes", shape, setting, how, activation_bytes), run)
        if found is None:
            return upper_step(
                self.model, base_of(self.model).config.get_text_config(), shape.rows, shape.tokens
            )
        (saved, peak), (_, shallow) = found
        if not how.accumulates:  # may be highest where the last gradient is made, with all others there
            peak = max(peak, shallow + self.adapter_bytes - self._depth.shallow_gradients)
        return StepBytes(saved, peak)

    def _auto(self, shape: BatchShape, how: Arithmetic, budget: int) -> StepBytes:
        """As many layers as the budget asks for: between the figures for none and for all."""
        none, full = (self.step(shape, setting, how=how) for setting in (False, True))
        plan = RecomputePlan(
            mode="auto",
            layers=self._depth.count,
            kept_bytes=none.saved // (self._depth.count * shape.all_tokens),
            input_bytes=self.input_bytes,
            budget_bytes=budget,
        )
        less = (none.saved - full.saved) * plan.recomputed(shape.all_tokens) // self._depth.count
        return StepBytes(none.saved - less, max(none.peak - less, full.peak))

    @property
    def input_bytes(self) -> int:
        """A layer's input for one token."""
        weight = base_of(self.model).get_input_embeddings().weight
        return int(weight.shape[-1]) * self.dtype.itemsize

    @property
    def positions(self) -> int | None:
        """The most tokens of a row that the model was made for."""
        return getattr(base_of(self.model).config.get_text_config(), "max_position_embeddings", None)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return self._depth.count

    def flops(self, shape: BatchShape, setting: Recompute) -> int | None:
        """Operations in the products of a micro-step; None where it cannot be rehearsed."""

        def run(layers: Sequence[int]) -> tuple[int, int]:
            with self._running(layers, setting, 0):
                return count_flops(self.model, shape, self.how()), 0

        found = self._extrapolated(("flops", shape, setting), run)
        return None if found is None else found[0][0]

    def _extrapolated(
        self, key: Any, run: Callable[[Sequence[int]], tuple[int, int]]
    ) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """(figures for all layers, for the few that are run first), or None where a step needs numbers."""
        if key not in self._known and self.upper is None:
            try:
                few = run(self._depth.few)
                one, two = few
                for more, times in self._depth.repeated:
                    grown = run(more)
                    one, two = one + times * (grown[0] - few[0]), two + times * (grown[1] - few[1])
                self._known[key] = ((one, two), few)
            except _NEEDS_NUMBERS as error:
                self.upper = _why(error)
        return None if self.upper is not None else self._known[key]

    @contextmanager
    def _running(self, layers: Sequence[int], setting: Recompute, budget: int | None) -> Iterator[None]:
        """The model with these layers only, recomputing as ``setting`` says."""
        mode = RECOMPUTE_MODES[setting]
        with _quiet(), torch.random.fork_rng(devices=[]), self._depth.only(layers):
            if mode is None:
                switched: AbstractContextManager[None] = nullcontext()
            elif self.config.training.accelerate:
                switched = recomputing(self.model, self._shapes, mode, budget)
            else:
                switched = _stock_recompute(base_of(self.model))
            with switched, self._shapes:
                yield


@contextmanager
def _stock_recompute(base: Any) -> Iterator[None]:
    stock.enable(base)
    base.enable_input_require_grads()
    try:
        yield
    finally:
        base.disable_input_require_grads()
        stock.disable(base)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a shape that cannot be known before it raises."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"a step cannot be run on shapes alone ({type(error).__name__}: {lines[0][:120]})"
