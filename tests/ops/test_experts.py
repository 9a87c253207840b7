from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pronghorn.ops import experts, norm, reference
from pronghorn.ops.experts import ExpertsForm
from pronghorn.ops.shapes import Activation, ExpertPart, MlpLayout, NormForm
from tests.ops.measure import assert_as_true_as, saved_storages

TOKENS, CHOICES, COUNT, WIDTH, INNER, RANK = 61, 3, 7, 63, 35, 5
WIDTHS: dict[MlpLayout, int] = {"gate_up": 2 * INNER, "up_gate": 2 * INNER, "plain": INNER}


def routing(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, expert 4 for nobody, and weights that sum to 1."""
    used = torch.tensor([0, 1, 2, 3, 5, 6])
    index = torch.stack([used[torch.randperm(6)[:CHOICES]] for _ in range(tokens)])
    return index, torch.rand(tokens, CHOICES).softmax(-1)


def tensors(inside: int, outside: int, *, adapter: bool) -> list[Tensor]:
    """weight [E, in, out], bias, a, b: adapters and biases train, weights do not."""
    made = [
        torch.randn(COUNT, outside, inside).transpose(1, 2) / inside**0.5,
        torch.randn(COUNT, outside).requires_grad_(),
    ]
    if adapter:
        made.append((torch.randn(COUNT, RANK, inside) / inside**0.5).requires_grad_())
        made.append((torch.randn(COUNT, outside, RANK) / RANK**0.5).requires_grad_())
    return made


def part(flat: tuple[Tensor, ...]) -> ExpertPart:
    a, b = flat[2:] if len(flat) == 4 else (None, None)
    return ExpertPart(flat[0], flat[1], a, b, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("tile", [0, 8])
@pytest.mark.parametrize(
    ("layout", "activation"),
    [("gate_up", "silu"), ("gate_up", "gelu_tanh"), ("up_gate", "gelu"), ("plain", "relu2")],
)
def test_as_true_as_plain_pytorch(
    layout: MlpLayout, activation: Activation, tile: int, adapter: bool, dtype: torch.dtype
) -> None:
    index, weights = routing()
    first = tensors(WIDTH, WIDTHS[layout], adapter=adapter)
    down = tensors(INNER, WIDTH, adapter=adapter)
    inputs = [torch.randn(TOKENS, WIDTH).requires_grad_(), weights.requires_grad_(), *first, *down]

    def fast(x: Tensor, w: Tensor, *flat: Tensor) -> Tensor:
        one, two = part(flat[: len(first)]), part(flat[len(first) :])
        return experts.experts(x, index, w, one, two, ExpertsForm(layout, activation), tile or None)

    def plain(x: Tensor, w: Tensor, *flat: Tensor) -> Tensor:
        one, two = part(flat[: len(first)]), part(flat[len(first) :])
        return reference.experts(x, index, w, one, two, layout, activation)

    assert_as_true_as(fast, plain, inputs, dtype)


@pytest.mark.skipif(not hasattr(functional, "grouped_mm"), reason="this torch has no grouped products")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torchs_grouped_products_take_the_same_arguments(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU they are used for bfloat16; torch has them on the CPU too, with the same rules for strides."""
    count, width, inner, rank = 7, 64, 32, 8
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(shape, generator=g).to(device)  # noqa: E731
    weights = [draw(count, 2 * inner, width) / 8, draw(count, width, inner) / 6]
    factors = [(count, rank, width), (count, 2 * inner, rank), (count, rank, inner), (count, width, rank)]
    adapters = [(0.3 * draw(*shape)).requires_grad_() for shape in factors]
    index, routing_weights = (t.to(device) for t in routing())
    results = []
    for native in (False, True):
        monkeypatch.setattr(
            experts, "groups_for", lambda i, parts, x, n=native: experts.Groups(i, count, native=n)
        )
        frozen = [w.bfloat16().transpose(1, 2) for w in weights]
        first = ExpertPart(frozen[0], None, adapters[0], adapters[1], 0.5)
        down = ExpertPart(frozen[1], None, adapters[2], adapters[3], 0.5)
        x = torch.ones(TOKENS, width, dtype=torch.bfloat16, device=device).cumsum(0).sin().requires_grad_()
        out = experts.experts(x, index, routing_weights, first, down, ExpertsForm("gate_up", "silu"))
        grads = torch.autograd.grad(out.float().square().sum(), [x, *adapters])
        results.append([out, *grads])
    for loop, grouped in zip(*results, strict=True):
        assert (loop.float() - grouped.float()).norm() <= 0.02 * loop.float().norm()


def test_an_expert_nobody_chose_gets_zero_gradients() -> None:
    index, weights = routing()
    first, down = tensors(WIDTH, 2 * INNER, adapter=True), tensors(INNER, WIDTH, adapter=True)
    form = ExpertsForm("gate_up", "silu")
    x = torch.randn(TOKENS, WIDTH)
    experts.experts(x, index, weights, part(tuple(first)), part(tuple(down)), form).sum().backward()
    for t in (*first[1:], *down[1:]):
        assert t.grad is not None and not t.grad[4].any() and t.grad[5].any()


def test_float32_routing_keeps_the_dtype_of_the_states() -> None:
    index, weights = routing()
    cast = lambda ts: tuple(t.detach().bfloat16().requires_grad_(t.requires_grad) for t in ts)  # noqa: E731
    first = cast(tensors(WIDTH, 2 * INNER, adapter=True))
    down = cast(tensors(INNER, WIDTH, adapter=True))
    x = torch.randn(TOKENS, WIDTH).bfloat16().requires_grad_()
    weights = weights.requires_grad_()
    out = experts.experts(x, index, weights, part(first), part(down), ExpertsForm("gate_up", "silu"))
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, weights.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("adapter", [False, True])
def test_saved_are_gate_and_up_and_the_choices(adapter: bool) -> None:
    """Behind a norm the input is rebuilt, through the view that a mixture makes of it."""
    index, weights = routing()
    first, down = tensors(WIDTH, 2 * INNER, adapter=adapter), tensors(INNER, WIDTH, adapter=adapter)
    x = torch.randn(1, TOKENS, WIDTH).requires_grad_()
    with saved_storages([*first, *down, x]) as saved:
        states = norm.norm(x, torch.ones(WIDTH), None, NormForm(eps=1e-6)).view(-1, WIDTH)
        form = ExpertsForm("gate_up", "silu")
        out = experts.experts(states, index, weights, part(tuple(first)), part(tuple(down)), form)
    pairs = TOKENS * CHOICES
    assert sum(saved.values()) == 4 * TOKENS + pairs * (2 * INNER * 4 + 4 + 8)
    out.sum().backward()


def test_no_tensor_grows_with_tokens_times_experts() -> None:
    """Tensors are as large as the chosen pairs or the weights, never tokens times experts."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    tokens, count, hidden, inner, rank = 64, 64, 48, 32, 2
    index = torch.stack([torch.randperm(count)[:2] for _ in range(tokens)])
    frozen = [torch.randn(count, hidden, 2 * inner), torch.randn(count, inner, hidden)]
    factors = [(count, rank, hidden), (count, 2 * inner, rank), (count, rank, inner), (count, hidden, rank)]
    a1, b1, a2, b2 = (torch.randn(shape).requires_grad_() for shape in factors)
    x, weights = torch.randn(tokens, hidden).requires_grad_(), torch.rand(tokens, 2)
    with Watch():
        first, down = ExpertPart(frozen[0], None, a1, b1, 1.0), ExpertPart(frozen[1], None, a2, b2, 1.0)
        experts.experts(x, index, weights, first, down, ExpertsForm("gate_up", "silu")).sum().backward()
    views_of_weights = frozen[0].numel()
    assert tokens * count * inner > 4 * tokens * 2 * 2 * inner
    assert largest == views_of_weights
