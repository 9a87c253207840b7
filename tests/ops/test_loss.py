from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pronghorn.ops import loss, reference
from pronghorn.ops.shapes import LogitStep
from tests.ops.measure import assert_as_true_as, saved_storages

WIDTH, VOCABULARY, ROWS = 31, 507, 63
CHAINS = {
    "none": (),
    "float": (LogitStep("to", torch.float32),),
    "scale": (LogitStep("mul", 0.25), LogitStep("to", torch.float32)),
    "softcap": (
        LogitStep("div", 3.0),
        LogitStep("tanh"),
        LogitStep("mul", 3.0),
        LogitStep("to", torch.float32),
    ),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "TILE_BYTES", 7 * VOCABULARY * 4)  # 7 float32 rows: 63 rows are 9 tiles


def problem(*, ignored: float = 0.3, head: bool = False) -> tuple[list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=g).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=g) / 2).requires_grad_(head)
    bias = torch.randn(VOCABULARY, generator=g).requires_grad_(head)
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=g)
    labels[torch.rand(ROWS, generator=g) < ignored] = -100
    return [hidden, weight, bias], labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mean", [False, True])
def test_as_true_as_plain_pytorch(chain: str, head: bool, mean: bool, dtype: torch.dtype) -> None:
    inputs, labels = problem(head=head)
    run = lambda op: lambda h, w, b: op(h, w, b, labels, chain=CHAINS[chain], mean=mean)  # noqa: E731
    assert_as_true_as(run(loss.linear_cross_entropy), run(reference.linear_cross_entropy), inputs, dtype)


def test_all_labels_ignored_is_zero_with_zero_gradients() -> None:
    (hidden, weight, _), labels = problem(ignored=1.1, head=True)
    value = loss.linear_cross_entropy(hidden, weight, None, labels)
    value.backward()
    assert value.item() == 0.0
    assert hidden.grad.eq(0).all()
    assert weight.grad.eq(0).all()


def test_ignored_rows_never_reach_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, _), labels = problem(ignored=0.5)
    rows: list[int] = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: rows.append(x.shape[0]) or real(x, w, b)
    )
    loss.linear_cross_entropy(hidden, weight, None, labels).backward()
    assert sum(rows) == (labels != -100).sum()


def test_own_ignore_index() -> None:
    (hidden, weight, bias), labels = problem(ignored=0.0)
    ours = loss.linear_cross_entropy(hidden, weight, bias, labels, ignore_index=int(labels[0]))
    assert torch.allclose(
        ours, reference.linear_cross_entropy(hidden, weight, bias, labels, ignore_index=int(labels[0]))
    )


def test_evaluation_makes_no_gradient() -> None:
    (hidden, weight, bias), labels = problem()
    with torch.no_grad(), saved_storages() as saved:
        value = loss.linear_cross_entropy(hidden, weight, bias, labels)
    assert torch.allclose(value, reference.linear_cross_entropy(hidden, weight, bias, labels))
    assert saved == {}


def test_no_tensor_is_larger_than_the_tile() -> None:
    (hidden, weight, bias), labels = problem()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if (
                    isinstance(t, Tensor)
                    and t.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
                ):
                    largest = max(largest, t.numel() * t.element_size())
            return out

    with Watch():
        loss.linear_cross_entropy(hidden, weight, bias, labels, chain=CHAINS["softcap"]).backward()
    assert 0 < largest <= loss.TILE_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chain", ["none", "float", "scale", "softcap"])
def test_log_prob_and_entropy_with_both_gradients(chain: str, dtype: torch.dtype) -> None:
    (hidden, weight, bias), labels = problem(ignored=0.0)
    run = lambda op: lambda h, w, b: op(h, w, b, labels, chain=CHAINS[chain])[:2]  # noqa: E731
    assert_as_true_as(run(loss.log_prob), run(reference.log_prob), [hidden, weight, bias], dtype)


def test_log_prob_alone_runs_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight, _), labels = problem(ignored=0.0)
    logp, _, top = loss.log_prob(hidden, weight, None, labels)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", None)  # backward must not make logits again
        (-logp.sum()).backward()
    truth, _, true_top = reference.log_prob(hidden.detach(), weight, None, labels)
    assert torch.allclose(logp, truth, atol=1e-5)
    assert torch.equal(top, true_top)


def test_log_prob_refuses_a_head_that_trains() -> None:
    (hidden, weight, _), labels = problem(ignored=0.0, head=True)
    with pytest.raises(ValueError, match="frozen head"):
        loss.log_prob(hidden, weight, None, labels)
