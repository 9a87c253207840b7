"""``accelerate(model)``: find the parts, prove each replacement, put it in place, check the whole, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from pronghorn.adapters.origin import base_of
from pronghorn.errors import ConfigError, NotSupportedError
from pronghorn.memory.layers import RecomputeSwitch, make_plan
from pronghorn.ops.experts import ExpertsForm
from pronghorn.patching import attentions, experts, head, linears, mlps, norms
from pronghorn.patching.adapted import is_adapted, is_adapted_parameter, linear_shape, lora_part
from pronghorn.patching.forwards import Declined, InstanceForward, blocked
from pronghorn.patching.mlps import MlpForm
from pronghorn.patching.norms import NormForward
from pronghorn.patching.places import PlacesSwitch
from pronghorn.patching.proof import Build, Verdict, prove
from pronghorn.patching.report import REPLACEABLE, Choice, Part, PatchReport
from pronghorn.patching.signature import signature
from pronghorn.patching.trace import Trace, sample_batch, trace, train_mode
from pronghorn.patching.watch import current_report, watch
from pronghorn.patching.whole import check_model, forward_only
from pronghorn.quant.library import is_linear_4bit
from pronghorn.versions import warn_untested

# what turns q and k is a function of the model's file, called by name: it has no instance to be replaced
ROPE_LEFT = "applied by a module-level function of transformers: replacing it reaches other models"
# what options and notebooks say -> the mode of ``accelerate``
RECOMPUTE_MODES: Mapping[bool | str, str | None] = MappingProxyType(
    {True: "full", False: None, "unsloth": "unsloth", "auto": "auto"}
)


def accelerate(
    model: Any,
    *,
    kinds: Sequence[str] = REPLACEABLE,
    strict: bool | Sequence[str] = False,
    mlp_tile_tokens: int | None = None,
    recompute: str | None = None,
    activation_bytes: int | None = None,
) -> PatchReport:
    """Replace the parts of one model instance that can be proven equal, and say what was and was not done.

    Works on a bare transformers model and on a PEFT model; adapters attached later are found at the next
    training step. No class, library function or source is touched; ``report.undo()`` gives everything back.

    Args:
        model: a transformers causal language model, or a PEFT model around one.
        kinds: which kinds of parts to consider, of ``REPLACEABLE``.
        strict: True: every part found must be replaced. A list of kinds: those must be there and be replaced.
        mlp_tile_tokens: run MLPs in tiles of at most this many tokens (batch and sequence together) and keep
        only
            their input: for long sequences. The gate and up products then run twice.
        recompute: None, "full" (every layer), "unsloth" (every layer, its input kept in host memory) or
        "auto"
            (as many layers as the budget asks for; what the others save is measured first).
        activation_bytes: the budget of "auto": what all layers may keep together. Default: half of what is
        free.

    Raises:
        ConfigError: an unknown kind or recompute mode, or ``strict`` names a kind not in ``kinds``.
        NotSupportedError: ``strict``, and a kind was not fully replaced; nothing stays replaced.
    """
    unknown = [kind for kind in kinds if kind not in REPLACEABLE]
    if unknown:
        raise ConfigError(f"kinds={unknown}: unknown", fix=f"choose from {', '.join(REPLACEABLE)}")
    named = () if isinstance(strict, bool) else tuple(strict)
    if unknown := [kind for kind in named if kind not in kinds]:
        raise ConfigError(
            f"strict={unknown}: not among the kinds considered", fix=f"choose from {', '.join(kinds)}"
        )
    warn_untested()
    base = base_of(model)
    if (before := current_report(base)) is not None:
        before.undo()
    report = PatchReport()
    choice = Choice(tuple(kinds), mlp_tile_tokens, recompute, activation_bytes)
    plan(base, report, choice)
    watch(base, report, choice)
    _demand(report, kinds if strict is True else named, named)
    return report


def _demand(report: PatchReport, complete: Sequence[str], present: Sequence[str]) -> None:
    for kind in complete:
        found, replaced = report.count(kind)
        if replaced < found or (not found and kind in present):
            reasons = [f"{count}: {reason}" for reason, count in report.left(kind).items()]
            why = "; ".join(reasons) or "the model has none"
            report.undo()
            raise NotSupportedError(
                f"strict: {replaced} of {found} parts of kind {kind!r} can be replaced ({why})",
                fix=f"leave {kind!r} out of strict, or accept the report without strict",
            )


def plan(base: Any, report: PatchReport, choice: Choice) -> None:
    """Fill ``report`` and put the proven replacements in place."""
    with torch.random.fork_rng(devices=[]):
        if not find_and_replace(base, report, choice, sample_batch(base)):
            return
        with torch.enable_grad():
            if choice.recompute is not None:
                put_recompute(base, report, choice)
            check_model(base, report)


def find_and_replace(
    base: Any,
    report: PatchReport,
    choice: Choice,
    batch: dict[str, Tensor],
    prover_kind: type[Prover] | None = None,
    running: AbstractContextManager[Any] | None = None,
) -> bool:
    """Find the parts, put in place what the prover accepts; False if the model does not run.

    Args:
        base: the model.
        report: filled.
        choice: which kinds.
        batch: what the model is run on.
        prover_kind: who judges; by default ``Prover``.
        running: entered for every run of the whole model.
    """
    kinds, running = choice.kinds, running or nullcontext()
    places = PlacesSwitch(base)
    if places.offsets:
        places.on()
        report.switches.append(places)
        report.packed = str(places)
    with torch.enable_grad():
        try:
            with running:
                found = trace(base, batch)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, NotImplementedError) as error:
            report.model_check = (
                f"nothing done: a short text input raises {type(error).__name__}: {str(error)[:120]}"
            )
            for kind in kinds:
                report.add(kind, "model", report.model_check)
            return False
        prover = (prover_kind or Prover)(report, found, dict(base.named_modules()))
        chosen = prover.norms() if "norm" in kinds else []
        taken: set[str] = set()
        if "mlp" in kinds:
            made, taken = prover.mlps(choice.mlp_tile_tokens)
            chosen += made
        if "experts" in kinds:
            chosen += prover.experts(choice.mlp_tile_tokens)
        chosen += prover.linears(kinds, taken, base)
        if "loss" in kinds:
            chosen += prover.loss(base)
        for kind, name, reason, forwards in chosen:
            report.add(kind, name, reason, forwards)
        for name, module in base.named_modules():
            if any("inv_freq" in key for key, _ in module.named_buffers(recurse=False)):
                report.add("rope", name, ROPE_LEFT)
        if "attention" in kinds:
            with running:
                _attention(base, report, batch)
    return True


Chosen = list[tuple[str, str, str, list[InstanceForward]]]


class Prover:
    """Fits and proves candidates; modules of one make share the expensive part of the proof."""

    def __init__(self, report: PatchReport, found: Trace, modules: dict[str, nn.Module]) -> None:
        self.report = report
        self.trace = found
        self.modules = modules
        self.proven: set[Any] = set()

    def norms(self) -> Chosen:
        """Every norm of the model."""
        chosen: Chosen = []
        for name, module in self.modules.items():
            if norms.is_norm(module) or norms.looks_like_norm(module):
                reason, forwards = self._norm(name, module)
                if forwards or norms.looks_like_norm(module):
                    chosen.append(("norm", name, reason, forwards))
        return chosen

    def _norm(self, name: str, module: nn.Module) -> tuple[str, list[InstanceForward]]:
        if (why := self._unreachable(name)) is not None:
            return why, []
        if not norms.is_norm(module):
            return "has no epsilon among its attributes, or more than two small parameters", []
        fitted = self._fit_norm(module, self.trace.shapes[name])
        if isinstance(fitted, Declined):
            return str(fitted), []
        forward, _ = fitted

        def build(clone: Any) -> list[InstanceForward]:
            return [NormForward(clone, forward.form, forward.names, mixed=forward.mixed)]

        return self._prove(name, module, build, build(module))

    def _fit_norm(self, module: nn.Module, shape: tuple[int, ...]) -> tuple[NormForward, str] | Declined:
        return norms.fit_norm(module, shape)

    def mlps(self, tile: int | None) -> tuple[Chosen, set[str]]:
        """Every MLP, and the names of the linears inside those that are replaced."""
        chosen: Chosen = []
        taken: set[str] = set()
        for name, module in self.modules.items():
            if is_adapted(module):
                continue
            if (why := mlps.odd_mlp(module)) is not None:
                chosen.append(("mlp", name, why, []))
            if not mlps.is_mlp(module):
                continue
            if (
                name in self.trace.called - set(self.trace.shapes)
                and "mlp" not in type(module).__name__.lower()
            ):
                continue  # an attention with one linear before and one after it has the shapes of an MLP
            reason, forwards = self._mlp(name, module, tile)
            chosen.append(("mlp", name, reason, forwards))
            if forwards:
                taken |= {f"{name}.{child}" for child, _ in module.named_children()}
        return chosen, taken

    def _mlp(self, name: str, module: nn.Module, tile: int | None) -> tuple[str, list[InstanceForward]]:
        if (why := self._unreachable(name)) is not None:
            return why, []
        for child in module.children():
            if linear_shape(child) and isinstance(state := lora_part(child, training=True), Declined):
                return str(state), []
        form = self._fit_mlp(module, self.trace.shapes[name])
        if isinstance(form, Declined):
            return str(form), []
        forward = mlps.MlpForward(module, form, tile)
        return self._prove(name, module, lambda clone: [mlps.MlpForward(clone, form, tile)], [forward])

    def _fit_mlp(self, module: nn.Module, shape: tuple[int, ...]) -> MlpForm | Declined:
        return mlps.fit_mlp(module, shape)

    def experts(self, tile: int | None) -> Chosen:
        """Every module that holds stacked experts, by the name under which the model calls it."""
        found = [name for name, module in self.modules.items() if experts.is_experts(module)]
        outer = {name: experts.outermost(name, self.modules) for name in found}
        return [("experts", outer[name], *self._experts(outer[name], name, tile)) for name in found]

    def _experts(self, name: str, inner: str, tile: int | None) -> tuple[str, list[InstanceForward]]:
        form = experts.fit_experts(self.modules[inner])
        if isinstance(form, Declined):
            return str(form), []
        if name not in self.trace.routed:
            return self._unreachable(name) or "called with more than states, choices and weights", []
        return self._prove_experts(name, inner, form, tile)

    def _prove_experts(
        self, name: str, inner: str, form: ExpertsForm | None, tile: int | None
    ) -> tuple[str, list[InstanceForward]]:
        width, choices = self.trace.routed[name]
        module = self.modules[name]
        base: Any = self.modules[inner]
        some = min(base.num_experts, max(choices, experts.PROOF_EXPERTS))
        self.trace.shapes[name] = (1, width)
        return self._prove(
            name,
            experts.Routed(experts.some_experts(module, some), choices),
            lambda clone: [experts.RoutedForward(clone, form, tile)],
            [experts.ExpertsForward(module, form, tile)],
        )

    def linears(self, kinds: Sequence[str], taken: set[str], base: Any) -> Chosen:
        """Linears with an adapter or in 4-bit outside the replaced MLPs, by shared input."""
        chosen: Chosen = []
        output = base.get_output_embeddings()
        for name, module in self.modules.items():
            if is_adapted_parameter(module):
                continue  # around experts, which are a kind of their own
            if is_adapted(module) and linear_shape(module) is None and "linear" in kinds:
                kind = type(getattr(module, "base_layer", module)).__name__
                chosen.append(("linear", name, f"the base layer is a {kind}", []))
        groups = [g for g in self.trace.groups if not taken & set(g) and self.modules[g[0]] is not output]
        for group in groups:
            kind = self._kind_of(group, groups)
            if kind not in kinds:
                continue
            members = [self.modules[name] for name in group]
            if not any(is_adapted(member) or is_linear_4bit(member) for member in members):
                if kind != "linear":
                    reason = "has no adapter: a frozen linear saves nothing"
                    chosen.append((kind, ", ".join(group), reason, []))
                continue
            states = (lora_part(member, training=True) for member in members)
            if (why := next((str(s) for s in states if isinstance(s, Declined)), None)) is not None:
                chosen.append((kind, ", ".join(group), why, []))
                continue
            width = (linear_shape(members[0]) or (0, 0))[0]
            self.trace.shapes.setdefault(group[0], (1, 1, width))
            forwards = linears.group_forwards(members)
            outcome = self._prove(group[0], nn.ModuleList(members), _build_group, forwards)
            chosen.append((kind, ", ".join(group), *outcome))
        return chosen

    def _kind_of(self, group: tuple[str, ...], groups: list[tuple[str, ...]]) -> str:
        """For the report only: the last single linear of an attention is its output, what comes before is
        qkv.
        """
        parent = group[0].rpartition(".")[0]
        if "attention" not in type(self.modules[parent]).__name__.lower():
            return "linear"
        siblings = [g for g in groups if g[0].rpartition(".")[0] == parent]
        return "o" if group == siblings[-1] and len(group) == 1 and len(siblings) > 1 else "qkv"

    def loss(self, base: Any) -> Chosen:
        """The output head."""
        found = head.find_head(base)
        if isinstance(found, Declined):
            return [("loss", "output head", str(found), [])]
        linear: Any = found
        self.trace.shapes["output head"] = (1, linear.in_features)
        outcome = self._prove(
            "output head",
            head.HeadLoss(linear),
            lambda clone: [head.HeadLossForward(clone)],
            [head.HeadForward(linear)],
        )
        return [("loss", "output head", *outcome)]

    def _unreachable(self, name: str) -> str | None:
        if name in self.trace.shapes:
            return None
        if name in self.trace.called:
            return "called with more than the hidden states"
        return "not reached by a text input"

    def _prove(
        self, name: str, subject: nn.Module, build: Build, forwards: list[InstanceForward]
    ) -> tuple[str, list[InstanceForward]]:
        """(reason, the forwards if they are proven); of one make, one is checked with randomised weights."""
        for forward in forwards:
            if (why := blocked(forward.module)) is not None:
                return why, []
        key = signature(subject)
        try:
            shape = self.trace.shapes[name]
            verdict: Verdict = prove(subject, build, shape, randomised=key not in self.proven)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return f"the original cannot be run alone ({type(error).__name__}: {str(error)[:80]})", []
        if verdict.passed:
            self.proven.add(key)
        return str(verdict), forwards if verdict.passed else []


def _build_group(clones: Any) -> list[InstanceForward]:
    return linears.group_forwards(list(clones))


def _attention(base: Any, report: PatchReport, batch: dict[str, Tensor]) -> None:
    switch = attentions.AttentionSwitch(base)
    names = {module: name for name, module in base.named_modules()}
    if switch.refused:
        report.add("attention", "softmax attention", switch.refused)
        return
    switch.on()
    callers = attentions.attention_callers(base, batch, forward_only)
    if not callers:
        switch.off()
        report.add("attention", "softmax attention", "no module asks transformers' AttentionInterface")
        return
    report.switches.append(switch)
    for module in callers:
        report.parts.append(Part("attention", names[module], True, "proven by the check of the whole model"))


def put_recompute(base: Any, report: PatchReport, choice: Choice) -> None:
    """Switch recompute on as ``choice`` says."""

    def run(tokens: int) -> Any:
        return base(**sample_batch(base, tokens=tokens), use_cache=False).loss

    assert choice.recompute is not None
    with train_mode(base):
        made = make_plan(base, choice.recompute, run, choice.activation_bytes)
    switch = RecomputeSwitch(base, made)
    switch.on()
    report.switches.append(switch)
    reason = "recomputed in backward, proven by the check of the whole model"
    report.parts += [Part("recompute", f"layer {index}", True, reason) for index in range(made.layers)]
