from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pronghorn.ops import lora, mlp, norm, reference
from pronghorn.ops.shapes import ACTIVATIONS, Activation, LoraPart, MlpLayout, NormForm
from tests.ops.measure import assert_as_true_as, saved_storages

WIDTH, INNER, RANK = 63, 75, 5
FORM = NormForm(eps=1e-6)
LAYOUTS: dict[MlpLayout, list[int]] = {
    "gated": [INNER, INNER],
    "gate_up": [2 * INNER],
    "up_gate": [2 * INNER],
    "plain": [INNER],
}


def tensors(outs: list[int], width: int = WIDTH, *, bias: bool = False, seed: int = 0) -> list[Tensor]:
    """weight, bias, a, b of each part; adapters and biases train, weights do not."""
    g = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for out in outs:
        made.append(torch.randn(out, width, generator=g) / width**0.5)
        made.append(torch.randn(out, generator=g).requires_grad_(bias))
        made.append((torch.randn(RANK, width, generator=g) / width**0.5).requires_grad_())
        made.append((torch.randn(out, RANK, generator=g) / RANK**0.5).requires_grad_())
    return made


def parts_of(flat: tuple[Tensor, ...], *, bias: bool = True) -> list[LoraPart]:
    return [
        LoraPart(flat[i], flat[i + 1] if bias else None, flat[i + 2], flat[i + 3], 0.5)
        for i in range(0, len(flat), 4)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outs", [[75], [64, 16, 16]])
def test_linears_as_true_as_plain_pytorch(outs: list[int], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(3, 19, WIDTH).requires_grad_(), *tensors(outs, bias=bias)]
    run = lambda op: lambda x, *flat: op(x, parts_of(flat))  # noqa: E731
    assert_as_true_as(run(lora.lora_linears), run(reference.lora_linears), inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tile", [0, 1, 50, 1000])
def test_mlp_as_true_as_plain_pytorch(
    layout: MlpLayout, activation: Activation, dtype: torch.dtype, tile: int
) -> None:
    torch.manual_seed(2)
    first = tensors(LAYOUTS[layout], bias=True)
    # a bfloat16 gate near 0 may fall on the other side of relu's step: enough rows to average that out
    rows = 401 if activation == "relu" else 61
    inputs = [torch.randn(3, rows, WIDTH).requires_grad_(), *first, *tensors([WIDTH], INNER, seed=5)]

    def fast(x: Tensor, *flat: Tensor) -> Tensor:
        parts = parts_of(flat)
        if tile:
            return mlp.tiled_mlp(x, parts[:-1], parts[-1], layout, activation, tile)
        return mlp.mlp(x, parts[:-1], parts[-1], layout, activation)

    def plain(x: Tensor, *flat: Tensor) -> Tensor:
        return reference.mlp(x, parts_of(flat)[:-1], parts_of(flat)[-1], layout, activation)

    assert_as_true_as(fast, plain, inputs, dtype)


def test_second_derivative_is_refused_not_wrong() -> None:
    x = torch.randn(3, WIDTH).requires_grad_()
    (y,) = lora.lora_linears(x, parts_of(tuple(tensors([8]))))
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.sum(), x)


def test_linear_without_adapter_and_unused_output() -> None:
    flat = tensors([8, 9])
    plain_part = LoraPart(flat[0], None, None, None, 1.0)
    adapted = parts_of(tuple(flat[4:]))[0]
    x = torch.randn(4, WIDTH).requires_grad_()
    one, _ = lora.lora_linears(x, [plain_part, adapted])
    one.sum().backward()
    assert torch.allclose(x.grad, flat[0].sum(0).expand(4, -1), atol=1e-6)
    assert flat[6].grad is None


def test_gradient_dtype_is_the_adapters() -> None:
    flat = tensors([8])
    x = torch.randn(4, WIDTH).bfloat16().requires_grad_()
    part = LoraPart(flat[0].bfloat16(), None, flat[2], flat[3], 2.0)
    lora.lora_linears(x, [part])[0].sum().backward()
    assert (flat[2].grad.dtype, flat[3].grad.dtype, x.grad.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )


def test_adapter_frozen_after_the_forward_still_gets_its_gradient() -> None:
    flat = tensors([8])
    y = lora.lora_linears(torch.randn(4, WIDTH), parts_of(tuple(flat)))[0]
    flat[3].requires_grad_(False)  # as switching the active adapter does
    flat[3].requires_grad_(True)
    flat[2].requires_grad_(False)
    y.sum().backward()
    assert flat[3].grad is not None


class Block:
    """norm -> q, k, v and norm -> MLP, as in a decoder layer; built from the fast ops."""

    def __init__(self, dtype: torch.dtype = torch.float32, tile: int | None = None) -> None:
        cast = lambda ts: [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in ts]  # noqa: E731
        self.norm_weight = (torch.rand(64) + 0.5).to(dtype)
        self.qkv = cast(tensors([64, 16, 16], 64))
        self.first, self.down = cast(tensors([80, 80], 64, seed=1)), cast(tensors([64], 80, seed=2))
        self.tile = tile
        self.parameters = [self.norm_weight, *self.qkv, *self.first, *self.down]

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = lora.lora_linears(norm.norm(x, self.norm_weight, None, FORM), parts_of(tuple(self.qkv)))
        x = x + q * (k.sum(-1, keepdim=True) + v.sum(-1, keepdim=True)).sigmoid()
        y = norm.norm(x, self.norm_weight, None, FORM)
        first, down = parts_of(tuple(self.first)), parts_of(tuple(self.down))[0]
        if self.tile:
            return x + mlp.tiled_mlp(y, first, down, "gated", "silu", self.tile)
        return x + mlp.mlp(y, first, down, "gated", "silu")

    def grads(self) -> list[Tensor]:
        made = [p.grad for p in self.parameters if p.requires_grad]
        for p in self.parameters:
            p.grad = None
        assert all(g is not None for g in made[1:2])
        return [g for g in made if g is not None]


def test_a_linear_behind_a_norm_saves_nothing_of_its_own() -> None:
    x = torch.randn(50, 64).requires_grad_()
    parts = parts_of(tuple(tensors([64, 16, 16], 64)))
    w = torch.rand(64)
    y = norm.norm(x, w, None, FORM)
    with saved_storages() as saved:
        lora.lora_linears(y, parts)
    assert saved == {}
    with saved_storages(ignore=[y]) as saved:
        lora.lora_linears(y + 0, parts)
    assert sum(saved.values()) == 50 * 64 * 4 + 50 * 3 * RANK * 4


def test_changing_the_norms_output_in_place_makes_the_linear_save_it() -> None:
    parts = parts_of(tuple(tensors([8], 64)))
    x = torch.randn(50, 64).requires_grad_()
    y = norm.norm(x, torch.rand(64), None, FORM).mul_(2)
    lora.lora_linears(y, parts)[0].sum().backward()
    expected = (parts[0].b.sum(0, keepdim=True).t() * y.detach().sum(0)) * 0.5
    assert torch.allclose(parts[0].a.grad, expected, rtol=1e-4, atol=1e-4)


def test_mlp_saves_the_first_products_only() -> None:
    block = Block(torch.bfloat16)
    x = torch.randn(50, 64).bfloat16().requires_grad_()
    y = norm.norm(x, block.norm_weight, None, FORM)
    first, down = parts_of(tuple(block.first)), parts_of(tuple(block.down))[0]
    with saved_storages() as saved:
        mlp.mlp(y, first, down, "gated", "silu")
    assert sum(saved.values()) == 2 * 50 * 80 * 2
    with saved_storages() as saved:
        mlp.tiled_mlp(y, first, down, "gated", "silu", 8)
    assert saved == {}


@pytest.mark.parametrize("tile", [None, 7])
def test_recompute_of_a_layer_gives_the_same_bits_and_skips_the_down_product(
    tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = Block(tile=tile)
    x = torch.randn(21, 64).requires_grad_()
    block(x).square().sum().backward()
    plain = [x.grad.clone(), *block.grads()]
    x.grad = None
    outs: list[int] = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: outs.append(w.shape[1]) or real(x, w, b)
    )
    y = checkpoint(block, x, use_reentrant=False)
    downs = outs.count(80)
    y.square().sum().backward()
    assert outs.count(80) == downs, "the down projection ran again"
    for ours, before in zip([x.grad, *block.grads()], plain, strict=True):
        assert torch.equal(ours, before)


def test_nothing_stays_alive_after_backward() -> None:
    block = Block()
    x = torch.randn(21, 64).requires_grad_()
    y = norm.norm(x * 1, block.norm_weight, None, FORM)
    probe = weakref.ref(y.grad_fn)
    mlp.mlp(y, parts_of(tuple(block.first)), parts_of(tuple(block.down))[0], "gated", "silu").sum().backward()
    del y
    gc.collect()
    assert probe() is None


def test_backward_twice_with_retain_graph() -> None:
    block = Block()
    x = torch.randn(21, 64).requires_grad_()
    out = block(x).sum()
    out.backward(retain_graph=True)
    once = x.grad.clone()
    out.backward()
    assert torch.equal(x.grad, 2 * once)


def test_results_may_be_changed_in_place() -> None:
    block = Block()
    x = torch.randn(2, 5, 64).requires_grad_()
    (y, *_) = lora.lora_linears(x, parts_of(tuple(block.qkv)))
    z = mlp.mlp(x, parts_of(tuple(block.first)), parts_of(tuple(block.down))[0], "gated", "silu")
    for out in (y, z):
        out *= 2.0
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        assert grad.abs().sum() > 0
