from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.trainer_pt_utils import LabelSmoother

from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.deferred import DeferredLogits
from pronghorn.patching.head import HeadForward
from tests.patching.build import adapted, batch, step


class Case:
    """A head with and without deferred logits on the same hidden states."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.head = nn.Linear(32, 97, bias=False).requires_grad_(False)
        self.hidden = torch.randn(2, 9, 32).requires_grad_()
        self.labels = torch.randint(0, 97, (2, 9))
        self.labels[0, :4] = -100
        self.forward = HeadForward(self.head)

    def both(self, use: Any) -> dict[str, int]:
        """Check value and gradient of ``use(logits)`` and return which operations made the true logits."""
        results = []
        for logits in (self.forward(self.hidden), type(self.head).forward(self.head, self.hidden)):
            value = use(logits)
            (grad,) = torch.autograd.grad(value, self.hidden)
            results.append((value.detach(), grad))
        (ours, mine), (plain, theirs) = results
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6)
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
        return self.forward.declined


def loss_of(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(logits.view(-1, 97), labels.reshape(-1), **options)


def test_the_loss_never_makes_the_logits() -> None:
    case = Case()
    assert isinstance(case.forward(case.hidden), DeferredLogits)
    assert case.both(lambda z: loss_of(z.float(), case.labels)) == {}
    assert case.both(lambda z: loss_of(z.contiguous().to(torch.float32), case.labels, reduction="sum")) == {}


@pytest.mark.parametrize(
    "steps",
    [
        lambda z: z * 0.5,
        lambda z: z / 4,
        lambda z: 3 * z,
        lambda z: torch.tanh(z / 5) * 5,
        lambda z: z[..., :-1, :].float(),
        lambda z: z[:, 1:],
        lambda z: z[:, torch.tensor([2, 5])],
    ],
)
def test_scales_caps_and_slices_are_remembered(steps: Any) -> None:
    case = Case()

    def use(z: Tensor) -> Tensor:
        out = steps(z)
        return functional.cross_entropy(out.reshape(-1, 97), torch.arange(out.shape[0] * out.shape[1]))

    assert case.both(use) == {}


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda z, y: loss_of(z, y, label_smoothing=0.1), "cross_entropy"),
        (lambda z, y: functional.cross_entropy(z.transpose(1, 2), y), "transpose"),
        (lambda z, y: torch.log_softmax(z, -1).sum(), "log_softmax"),
        (lambda z, y: (z * torch.arange(97)).sum(), "mul"),
        (lambda z, y: z[..., :50].sum(), "__getitem__"),
        (lambda z, y: (z + 1).square().mean(), "add"),
        (lambda z, y: LabelSmoother(0.1)({"logits": z}, y), "log_softmax"),
    ],
)
def test_everything_else_sees_true_logits_and_is_counted(use: Any, what: str) -> None:
    case = Case()
    counted = case.both(lambda z: use(z, case.labels))
    assert sum(counted.values()) == 1, counted
    assert any(what in name for name in counted), counted


def test_logits_of_the_output_are_usable_after_the_loss() -> None:
    model, plain = adapted(), adapted()
    report = accelerate(model)
    for m in (model, plain):
        m.train()
    ours, theirs = model(**batch()), plain(**batch())
    assert torch.allclose(ours.loss, theirs.loss)
    assert report.fallbacks() == {}
    assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))
    assert ours.logits.shape == theirs.logits.shape
    assert "loss" in report.fallbacks()


def test_all_labels_ignored() -> None:
    model = adapted()
    accelerate(model)
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, grads = step(model, **inputs)
    assert loss.item() == 0
    assert all(g.eq(0).all() for g in grads)


def test_small_evaluations_get_real_logits() -> None:
    case = Case()
    with torch.no_grad():
        assert type(case.forward(case.hidden)) is Tensor


def test_large_evaluations_are_deferred_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    from pronghorn.patching import head

    monkeypatch.setattr(head, "EVALUATION_BYTES", 0)
    model, plain = adapted().eval(), adapted().eval()
    report = accelerate(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch()).loss, plain(**batch()).loss)
    assert report.fallbacks() == {}


def test_a_trained_head_gets_its_gradient() -> None:
    model, plain = (adapted(modules_to_save=["lm_head"], target_modules=["q_proj"]) for _ in range(2))
    report = accelerate(model)
    assert report.count("loss") == (1, 1)
    (_, ours), (_, theirs) = step(model), step(plain)
    assert len(ours) == len(theirs)
    for mine, true in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, true, rtol=1e-3, atol=1e-6)


def test_an_adapted_head_is_left_with_the_reason() -> None:
    report = accelerate(adapted(target_modules=["q_proj", "lm_head"]))
    assert report.left("loss") == {"the head is a Linear of peft, whose logits cannot be deferred": 1}
