"""Whole ops with the kernels chosen: norm, MLP and loss with their gradients, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pronghorn.errors import NotSupportedError
from pronghorn.ops import reference, select
from pronghorn.ops.packed import Packed, Scales, decode
from pronghorn.ops.shapes import Activation, LogitStep, LoraPart, MlpLayout, NormForm
from pronghorn.ops.triton import pieces
from pronghorn.quant import nf4
from tests.ops.measure import assert_as_true_as, saved_storages
from tests.ops.triton.canary import DEVICE, randn

# the interpreter's bfloat16 is wrong (silently), so bfloat16 runs on a device only
DTYPES = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]
EARLY = NormForm(eps=1e-6)
WAITS = ("nonzero", "_local_scalar_dense", "item", "is_nonzero", "masked_select", "equal", "unique")


class Seen(TorchDispatchMode):
    """Counts operations that wait for a device: those whose result decides a shape or a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def no_wait() -> Iterator[None]:
    seen = Seen()
    with seen:
        yield
    assert seen.waits == []


def lora_tensors(outs: Sequence[int], width: int, seed: int) -> list[Tensor]:
    """weight, a, b of each part; the adapters train."""
    made = []
    for index, out in enumerate(outs):
        made.append(randn(out, width, seed=seed + index) / width**0.5)
        made.append((randn(4, width, seed=seed + index + 10) / width**0.5).requires_grad_())
        made.append((randn(out, 4, seed=seed + index + 20) / 2).requires_grad_())
    return made


