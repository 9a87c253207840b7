from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pronghorn.ops import norm, reference
from pronghorn.ops.shapes import NormForm
from tests.ops.measure import assert_as_true_as, saved_storages

FORMS = [
    NormForm(eps=1e-6, centered=centered, offset=offset, cast=cast, root=root)
    for centered, offset, cast, root in itertools.product(
        (False, True), (0.0, 1.0), ("early", "late"), ("rsqrt", "pow")
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_further_from_the_truth_than_plain_pytorch(form: NormForm, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 7, 507) * 1.7 + 0.3, torch.randn(507) * 0.5 + 0.7, torch.randn(507)
    for bias in (b, None):
        inputs = [t.requires_grad_() for t in (x, w, *([] if bias is None else [bias]))]
        padded = lambda f: lambda x, w, b=None: f(x, w, b, form)  # noqa: E731
        assert_as_true_as(padded(norm.norm), padded(reference.norm), inputs, dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_equals_the_plain_twin_bit_for_bit(form: NormForm, dtype: torch.dtype) -> None:
    x, w = torch.randn(5, 63).to(dtype).requires_grad_(), torch.randn(63).to(dtype)
    assert torch.equal(norm.norm(x, w, None, form), reference.norm(x, w, None, form))
    assert torch.equal(norm.norm(x, None, None, form), reference.norm(x, None, None, form))


def test_mixed_dtypes_promote_as_the_plain_twin() -> None:
    x, w = torch.randn(5, 63).bfloat16().requires_grad_(), torch.randn(63)
    for cast in ("early", "late"):
        form = NormForm(eps=1e-6, cast=cast)
        assert norm.norm(x, w, None, form).dtype == reference.norm(x, w, None, form).dtype


def test_weight_of_several_dimensions_gets_its_own_gradient() -> None:
    x, w = torch.randn(2, 3, 4, 63).requires_grad_(), torch.randn(4, 63).requires_grad_()
    form = NormForm(eps=1e-5, centered=True)
    assert_as_true_as(
        lambda x, w: norm.norm(x, w, None, form),
        lambda x, w: reference.norm(x, w, None, form),
        [x, w],
        torch.float32,
    )


def test_saves_its_input_and_one_float_per_row() -> None:
    x, w = torch.randn(64, 256).bfloat16().requires_grad_(), torch.randn(256).bfloat16()
    with saved_storages(ignore=[w]) as saved:
        norm.norm(x, w, None, NormForm(eps=1e-6))
    assert sum(saved.values()) == 64 * 256 * 2 + 64 * 4


def test_rebuilds_its_output_exactly() -> None:
    x, w = torch.randn(9, 63).bfloat16().requires_grad_(), torch.randn(63).bfloat16()
    y: Tensor = norm.norm(x, w, None, NormForm(eps=1e-6, cast="late"))
    assert y.grad_fn is not None
    assert torch.equal(y.grad_fn.rebuild(y.grad_fn), y)


def test_refuses_a_weight_changed_between_forward_and_backward() -> None:
    x, w = torch.randn(9, 63).requires_grad_(), torch.randn(63)
    y = norm.norm(x, w, None, NormForm(eps=1e-6))
    w.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in place: shape \(63,\)"):
        y.sum().backward()
