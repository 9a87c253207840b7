from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pronghorn.memory.offload import Moved, Offload

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Recorded(Offload):
    """Writes down what is fetched, and takes every tensor for one of an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def fetch(self, moved: Moved) -> None:
        self.log.append(f"fetch {int(moved.host[0])}")
        moved.coming = (moved.host, None)

    def from_host(self, moved: Moved) -> Tensor:
        moved.device = torch.device("cuda")
        if moved.before is not None and (before := moved.before()) is not None:
            before.device = torch.device("cuda")
        self.log.append(f"ask {int(moved.host[0])}")
        return super().from_host(moved)


def test_the_next_one_is_on_its_way_when_one_is_asked_for() -> None:
    offload = Recorded()
    moved = [offload.to_host(torch.full((2,), float(i))) for i in range(3)]
    for entry in reversed(moved):
        offload.from_host(entry)
    assert offload.log == ["ask 2", "fetch 2", "fetch 1", "ask 1", "fetch 0", "ask 0"]


def test_a_graph_that_is_kept_can_ask_again() -> None:
    offload = Offload()
    moved = offload.to_host(torch.arange(3.0))
    assert torch.equal(offload.from_host(moved), offload.from_host(moved))


def test_what_the_graph_has_dropped_is_not_kept() -> None:
    offload = Offload()
    first, second = offload.to_host(torch.ones(2)), offload.to_host(torch.ones(2))
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    assert torch.equal(offload.from_host(second), torch.ones(2))


def test_the_input_itself_is_not_held() -> None:
    offload, t = Offload(), torch.ones(4)
    moved = offload.to_host(t)
    t.zero_()
    assert torch.equal(offload.from_host(moved), torch.ones(4))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_begin_with_nothing_moved(again: Any) -> None:
    offload = Offload()
    kept = offload.to_host(torch.ones(2))
    twin = again(offload)
    assert twin.last is None and kept.before is None
    assert torch.equal(twin.from_host(twin.to_host(torch.ones(2))), torch.ones(2))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_the_same_bits(device: str) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6)).to(device)
    x = torch.randn(512, 64, device=device, requires_grad=True)

    def grads(offload: Offload | None) -> list[Tensor]:
        y = x
        for layer in layers:
            if offload is None:
                y = layer(y).tanh()
                continue
            with torch.autograd.graph.saved_tensors_hooks(offload.to_host, offload.from_host):
                y = layer(y).tanh()
        return list(torch.autograd.grad(y.square().sum(), [x, *layers.parameters()]))

    offload = Offload()
    for _ in range(3):
        for mine, true in zip(grads(offload), grads(None), strict=True):
            assert torch.equal(mine, true)