def parts_of(flat: Sequence[Tensor]) -> list[LoraPart]:
    return [LoraPart(flat[i], None, flat[i + 1], flat[i + 2], 0.5) for i in range(0, len(flat), 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "form",
    [EARLY, NormForm(eps=1e-6, offset=1.0, cast="late"), NormForm(eps=1e-5, centered=True, cast="late")],
    ids=["early", "late", "layer"],
)
def test_norm(form: NormForm, trained: bool, dtype: torch.dtype) -> None:
    weight, bias = (randn(63, seed=seed).requires_grad_(trained) for seed in (2, 3))
    inputs = [randn(2, 3, 63, seed=1, scale=3).requires_grad_(), weight] + [bias] * form.centered

    def run(op: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = op(x, weight, bias, form)
        return out

    fast = partial(run, partial(select.norm, using="triton"))
    assert_as_true_as(fast, partial(run, reference.norm), inputs, dtype)


def test_norm_takes_any_strides_and_may_be_changed_in_place() -> None:
    x = randn(3, 62, 5, seed=1).transpose(1, 2).requires_grad_()
    weight = randn(62, seed=2)
    y = select.norm(x, weight, None, EARLY, using="triton")
    y *= 2.0
    (fast,) = torch.autograd.grad(y.sum(), x)
    (plain,) = torch.autograd.grad((2.0 * reference.norm(x, weight, None, EARLY)).sum(), x)
    torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize(
    "layout,activation", [("gated", "silu"), ("gate_up", "gelu_tanh"), ("up_gate", "gelu")]
)
def test_mlp(layout: MlpLayout, activation: Activation, tile: int | None, dtype: torch.dtype) -> None:
    outs = [75, 75] if layout == "gated" else [150]
    first, down = lora_tensors(outs, 63, 1), lora_tensors([63], 75, 50)
    inputs = [randn(2, 5, 63, seed=9).requires_grad_(), *first, *down]

    def run(op: Any, x: Tensor, *flat: Tensor) -> Tensor:
        *parts, last = parts_of(flat)
        out: Tensor = op(x, parts, last, layout, activation)
        return out

    fast = partial(run, partial(select.mlp, tile_rows=tile, using="triton"))
    assert_as_true_as(fast, partial(run, reference.mlp), inputs, dtype)


def small_mlp(using: select.Backend) -> tuple[Tensor, list[Tensor]]:
    """Norm and MLP, the MLP rebuilding its input from the norm."""
    flat = lora_tensors([75, 75], 63, 1) + lora_tensors([63], 75, 50)
    x = randn(7, 63, seed=9).requires_grad_()
    y = select.norm(x, randn(63, seed=3), None, EARLY, using=using)
    *first, down = parts_of(flat)
    return select.mlp(y, first, down, "gated", "silu", using=using), [
        x,
        *(t for t in flat if t.requires_grad),
    ]


def test_mlp_behind_a_norm_saves_the_first_products_only() -> None:
    with saved_storages() as saved:
        small_mlp("triton")
    # norm: x and its roots; MLP: gate and up
    assert sorted(saved.values()) == sorted([7 * 63 * 4, 7 * 4, 7 * 75 * 4, 7 * 75 * 4])


def test_backward_twice_with_a_kept_graph_is_the_same_and_overwrites_nothing() -> None:
    out, leaves = small_mlp("triton")
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    last = torch.autograd.grad(out.sum(), leaves)
    for one, two, three in zip(first, second, last, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_backward_overwrites_what_is_spent() -> None:
    out, leaves = small_mlp("triton")
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        out, leaves = small_mlp("triton")
    gates = [t for t in held if t.shape == (7, 75)]
    before = [t.clone() for t in gates]
    torch.autograd.grad(out.sum(), leaves)
    assert len(gates) == 2 and not any(torch.equal(a, b) for a, b in zip(gates, before, strict=True))


CHAINS = {
    "none": (),
    "scale": (LogitStep("mul", 0.25), LogitStep("to", torch.float32)),
    "softcap": (LogitStep("div", 3.0), LogitStep("tanh"), LogitStep("mul", 3.0)),
    "both": (LogitStep("div", 2.0), LogitStep("tanh"), LogitStep("mul", 5.0), LogitStep("to", torch.float32)),
}


def problem(*, ignored: int = 3, head: bool = False) -> tuple[list[Tensor], Tensor]:
    hidden, weight = randn(23, 31, seed=1).requires_grad_(), (randn(507, 31, seed=2) / 2).requires_grad_(head)
    labels = torch.arange(23, device=DEVICE) * 7919 % 507
    labels[:: ignored or 24] = -100
    return [hidden, weight, randn(507, seed=3).requires_grad_(head)], labels


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "TILE_BYTES", 7 * 507 * 4)  # 7 float32 rows: 23 rows are 4 tiles


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mean", [False, True])
def test_loss(chain: str, head: bool, mean: bool, dtype: torch.dtype) -> None:
    inputs, labels = problem(head=head)

    def run(op: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # one loss can be near the truth by luck, a vector of them cannot
        cuts = [slice(0, 23), *(slice(start, start + 3) for start in range(0, 23, 3))]
        losses = [op(hidden[cut], weight, bias, labels[cut], chain=CHAINS[chain], mean=mean) for cut in cuts]
        return torch.stack(losses)

    fast = partial(run, partial(select.linear_cross_entropy, using="triton"))
    assert_as_true_as(fast, partial(run, reference.linear_cross_entropy), inputs, dtype)


@pytest.mark.usefixtures("small_tiles")
def test_loss_of_ignored_labels_only_is_zero_with_zero_gradients() -> None:
    (hidden, weight, bias), labels = problem(ignored=1, head=True)
    loss = select.linear_cross_entropy(hidden, weight, bias, labels, using="triton")
    loss.backward()
    assert loss.item() == 0.0
    assert all(t.grad is not None and t.grad.eq(0).all() for t in (hidden, weight, bias))


def test_loss_without_gradients_is_the_same() -> None:
    (hidden, weight, bias), labels = problem()
    with torch.no_grad():
        alone = select.linear_cross_entropy(hidden, weight, bias, labels, using="triton")
    assert torch.equal(
        alone, select.linear_cross_entropy(hidden, weight, bias, labels, using="triton").detach()
    )


def test_no_op_waits_for_the_device() -> None:
    (hidden, weight, bias), labels = problem()
    with no_wait():
        out, leaves = small_mlp("triton")
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        select.linear_cross_entropy(hidden, weight, bias, labels, using="triton").backward()


def test_the_check_for_waits_sees_one() -> None:
    (hidden, weight, bias), labels = problem()
    with pytest.raises(AssertionError, match="nonzero"), no_wait():
        select.linear_cross_entropy(hidden, weight, bias, labels, using="torch")


def test_rows_of_a_loss_tile_are_whole_tiles_of_the_product() -> None:
    assert pieces.LOSS.tile_rows(128256, 2) == 1024
    assert pieces.LOSS.tile_rows(507, 2) % 128 == 0
    assert pieces.LOSS.tile_rows(2**31, 2) == 1


@pytest.mark.parametrize(
    "chain,expected",
    [
        ((), (1.0, 0.0)),
        ((LogitStep("div", 4.0), LogitStep("mul", 2.0)), (0.5, 0.0)),
        ((LogitStep("div", 30.0), LogitStep("tanh"), LogitStep("mul", 30.0)), (1.0, 30.0)),
        ((LogitStep("mul", torch.tensor(2.0)),), None),
        ((LogitStep("to", torch.bfloat16),), None),
        ((LogitStep("tanh"), LogitStep("tanh")), None),
    ],
)
def test_fold(chain: tuple[LogitStep, ...], expected: tuple[float, float] | None) -> None:
    assert pieces.fold(chain) == pytest.approx(expected)


def test_an_explicit_choice_is_refused_and_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = randn(3, 8), randn(8)
    with pytest.raises(
        NotSupportedError, match=r"norm using='triton': the kernels do not take torch.float64 input"
    ):
        select.norm(x.double(), weight.double(), None, EARLY, using="triton")
    with pytest.raises(NotSupportedError, match="not one vector of the length of a row"):
        select.norm(x, weight[:1], None, EARLY, using="triton")
    with pytest.raises(NotSupportedError, match="rows of 16385, more than 16384"):
        select.norm(randn(1, 16385), None, None, EARLY, using="triton")
    first, down = parts_of(lora_tensors([8], 8, 1)), parts_of(lora_tensors([8], 8, 1))[0]
    with pytest.raises(NotSupportedError, match="do not take an MLP without a gate"):
        select.mlp(x, first, down, "plain", "silu", using="triton")
    (hidden, head, bias), labels = problem()
    steps = (LogitStep("to", torch.bfloat16),)
    with pytest.raises(NotSupportedError, match="logit steps other than scale, softcap, scale"):
        select.linear_cross_entropy(hidden, head, bias, labels, chain=steps, using="triton")
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(NotSupportedError, match="the input is on cpu, and Triton is not interpreting"):
            select.norm(x, weight, None, EARLY, using="triton")


def test_without_triton_an_explicit_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    select._kernels.cache_clear()
    try:
        with pytest.raises(NotSupportedError, match="Triton is not installed"):
            select.norm(randn(3, 8), None, None, EARLY, using="triton")
    finally:
        select._kernels.cache_clear()


@pytest.mark.parametrize("using", [None, "torch"])
def test_on_a_cpu_torch_does_the_arithmetic(using: select.Backend | None) -> None:
    x = torch.randn(3, 8).requires_grad_()
    y = select.norm(x, None, None, EARLY, using=using)
    assert y.grad_fn is not None and y.grad_fn.pieces is not pieces.NORM  # type: ignore[attr-defined]


@pytest.mark.parametrize("capability,expected", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_older_chips_than_the_table_has_get_torch(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert select._compiled_for.__wrapped__(torch.device("cuda:0")) is expected


@pytest.mark.skipif(DEVICE.type == "cpu", reason="what a device gets when nothing is asked for")
def test_on_a_device_the_kernels_do_it() -> None:
    x = randn(3, 8).requires_grad_()
    assert select.norm(x, None, None, EARLY).grad_fn.pieces is pieces.NORM  # type: ignore[union-attr]
    wide = randn(3, 8).double().requires_grad_()
    assert select.norm(wide, None, None, EARLY).grad_fn.pieces is not pieces.NORM  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 128), (7, 90)])
def test_nf4_decode(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = nf4.encode(randn(*shape, seed=1))
    out, twin = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    with no_wait():
        assert select.nf4_decode(weight, out, using="triton") is out
    # the compiler may fuse the product and the sum of a magnitude: one rounding fewer
    torch.testing.assert_close(out, select.nf4_decode(weight, twin, using="torch"), rtol=2e-3, atol=1e-7)
    single = Packed(
        weight.data, Scales(weight.scales.decode(0, weight.scales.codes.numel()), None, 0.0), shape, dtype
    )
    assert torch.equal(select.nf4_decode(single, out, using="triton"), decode(single, twin))


def test_nf4_of_an_odd_number_of_values_is_refused() -> None:
    weight = nf4.encode(randn(7, 63, seed=1))
    with pytest.raises(NotSupportedError, match="the kernels do not take an odd number of values"):
        select.nf4_decode(weight, torch.empty(7, 63, device=DEVICE), using="triton")
