"""Errors against a float32 truth, and bytes saved for backward: what the tests of fast ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance; a value that is not finite is infinitely far."""
    error = (value.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
    return float(error) if torch.isfinite(error) else float("inf")


def outputs_and_grads(
    run: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs of ``run(*inputs)``, then the gradient of every input that requires one, for fixed output
    gradients.
    """
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    made = run(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    torch.autograd.backward(outputs, [seed.to(out.dtype) for out, seed in zip(outputs, seeds, strict=True)])
    grads = [leaf.grad for leaf in leaves if leaf.requires_grad]
    assert all(g is not None for g in grads), "a gradient is missing"
    return [t.detach() for t in outputs] + [g for g in grads if g is not None]


def assert_as_true_as(
    fast: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    slack: float = 1.5,
) -> None:
    """``fast`` in ``dtype`` may be no further from plain float64 than plain PyTorch in ``dtype`` is (times
    slack).
    """

    def cast(kind: torch.dtype) -> list[Tensor]:
        return [
            (t.detach().to(kind) if t.is_floating_point() else t).requires_grad_(t.requires_grad)
            for t in inputs
        ]

    first = plain(*cast(torch.float64))
    shapes = [first.shape] if isinstance(first, Tensor) else [t.shape for t in first]
    generator = torch.Generator().manual_seed(11)
    seeds = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs[0].device) for shape in shapes
    ]
    truth = outputs_and_grads(plain, cast(torch.float64), seeds)
    peers = outputs_and_grads(plain, cast(dtype), seeds)
    ours = outputs_and_grads(fast, cast(dtype), seeds)
    for index, (mine, peer, true) in enumerate(zip(ours, peers, truth, strict=True)):
        # a few numbers can be exact by luck on the plain side; their own rounding (half an eps) is no error
        few = 2 * torch.finfo(dtype).eps if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        floor = few if dtype == torch.float32 or mine.numel() < 64 else 0.0
        bound = slack * distance(peer, true) + floor
        assert mine.dtype == peer.dtype, f"result {index}: {mine.dtype}, plain PyTorch gives {peer.dtype}"
        assert distance(mine, true) <= bound, f"result {index}: {distance(mine, true):.2e} > {bound:.2e}"


@contextmanager
def saved_storages(ignore: Sequence[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Bytes of each distinct storage saved for backward inside the block, by address; ``ignore``d ones left
    out.
    """
    skip = {t.untyped_storage().data_ptr() for t in ignore}
    found: dict[int, int] = {}
    keep = []  # no address is reused while it counts

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            found[storage.data_ptr()] = storage.nbytes()
            keep.append(storage)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found
