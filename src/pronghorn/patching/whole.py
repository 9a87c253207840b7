"""The last word: the whole model, replaced against original, loss and every trainable gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pronghorn.patching.proof import FLOOR, Verdict, worst
from pronghorn.patching.report import PatchReport
from pronghorn.patching.trace import sample_batch, train_mode
from pronghorn.quant.library import as_plain, values

# a float32 copy of the model is the truth for a narrower one; above this size it is not made
COPY_BYTES = 4 * 2**30
MORE_BATCHES = 8
# of the loss: the same logits, summed in another order
LOSS_BOUND = 1e-4
CHECKED = ("norm", "attention", "qkv", "o", "linear", "mlp", "experts", "loss", "recompute")


def forward_only(model: Any, batch: dict[str, Tensor]) -> None:
    """One forward in train mode without gradients."""
    with torch.no_grad(), train_mode(model):
        model(**batch, use_cache=False)


def check_model(base: Any, report: PatchReport) -> None:
    """Compare; take back the kind that spoils the result, or everything if no single kind does."""
    if not report.forwards and not report.switches:
        report.model_check = "nothing was replaced"
        return
    with _generic_adapters(base), _uncounted(report):
        verdict = _compare(base, report, ())
        culprit = None
        if not verdict.passed:
            for culprit in [k for k in CHECKED if report.count(k)[1]]:
                if _compare(base, report, (culprit,)).passed:
                    break
            else:
                culprit = None
    if verdict.passed:
        report.model_check = f"equal ({verdict})"
    elif culprit is not None:
        report.drop(culprit, f"spoils the whole model: {verdict}")
        report.model_check = f"equal without {culprit}"
    else:
        for kind in CHECKED:
            report.drop(kind, f"the whole model differs: {verdict}")
        report.model_check = f"differs, everything was taken back ({verdict})"


def _compare(base: Any, report: PatchReport, without: tuple[str, ...]) -> Verdict:
    """On two batches, one of them padded; where bfloat16 noise might decide (a token routed to another
    expert), on many.
    """
    verdict = _compare_on(base, report, without, 1)
    return verdict if verdict.passed else _compare_on(base, report, without, MORE_BATCHES)


def _in_float32(base: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """:func:`_pooled` of a float32 copy, in which 4-bit weights are what they decode to."""
    clone = torch.nn.Module.float(copy.deepcopy(base))  # transformers' own refuses a model in 4-bit
    with as_plain(clone, torch.float32):
        return _pooled(clone, batches)


def _compare_on(base: Any, report: PatchReport, without: tuple[str, ...], rounds: int) -> Verdict:
    """In the model's own dtype, against a wider truth where a float32 copy is affordable."""
    own = next(p.dtype for p in base.parameters() if p.is_floating_point() and p.dim() > 1)
    batches = [batch for seed in range(rounds) for batch in _batches(base, seed)]
    with report.disabled():
        plain = _pooled(base, batches)
        wide = own == torch.float32 or 4 * values(base) > COPY_BYTES
        truth = list(plain) if wide else _in_float32(base, batches)
    with report.disabled(without):
        try:
            ours = _pooled(base, batches)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:120]
            return Verdict("", 0.0, 0.0, declined=f"the replaced model raises {reason}")
    if float((ours.pop() - plain.pop()).abs().max()) > LOSS_BOUND * float(plain[0].mean()):
        return Verdict("loss against the mean of the tokens' losses", float("inf"), LOSS_BOUND)
    truth = truth[: len(plain)]
    name = f"loss and {len(plain) - 1} gradients, {own}".replace("torch.", "")
    if own == torch.float32:
        # the original is the truth here, and float32 rounding through a whole model the only difference
        return worst(name, ours, plain, truth, 1e-4)
    if wide:
        return worst(f"{name}, against the original", ours, plain, truth, 0.1)
    return worst(name, ours, plain, truth, FLOOR[own])


def _pooled(model: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """:func:`loss_and_grads` of several batches side by side, and the experts of a layer as one result.

    A token that rounding sends to another expert changes the gradients of two. In transformers 5 experts are
    stacked in one parameter; where they are a list, each alone would be judged by a handful of tokens.
    """
    runs = [loss_and_grads(model, batch) for batch in batches]
    names = [_without_inner_numbers(n) for n, p in model.named_parameters() if p.requires_grad]
    together: dict[Any, list[Tensor]] = {}
    for run in runs:
        for key, tensor in zip(["losses", *names, "own loss"], run, strict=True):
            together.setdefault(key, []).append(tensor.flatten())
    return [torch.cat(parts) for parts in together.values()]


def _without_inner_numbers(name: str) -> str:
    """A parameter's name with no number but the first, its layer's."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(part for index, part in enumerate(parts) if index == first or not part.isdecimal())


def _batches(base: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    batch = sample_batch(base, rows=2, tokens=25, seed=seed)
    yield batch
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :7] = 0
    mask[1, -5:] = 0
    labels = batch["labels"].masked_fill(mask == 0, -100)
    labels[0, 7] = -100  # predicted from padding, for which implementations may differ
    yield {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


def loss_and_grads(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """What is compared: loss of each token, then the gradient of every trainable parameter (zeros if unused).

    A single bfloat16 loss can be near the truth by luck, a vector of them cannot. That the model's own loss
    is their mean is asserted by the caller through the last element: own loss minus that mean.
    """
    leaves = [p for p in model.parameters() if p.requires_grad]
    device = leaves[0].device.type if leaves else "cpu"
    with torch.enable_grad(), torch.autocast(device, enabled=False), train_mode(model):
        torch.manual_seed(1)
        out = model(**batch, use_cache=False)
        grads = torch.autograd.grad(out.loss, leaves, allow_unused=True) if leaves else ()
        tokens = _token_losses(_logits(model, batch, out), batch["labels"])
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True)]
    return [tokens, *filled, out.loss.detach().float() - tokens.mean()]


def _logits(model: Any, batch: dict[str, Tensor], out: Any) -> Tensor:
    """The forward that TRL 1.4 to 1.14 puts on a model keeps them to itself where there are labels."""
    if out.logits is None:
        torch.manual_seed(1)  # the same dropout
        with torch.no_grad():
            out = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False)
    logits: Tensor = out.logits
    return logits


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        rows = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        targets = labels[:, 1:].to(rows.device)
        return -rows.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)[targets >= 0]


@contextmanager
def _uncounted(report: PatchReport) -> Iterator[None]:
    """The check's own calls do not show in the counts of a training."""
    forwards = [forward for made in report.forwards.values() for forward in made]
    before = [(forward.calls, dict(forward.declined)) for forward in forwards]
    try:
        yield
    finally:
        for forward, (calls, declined) in zip(forwards, before, strict=True):
            forward.calls = calls
            forward.declined.clear()
            forward.declined.update(declined)


@contextmanager
def _generic_adapters(base: Any) -> Iterator[None]:
    """A fresh adapter has B = 0, which hides half of its gradients: give it values, and take them back."""
    fresh = [p for n, p in base.named_parameters() if "lora_B" in n and p.requires_grad and not p.any()]
    generator = torch.Generator().manual_seed(9)
    try:
        with torch.no_grad():
            for p in fresh:
                p.copy_(torch.randn(p.shape, generator=generator).to(p.device) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for p in fresh:
                p.zero_()
