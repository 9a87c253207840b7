from __future__ import annotations

import pytest
import torch
from transformers.optimization import Adafactor

from pronghorn.errors import ConfigError
from pronghorn.memory.budget import (
    CONTEXT_BYTES,
    Card,
    Need,
    StepBytes,
    card_of,
    longest_that_fits,
    optimizer_bytes,
)
from pronghorn.memory.counter import LiveStorages, storage_key


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gb", 15 * 10**8), ("A100-80GB", int(79.1 * 2**30))],
)
def test_sizes_and_names_of_cards(text: str, count: int) -> None:
    assert card_of(text).memory_bytes == count


@pytest.mark.parametrize("text", ["lots", "24XB", "", "0GB"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither a size nor a card") as error:
        card_of(text)
    assert "24GB" in error.value.fix
    assert "H100-80GB" in error.value.fix


def test_a_need_is_the_highest_moment_and_a_card_takes_its_share() -> None:
    need = Need(weights=100, adapters=10, optimizer=20, step=StepBytes(30, 50), at_start=60)
    assert need.tensors == 100 + 10 + 20 + 50
    assert Need(weights=100, adapters=10, optimizer=20, step=StepBytes(30, 50), at_start=90).tensors == 200
    machine = Card("cpu", 180, "free", is_cpu=True)
    assert need.total(machine) == 180
    assert need.fits(machine)
    assert not need.fits(Card("cpu", 179, "free", is_cpu=True))
    assert need.total(card_of("1GB")) == 180 + CONTEXT_BYTES + 5


@pytest.mark.parametrize(("square", "slope"), [(0, 1_000), (3, 1_000), (40, 10)])
@pytest.mark.parametrize("memory", [10_000, 1_000_000, 77_000_000])
def test_the_longest_row_fits_and_little_more_does_not(square: int, slope: int, memory: int) -> None:
    asked: list[int] = []

    def need(tokens: int) -> int:
        asked.append(tokens)
        return 5_000 + slope * tokens + square * tokens * tokens

    found = longest_that_fits(need, memory, 128, 10**6, at_zero=5_000)
    assert found == 0 or (found in asked and need(found) <= memory)
    assert need(int(found * 1.03) + 17) > memory
    assert len(asked) <= 9


def test_the_longest_row_is_no_longer_than_allowed() -> None:
    assert longest_that_fits(lambda n: n, 10**9, 128, 4_096, at_zero=0) == 4_096
    assert longest_that_fits(lambda n: 10**9, 1, 128, 4_096, at_zero=0) == 0


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "sgd"])
def test_the_state_of_an_optimizer_is_what_it_really_keeps(kind: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((8, 64), (48, 8), (5,))]
    made: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(parameters),
        "adafactor": lambda: Adafactor(parameters, lr=1e-3, relative_step=False, scale_parameter=False),
        "sgd": lambda: torch.optim.SGD(parameters, lr=1e-3),
    }[kind]()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    tensors = [v for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    shapes = [(tuple(p.shape), p.element_size()) for p in parameters]
    kept = {storage_key(t): t.untyped_storage().nbytes() for t in tensors}
    assert optimizer_bytes(kind, shapes) == pytest.approx(sum(kept.values()), abs=4 * len(parameters))


def test_live_storages_see_the_peak_and_what_is_left() -> None:
    with LiveStorages() as live:
        kept = torch.zeros(1_000)
        other = torch.zeros(5_000)
        del other
        view = kept[:10]
    assert live.alive() == 4_000
    assert live.peak == 24_000
    del view, kept
    assert live.alive() == 0
